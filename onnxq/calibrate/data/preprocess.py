"""What is done to a picture's pixels before the model sees them.

    x = (scale * pixel - mean) / std

`mean` and `std` are on the scale that `scale` makes, one number for all channels or one per channel in the
order in which the model takes them: a BGR model's mean starts with blue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnxq.errors import UsageError

Channels = Literal["rgb", "bgr", "gray"]
Layout = Literal["NCHW", "NHWC"]
Resample = Literal["bilinear", "bicubic"]
Resize = tuple[int, int] | int | float | None


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input.

    Attributes:
        mean: Subtracted after scaling.
        std: Divided by after that.
        resize: What a picture of another size than the model's goes through. (H, W): resized to that, then
            cropped at the centre to the model's size. An integer: the length its short side gets before the
            centre crop. A fraction up to 1: the part of the short side that the centre crop keeps (0.875
            means 256 for a model of 224). None: resized to the model's size, its proportions lost.
        scale: Multiplies the pixels 0..255.
        channels: Their order; None takes RGB or grey from the model's number of channels.
        layout: Where the channel axis is; None takes it from the model's shape.
        resample: The filter of the resizing.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Resize = None
    scale: float = 1 / 255
    channels: Channels | None = None
    layout: Layout | None = None
    resample: Resample = "bilinear"

    def __post_init__(self) -> None:
        _one_of("channels", self.channels, (None, "rgb", "bgr", "gray"))
        _one_of("layout", self.layout, (None, "NCHW", "NHWC"))
        _one_of("resample", self.resample, ("bilinear", "bicubic"))
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) not in (1, 3) or not all(map(math.isfinite, values))):
                raise UsageError(f"preprocess: {name} is one finite number or three, not {list(values)}")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"preprocess: std must be positive, not {list(self.std)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"preprocess: scale must be positive, not {self.scale}")
        if self.mean is not None and max(self.mean) > 255.001 * self.scale:
            raise UsageError(
                f"preprocess: mean is within 0..{255 * self.scale:g}, the pixels after scaling, not "
                f"{list(self.mean)}: give scale 1 with a mean of 0..255"
            )
        _check_resize(self.resize)

    def describe(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return {
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "scale": self.scale,
            "resample": self.resample,
        }


def _one_of(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        names = ", ".join(choice for choice in allowed if choice)
        raise UsageError(f"preprocess: {name} is one of {names}, not {value!r}")


def _check_resize(resize: Resize) -> None:
    if isinstance(resize, tuple):
        good = len(resize) == 2 and min(resize) >= 1
    elif isinstance(resize, int):
        good = resize >= 1
    else:
        good = resize is None or 0 < resize <= 1
    if not good:
        raise UsageError(
            f"preprocess: resize is (height, width), the short side in pixels or a fraction up to 1, not {resize}"
        )


_IMAGENET_CROP = 0.875

PREPROCESS: dict[str, Preprocess] = {
    "imagenet": Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=_IMAGENET_CROP),
    "imagenet-caffe": Preprocess((103.939, 116.779, 123.68), resize=_IMAGENET_CROP, scale=1.0, channels="bgr"),
    "inception": Preprocess((0.5,), (0.5,), resize=_IMAGENET_CROP),
    "clip": Preprocess(
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        resize=1.0,
        resample="bicubic",
    ),
    "unit": Preprocess(),
    "signed": Preprocess((0.5,), (0.5,)),
    "raw": Preprocess(scale=1.0),
}
"""Preprocessing by name.

imagenet: torchvision's classifiers (short side 256, crop 224, RGB mean and deviation).
imagenet-caffe: the same crop, BGR, 0..255 minus the mean. inception: the same crop, -1..1.
clip: CLIP's mean and deviation, short side to the model's, bicubic.
unit: 0..1. signed: -1..1. raw: 0..255.
"""
