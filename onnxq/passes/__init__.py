"""Rewrites that keep what the model computes, one per file, and the guard under which they run."""

from collections.abc import Callable, Collection, Mapping

from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.hints import did_you_mean
from onnxq.passes.base import Pass, Registered, apply, difference, pass_name
from onnxq.passes.channels_first import ChannelsFirst
from onnxq.passes.drop_identity import DropIdentity
from onnxq.passes.equalize import Equalize
from onnxq.passes.fold_attention_scale import FoldAttentionScale
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fold_constants import FoldConstants
from onnxq.passes.fold_pad import FoldPad
from onnxq.passes.fold_scale import FoldScale
from onnxq.passes.fuse_activations import FuseActivations
from onnxq.passes.fuse_branches import FuseBranches
from onnxq.passes.fuse_gelu import FuseGelu
from onnxq.passes.fuse_layer_norm import FuseLayerNorm
from onnxq.passes.fuse_sequential import FuseSequential
from onnxq.passes.mean_to_pool import MeanToPool
from onnxq.passes.merge_groups import MergeGroups
from onnxq.passes.migrate import MigrateNorms
from onnxq.passes.migrate_groups import MigrateGroups
from onnxq.passes.norm_to_conv import NormToConv
from onnxq.passes.normalize_gemm import NormalizeGemm
from onnxq.passes.pool_to_conv import PoolToConv
from onnxq.passes.readings import Migration
from onnxq.passes.split_identity import SplitIdentity
from onnxq.passes.static_reshape import StaticReshape
from onnxq.passes.transpose_to_depth import TransposeToDepth

FLOOR_DB = 32.0
"""Parallel branches are fused where 8 bits hold the fused kernel this well."""


_REGISTERED: dict[str, Registered] = {}


def register_pass(name: str, function: Callable[[Model], int]) -> None:
    """Add a rewrite of one's own behind the package's, for all runs of this process.

    Args:
        name: As reports and `without` call it; replaces an earlier one of that name, but none of the package's own.
        function: Rewrites a model in place, keeps what it computes, and returns the number of rewrites; a second call
            makes none. It is checked like all others: what changes the outputs of a run is undone, with a warning.

    Raises:
        UsageError: The name is one of the package's own.
    """
    if name in PASS_NAMES:
        raise UsageError(f"the rewrite {name!r} is one of onnxq's own; take another name.")
    _REGISTERED[name] = Registered(name, function)


def rewrites(
    floor_db: float | None = FLOOR_DB, equalize: bool = False, without: Collection[str] = ()
) -> tuple[Pass, ...]:
    """The passes in their order.

    Args:
        floor_db: See `FuseBranches`.
        equalize: Equalise the channels of neighbouring layers, too: for weights with one step per tensor.
        without: Names of passes to leave out.
    """
    every: tuple[Pass, ...] = (
        FoldConstants(),
        DropIdentity(),
        ChannelsFirst(),
        DropIdentity(),
        StaticReshape(),
        FoldPad(),
        NormalizeGemm(),
        FoldBatchNorm(),
        FuseBranches(floor_db),
        FoldBatchNorm(),
        FoldScale(),
        FuseSequential(),
        FoldAttentionScale(),
        NormToConv(),
        SplitIdentity(floor_db),
        FuseLayerNorm(),
        FuseGelu(),
        FuseActivations(),
        MeanToPool(),
        PoolToConv(),
        TransposeToDepth(),
        MergeGroups(),
        *_REGISTERED.values(),
        *((Equalize(),) if equalize else ()),
    )
    return tuple(rewrite for rewrite in every if pass_name(rewrite) not in without)


def migrations(choices: Mapping[str, Migration]) -> tuple[Pass, ...]:
    """The passes that apply `choices`, by name of the activation."""
    return MigrateNorms(choices), MigrateGroups(choices)


def require_known(names: Collection[str]) -> None:
    """Refuse names that no rewrite has.

    Raises:
        UsageError: Lists the rewrites there are.
    """
    known = (*PASS_NAMES, *_REGISTERED)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"there is no rewrite {name!r}; rewrites: {', '.join(known)}.{hint}")


PASS_NAMES = tuple(dict.fromkeys(type(rewrite).__name__ for rewrite in (*rewrites(equalize=True), *migrations({}))))
"""Names of the package's rewrites."""

__all__ = [
    "FLOOR_DB",
    "PASS_NAMES",
    "ChannelsFirst",
    "DropIdentity",
    "Equalize",
    "FoldAttentionScale",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldPad",
    "FoldScale",
    "FuseActivations",
    "FuseBranches",
    "FuseGelu",
    "FuseLayerNorm",
    "FuseSequential",
    "MeanToPool",
    "MergeGroups",
    "MigrateGroups",
    "MigrateNorms",
    "NormToConv",
    "NormalizeGemm",
    "Pass",
    "PoolToConv",
    "SplitIdentity",
    "StaticReshape",
    "TransposeToDepth",
    "apply",
    "difference",
    "migrations",
    "pass_name",
    "register_pass",
    "require_known",
    "rewrites",
]
