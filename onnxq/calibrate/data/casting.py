"""Casts that lose nothing that matters; everything else is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.calibrate.data.notes import Notes
from onnxq.errors import DataError, UnsupportedError
from onnxq.types import Array, InputSpec

_NUMBERS = "biuf"


def dtype_of(spec: InputSpec) -> np.dtype[Any]:
    """Return the numpy type of an input."""
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in _NUMBERS:
        raise UnsupportedError(
            f"input {spec.name!r} takes {spec.dtype}, which data files cannot hold: "
            "export the model with float32 inputs"
        )
    return dtype


def castable(dtype: np.dtype[Any], spec: InputSpec, where: str) -> None:
    """Refuse a type that never becomes the input's: text, complex numbers, fractions for integers."""
    wanted = dtype_of(spec)
    if dtype.kind not in _NUMBERS or (dtype.kind == "f" and wanted.kind != "f"):
        raise DataError(
            f"{where}: input {spec.name!r} takes {wanted}, the array is {dtype}: save it with "
            f"array.astype({wanted.name!r}) if its values allow it"
        )


def converted(array: Array, spec: InputSpec, where: str, first_row: int, notes: Notes) -> Array:
    """Return a contiguous copy in the input's type.

    Floats may change their width and integers their type as long as every value survives; both are noted.
    Infinities and NaN are refused, because no range can be found for them.

    Args:
        array: Rows of one input.
        spec: The input.
        where: The file, for messages.
        first_row: What to add to the first index in messages.
        notes: Receives the cast.
    """
    wanted = dtype_of(spec)
    if array.dtype.kind == "f":
        what = f"{where}: input {spec.name!r} holds"
        _refuse(~np.isfinite(array), array, what, first_row, "replace or remove it")
    with np.errstate(all="ignore"):
        result = np.array(array, wanted, order="C")
        if array.dtype.newbyteorder("=") == wanted:
            return result
        lost = ~np.isfinite(result) if array.dtype.kind == "f" else result.astype(array.dtype) != array
    what = f"{where}: input {spec.name!r} takes {wanted}, which cannot hold"
    _refuse(lost, array, what, first_row, "save values that fit")
    raw = wanted.kind == "f" and array.dtype.kind in "iu"
    notes.add(f"cast {spec.name}", f"{array.dtype.name} to {wanted.name}" + (", values as stored" if raw else ""))
    return result


def _refuse(bad: Array, array: Array, what: str, first_row: int, advice: str) -> None:
    if not bad.any():
        return
    index = [int(i) for i in np.argwhere(bad)[0]]
    value = array[tuple(index)]
    if index:
        index[0] += first_row
    raise DataError(f"{what} {value} at {index}: {advice}")
