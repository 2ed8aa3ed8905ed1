"""Rewrites that keep what the model computes, one per file, and the guard under which they run."""

from onnxq.passes.base import Applied, Pass, apply, difference
from onnxq.passes.drop_identity import DropIdentity
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fold_constants import FoldConstants
from onnxq.passes.fold_pad import FoldPad
from onnxq.passes.fuse_branches import FuseBranches
from onnxq.passes.mean_to_pool import MeanToPool
from onnxq.passes.norm_to_conv import NormToConv
from onnxq.passes.normalize_gemm import NormalizeGemm

DEFAULT: tuple[Pass, ...] = (
    FoldConstants(),
    DropIdentity(),
    FoldPad(),
    NormalizeGemm(),
    FoldBatchNorm(),
    FuseBranches(floor_db=32.0),
    NormToConv(),
    MeanToPool(),
)
"""What every model goes through before it is quantized."""

__all__ = [
    "DEFAULT",
    "Applied",
    "DropIdentity",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldPad",
    "FuseBranches",
    "MeanToPool",
    "NormToConv",
    "NormalizeGemm",
    "Pass",
    "apply",
    "difference",
]
