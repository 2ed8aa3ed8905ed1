"""Which weights of a model will be quantized, as the inference graph will hold them.

A BatchNormalization behind a layer is folded into its weight when the model is quantized: what counts is

    W' = W * gamma / sqrt(running variance + epsilon)        per output channel

and that is the weight whose range is looked at. The gradient reaches W and gamma; running statistics are constants.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from onnxq.errors import UsageError

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RangedWeight(Protocol):
    """One weight whose range matters."""

    @property
    def name(self) -> str:
        """Of its layer."""
        ...

    @property
    def axis(self) -> int:
        """The kept (output channel) axis."""
        ...

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads a single input channel."""
        ...

    def read(self) -> Tensor:
        """The weight as the inference graph will hold it, with its gradient."""
        ...


@runtime_checkable
class HasRangedWeights(Protocol):
    """A module that knows its weights itself."""

    def ranged_weights(self) -> list[RangedWeight]:
        """All weights that will be quantized, in the order in which they run."""
        ...


@dataclass(frozen=True)
class ModuleWeight:
    """The weight of a torch layer, with the BatchNorm behind it folded in.

    Attributes:
        name: Path of the layer in its model.
        layer: A linear or (transposed) convolution layer.
        norm: The BatchNorm that alone reads the layer's result; None where there is none.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None

    @property
    def axis(self) -> int:
        """The output channel axis; a grouped transposed convolution keeps the channels of one group there."""
        return 1 if isinstance(self.layer, _TRANSPOSED) else 0

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads a single input channel."""
        return getattr(self.layer, "groups", 1) == getattr(self.layer, "in_channels", 0) > 1

    def read(self) -> Tensor:
        """The folded weight."""
        weight = cast(Tensor, self.layer.weight)
        if self.norm is None:
            return weight
        variance = cast(Tensor, self.norm.running_var).detach()
        factor = torch.rsqrt(variance + cast(float, self.norm.eps))
        if self.norm.weight is not None:
            factor = factor * cast(Tensor, self.norm.weight)
        groups = cast(int, getattr(self.layer, "groups", 1))
        if self.axis == 1 and groups > 1:  # [in, out / groups, ...]: every group of inputs has its own factors
            parts = weight.reshape(groups, -1, *weight.shape[1:])
            factors = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            return (parts * factors).reshape(weight.shape)
        return weight * factor.reshape([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])


def weights_of(model: nn.Module, fold: Mapping[str, str] | bool = True) -> list[RangedWeight]:
    """The weights of linear and convolution layers of `model`, in the order of its modules.

    Args:
        model: Any module; one with a method `ranged_weights` is asked itself.
        fold: Path of a layer -> path of the BatchNorm behind it. True finds these pairs with `torch.fx`; where the
            model cannot be traced, a warning says that none was found. False folds nothing.

    Raises:
        UsageError: `model` has no such weights, or `fold` names modules that it does not have or that do not fit.
    """
    if isinstance(model, HasRangedWeights):
        found = model.ranged_weights()
    else:
        modules = dict(model.named_modules())
        pairs = _traced_pairs(model) if fold is True else fold or {}
        _require_pairs(pairs, modules)
        layers = {name: layer for name, layer in modules.items() if isinstance(layer, _LINEAR + _TRANSPOSED)}
        found = [
            ModuleWeight(name, layer, modules[pairs[name]] if name in pairs else None) for name, layer in layers.items()
        ]
    if not found:
        raise UsageError("the model has no linear or convolution layer whose range could be regularised")
    return found


def _require_pairs(pairs: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
    for name, norm in pairs.items():
        if not isinstance(modules.get(name), _LINEAR + _TRANSPOSED) or not _foldable(modules.get(norm)):
            raise UsageError(f"fold: {name!r} is no layer or {norm!r} is no BatchNorm with running statistics")


def _foldable(module: object) -> bool:
    return isinstance(module, _NORMS) and module.running_var is not None


def _traced_pairs(model: nn.Module) -> dict[str, str]:
    """Layers whose result goes into a BatchNorm and nowhere else, by the BatchNorm's path."""
    modules = dict(model.named_modules())
    if not any(_foldable(module) for module in modules.values()):
        return {}
    try:
        traced = torch.fx.symbolic_trace(model).graph
    except Exception as error:
        warnings.warn(
            f"no BatchNorm is folded, because torch.fx cannot trace the model ({type(error).__name__}: {error}); "
            "name the pairs with fold={'layer': 'norm'}",
            stacklevel=4,
        )
        return {}
    calls: dict[str, int] = {}
    for node in traced.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    pairs = {}
    for node in traced.nodes:
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or {node.op, reader.op} != {"call_module"}:
            continue
        layer, norm = str(node.target), str(reader.target)
        fits = isinstance(modules.get(layer), _LINEAR + _TRANSPOSED) and _foldable(modules.get(norm))
        if fits and calls[layer] == calls[norm] == 1:
            pairs[layer] = norm
    return pairs
