"""The program of the child process: onnxsim on one file. It is started by path and imports nothing of onnxq.

Usage: child.py SOURCE DESTINATION
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

SKIPPED = [
    "fuse_matmul_add_bias_into_gemm",  # MatMul + Add is what the integer kernels want, in any rank
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_attention",
    "fuse_rms_norm",
    "fuse_bn_into_conv",  # our own pass does it in float64, says why it declines, and is checked on data
    "fuse_transpose_into_gemm",  # no integer kernel takes a transposed first operand
]
"""Optimizers that do not serve quantization."""
LARGEST_FOLDED = "64MB"
"""Constants above this are left to be computed at run time."""
SINGLE_FILE_LIMIT = 1_900_000_000


def simplify(source: Path, destination: Path) -> None:
    """Write the simplified form of `source` to `destination`."""
    os.environ["ONNXSIM_CERTIFY"] = "0"
    import onnx

    onnxsim = _onnxsim()
    simplified, _ = onnxsim.simplify(str(source), skipped_optimizers=SKIPPED, tensor_size_threshold=LARGEST_FOLDED)
    if simplified.ByteSize() > SINGLE_FILE_LIMIT:
        onnx.save(simplified, destination, save_as_external_data=True, location=f"{destination.name}.data")
    else:
        onnx.save(simplified, destination)


def _onnxsim() -> Any:
    """The module, without what it imports where that is installed but does without: seconds for what nobody uses."""
    for optional in ("torch", "sympy", "rich"):
        sys.modules[optional] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("onnxsim")
    except ImportError:  # before 0.5 it does not do without rich
        del sys.modules["rich"]
        return importlib.import_module("onnxsim")


if __name__ == "__main__":
    simplify(Path(sys.argv[1]), Path(sys.argv[2]))
