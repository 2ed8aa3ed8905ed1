"""ONNX element types and numpy arrays in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "float16": torch.float16,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}
"""Names of numpy's element types -> torch's. Torch computes with no others on every device."""

ELEMENT_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX's codes of element types (TensorProto.DataType) -> torch's."""


def from_numpy(array: npt.NDArray[Any]) -> Tensor:
    """A tensor of its own memory with the values of `array`.

    Raises:
        KeyError: Its element type is none of `DTYPES`.
    """
    dtype = DTYPES[array.dtype.name]
    if dtype is torch.bfloat16:
        return torch.from_numpy(np.array(array.view(np.int16))).view(dtype)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The values of `tensor` on the host, without its history; bfloat16 as float32, which holds them exactly."""
    plain = tensor.detach().cpu()
    array: npt.NDArray[Any] = (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()
    return array
