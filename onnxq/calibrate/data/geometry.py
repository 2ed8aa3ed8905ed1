"""From a picture of any size to the size the model takes: resize, then crop at the centre."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.calibrate.data.preprocess import Resize
from onnxq.errors import UsageError

DEFAULT_SIDE = 224
"""Size for a model of dynamic size when the preprocessing only says which fraction to keep."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Steps:
    """What one picture goes through.

    Attributes:
        resized: Its size after resizing.
        corner: Top and left of the crop in it.
        size: Size of the crop.
    """

    resized: Size
    corner: Size
    size: Size


@dataclass(frozen=True)
class Geometry:
    """The way to a size.

    Attributes:
        target: Height and width that the model takes, None where it takes any.
        resize: As in `Preprocess`.
    """

    target: tuple[int | None, int | None]
    resize: Resize

    @staticmethod
    def of(height: int | None, width: int | None, resize: Resize) -> Geometry:
        """Settle the size: the model's where it is fixed, otherwise what `resize` asks for."""
        if isinstance(resize, tuple):
            wanted: tuple[int | None, int | None] = resize
        elif isinstance(resize, int):
            wanted = (resize, resize)
        else:
            wanted = (None, None) if resize is None else (DEFAULT_SIDE, DEFAULT_SIDE)
        target = (height or wanted[0], width or wanted[1])
        if isinstance(resize, tuple) and any(t is not None and r < t for r, t in zip(resize, target, strict=True)):
            raise UsageError(f"preprocess: resize {resize} is smaller than the model's {target}: give at least that")
        return Geometry(target, resize)

    def describe(self) -> str:
        """Say what happens to pictures of another size."""
        if None in self.target:
            return "none: the model takes any size"
        size = "{}x{}".format(*self.target)
        if self.resize is None:
            return f"to {size}"
        if isinstance(self.resize, tuple):
            first = "to {}x{}".format(*self.resize)
        elif isinstance(self.resize, int):
            first = f"short side to {self.resize}"
        else:
            first = f"until {size} keeps {self.resize:g} of the short side"
        return f"{first}, centre crop to {size}"

    def steps(self, height: int, width: int) -> Steps | None:
        """Return what a picture of this size goes through; None when it cannot become what the model takes.

        A picture that has the model's size is left alone.
        """
        high, wide = self.target
        if (height, width) == (high or height, wide or width):
            return Steps((height, width), (0, 0), (height, width))
        if high is None or wide is None:
            return None
        if isinstance(self.resize, tuple):
            new = self.resize
        elif self.resize is None:
            new = (high, wide)
        else:
            new = _scaled(height, width, (high, wide), self.resize)
        return Steps(new, (round((new[0] - high) / 2), round((new[1] - wide) / 2)), (high, wide))


def _scaled(height: int, width: int, target: Size, resize: float) -> Size:
    """Scale both sides alike, so far that the crop fits in."""
    short = min(height, width)
    cover = max(-(-target[0] * short // height), -(-target[1] * short // width))
    new = max(resize, cover) if isinstance(resize, int) else round(cover / resize)
    return new * height // short, new * width // short
