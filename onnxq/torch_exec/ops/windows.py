"""Where the windows of convolutions and pools lie: one axis at a time."""

from __future__ import annotations

from typing import Literal

AutoPad = Literal["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]


def covered(kernel: int, dilation: int) -> int:
    """Size of a window, its holes included."""
    return (kernel - 1) * dilation + 1


def paddings(
    sizes: list[int],
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int] | None,
    auto_pad: AutoPad,
) -> list[tuple[int, int]]:
    """(before, behind) for each axis of `sizes`.

    SAME_*: as much as gives ceil(size / stride) windows; an odd one goes behind for SAME_UPPER, before for SAME_LOWER.
    """
    count = len(sizes)
    if auto_pad == "VALID" or (auto_pad == "NOTSET" and pads is None):
        return [(0, 0)] * count
    if auto_pad == "NOTSET":
        assert pads is not None
        return list(zip(pads[:count], pads[count:], strict=True))
    found = []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        windows = -(-size // stride)
        total = max((windows - 1) * stride + covered(taps, dilation) - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return found


def for_torch(pads: list[tuple[int, int]]) -> list[int]:
    """The same in the order of torch.nn.functional.pad: last axis first."""
    return [amount for pair in reversed(pads) for amount in pair]
