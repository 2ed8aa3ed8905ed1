"""Rewrites that keep what the model computes, one per file, and the guard under which they run."""

from onnxq.passes.base import Pass, apply, difference
from onnxq.passes.drop_identity import DropIdentity
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fold_constants import FoldConstants
from onnxq.passes.fold_pad import FoldPad
from onnxq.passes.fuse_branches import FuseBranches
from onnxq.passes.mean_to_pool import MeanToPool
from onnxq.passes.norm_to_conv import NormToConv
from onnxq.passes.normalize_gemm import NormalizeGemm

FLOOR_DB = 32.0
"""Parallel branches are fused where 8 bits hold the fused kernel this well."""


def rewrites(floor_db: float | None = FLOOR_DB, equalize: bool = False) -> tuple[Pass, ...]:
    """The passes in their order.

    Args:
        floor_db: See `FuseBranches`.
        equalize: Equalise the channels of neighbouring layers, too.
    """
    return (
        FoldConstants(),
        DropIdentity(),
        FoldPad(),
        NormalizeGemm(),
        FoldBatchNorm(),
        FuseBranches(floor_db),
        NormToConv(),
        MeanToPool(),
    )


DEFAULT = rewrites()
"""What every model goes through before it is quantized."""

__all__ = [
    "DEFAULT",
    "FLOOR_DB",
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
    "rewrites",
]
