"""Image files as rows of a model's input."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxq.calibrate.data.casting import dtype_of
from onnxq.calibrate.data.files import DataFile, require_regular
from onnxq.calibrate.data.fit import example
from onnxq.calibrate.data.geometry import Geometry
from onnxq.calibrate.data.notes import Notes
from onnxq.calibrate.data.preprocess import Channels, Layout, Preprocess
from onnxq.errors import DataError, EnvironmentFault, UsageError
from onnxq.types import Array, InputSpec

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485
"""Pictures with more pixels are refused unread: Pillow's limit against decompression bombs."""

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


@dataclass(frozen=True)
class PicturePlan:
    """What becomes of a picture.

    Attributes:
        spec: The input it is for.
        batched: The input has a row axis before the picture's three.
        layout: Where the channel axis is.
        channels: Their number and order.
        geometry: Resizing and cropping.
        preprocess: Scale, mean, deviation, filter.
    """

    spec: InputSpec
    batched: bool
    layout: Layout
    channels: Channels
    geometry: Geometry
    preprocess: Preprocess

    @property
    def raw(self) -> bool:
        """The model takes the pixels as they are."""
        return self.spec.dtype == "uint8"

    def describe(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        return {
            "layout": self.layout,
            "channels": self.channels,
            "size": list(self.geometry.target),
            "resizing": self.geometry.describe(),
            "preprocess": {"resample": self.preprocess.resample} if self.raw else self.preprocess.describe(),
        }

    def read(self, file: DataFile, notes: Notes) -> Array:
        """Return the picture as the model takes it, without a row axis."""
        image = _decode(file.path, file.shown, "L" if self.channels == "gray" else "RGB")
        pixels = np.asarray(self._sized(image, file.shown, notes))
        if self.channels == "gray":
            pixels = pixels[:, :, None]
        elif self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        values = pixels if self.raw else self._normalised(pixels)
        if self.layout == "NCHW":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values, dtype_of(self.spec))

    def _sized(self, image: Image, where: str, notes: Notes) -> Image:
        from PIL import Image as Pillow

        own = f"{where} is {image.height}x{image.width} pixels"
        steps = self.geometry.steps(image.height, image.width)
        if steps is None:
            wanted = "x".join(str(side or "?") for side in self.geometry.target)
            raise DataError(f"{own}, the model takes {wanted}: give a size to resize to")
        height, width = steps.resized
        if height * width > MAX_PIXELS:
            raise DataError(f"{own}, too long and narrow to be cropped: remove it")
        if steps.resized != (image.height, image.width):
            if self.geometry.resize is None:
                notes.add("resized", f"pictures of another size became {height}x{width}, whatever their proportions")
            image = image.resize((width, height), Pillow.Resampling[self.preprocess.resample.upper()])
        if steps.size != steps.resized:
            top, left = steps.corner
            image = image.crop((left, top, left + steps.size[1], top + steps.size[0]))
        return image

    def _normalised(self, pixels: Array) -> Array:
        values = pixels.astype(np.float32) * np.float32(self.preprocess.scale)
        if self.preprocess.mean is not None:
            values -= np.array(self.preprocess.mean, np.float32)
        if self.preprocess.std is not None:
            values /= np.array(self.preprocess.std, np.float32)
        return values


def plan_pictures(
    inputs: tuple[InputSpec, ...], preprocess: Preprocess | None, where: str, notes: Notes
) -> PicturePlan:
    """Deduce from the model's only input how pictures are fed to it."""
    if len(inputs) != 1:
        raise DataError(
            f"{where} holds images, but the model takes {len(inputs)} inputs: give .npz files, "
            f"{example(inputs, 'calibration/000.npz')}"
        )
    spec = inputs[0]
    dtype = dtype_of(spec)
    if spec.rank not in (3, 4) or not (dtype.kind == "f" or dtype == np.uint8):
        raise DataError(
            f"{where} holds images, but the model takes {spec}: give .npz files, "
            f"{example(inputs, 'calibration/000.npz')}"
        )
    given = preprocess or Preprocess()
    layout = _layout(spec, given)
    high, wide, depth = (-2, -1, -3) if layout == "NCHW" else (-3, -2, -1)
    channels = _channels(spec, spec.shape[depth], given)
    _check_lengths(given, 1 if channels == "gray" else 3)
    _note_normalisation(dtype.kind == "f", preprocess, notes)
    geometry = Geometry.of(_fixed(spec.shape[high]), _fixed(spec.shape[wide]), given.resize)
    return PicturePlan(spec, spec.rank == 4, layout, channels, geometry, given)


def _layout(spec: InputSpec, given: Preprocess) -> Layout:
    if given.layout:
        return given.layout
    first, last = spec.shape[-3], spec.shape[-1]
    if first in (1, 3):
        return "NCHW"
    if last in (1, 3):
        return "NHWC"
    if isinstance(first, int) == isinstance(last, int):
        raise DataError(
            f"images have 1 or 3 channels, and no axis of the model's input {spec} says where they go: "
            "give the preprocessing a layout (NCHW or NHWC), or give .npz files"
        )
    return "NHWC" if isinstance(first, int) else "NCHW"


def _channels(spec: InputSpec, count: int | str | None, given: Preprocess) -> Channels:
    """Settle the channels: 1 is grey, 3 and any number are RGB unless something else is asked for."""
    if count not in (1, 3) and isinstance(count, int):
        raise DataError(f"images have 1 or 3 channels, the model's input {spec} has {count}: give .npz files")
    channels = given.channels or ("gray" if count == 1 else "rgb")
    if isinstance(count, int) and (count == 1) != (channels == "gray"):
        raise UsageError(f"preprocess: channels {channels!r} contradicts the model's input {spec}")
    return channels


def _check_lengths(given: Preprocess, channels: int) -> None:
    for name, values in (("mean", given.mean), ("std", given.std)):
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"preprocess: {name} has {len(values)} numbers, the model's input {channels} channel")


def _note_normalisation(floating: bool, preprocess: Preprocess | None, notes: Notes) -> None:
    if not floating:
        notes.add("normalisation", "none: the model takes uint8 pixels")
    elif preprocess is None:
        notes.add("normalisation", "none given: pixels / 255")


def _fixed(dim: int | str | None) -> int | None:
    return dim if isinstance(dim, int) else None


def _decode(path: Path, where: str, mode: str) -> Image:
    """Open one picture upright in one mode; formats that calibration never needs are not even tried."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    require_regular(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            with Pillow.open(path, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Pillow.DecompressionBombError("too many pixels")
                return _plain(ImageOps.exif_transpose(image), mode)
    except (PermissionError, MemoryError) as error:
        lack = "permission" if isinstance(error, PermissionError) else "memory"
        raise EnvironmentFault(f"{where}: not enough {lack} to read it") from error
    except (Pillow.DecompressionBombWarning, Pillow.DecompressionBombError) as error:
        raise DataError(f"{where} has more than {MAX_PIXELS} pixels: make it smaller or remove it") from error
    except Exception as error:  # a decoder may raise anything on a broken file
        raise DataError(f"{where} is no readable JPEG, PNG, BMP or WebP image: replace or remove it") from error


def _plain(image: Image, mode: str) -> Image:
    """Return 8-bit grey or RGB; transparency is dropped and 16-bit grey keeps its high byte."""
    from PIL import Image as Pillow

    if image.mode.startswith("I"):
        image = Pillow.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)
