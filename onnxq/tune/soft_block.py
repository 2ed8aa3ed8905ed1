"""A block in torch, with fake quantizers exactly where the emitted graph rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnxq import graph
from onnxq.emit import weight_codes
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer
from onnxq.grid import Grid
from onnxq.plan import room_for_bias
from onnxq.runtime import Session, SessionConfig
from onnxq.torch_exec import extract
from onnxq.tune.job import Job, quantized, restrict
from onnxq.tune.quantizers import ActivationQuantizer, FixedCodes, RoundingBorder, WeightQuantizer
from onnxq.types import Array, Feeds, LearnedLayer, TensorGrid, Tuned, WeightGrid

MakeWeight = Callable[[Layer, WeightGrid], WeightQuantizer]

AGREEMENT = 10**-1.5
"""Noise between torch and onnxruntime, over the block's own quantization noise: 15 dB below it."""
FLOAT_NOISE = 1e-10
"""The same over the signal, where nothing is rounded."""


class SoftBlock(torch.nn.Module):
    """A block with learnable grids, codes and biases.

    Weights start at the float weights on the grids of `tuned`: codes that an earlier method learned are not looked at.
    A Conv without a bias learns one, too, from zero; a MatMul without an Add behind it has no place for one.

    Args:
        job: The block.
        tuned: Where grids and biases start.
        make_weight: Gives the quantizer of a layer.
        learn_grids: Learn the grids of the tensors that the block makes.
        drop: Chance that an element passes a quantizer unrounded while training.
        borders: Rounding borders to learn, by tensor; those of the plan stay as they are.

    Attributes:
        layers: The block's quantized layers by node name.
        weights: Their quantizers.
        biases: Their biases; each is kept as its distance from a constant, which is 0 where the bias starts at
            anything but 0. Methods learn biases in units of their magnitude, and one that starts at 0 has none: it is
            kept as if it started at the layer's largest product of an input and a weight.
        grids: The quantizers of the tensors.

    Raises:
        UnsupportedError: An operator of the block cannot run in torch.
        ValueError: The emitted block rounds something that is not in the plan.
    """

    def __init__(
        self,
        job: Job,
        tuned: Tuned,
        make_weight: MakeWeight,
        *,
        learn_grids: bool = True,
        drop: float = 0.0,
        borders: Mapping[str, RoundingBorder] | None = None,
    ) -> None:
        super().__init__()
        plan = restrict(tuned.plan, job.model)
        nodes = graph.node_names(job.model)
        layers = {name: _layer(nodes[name]) for name in plan.weights}
        soft = graph.soften(quantized(job, _with_biases(tuned, layers, plan.weights)), plan.tensors)
        self._slice = extract(soft.model, job.block.inputs, job.block.outputs)
        self.layers = {name: layers[name] for name in soft.weights}
        self._weight_of, self._bias_of, self._hook_of = soft.weights, soft.biases, soft.activations
        self.weights = torch.nn.ModuleDict()
        self.grids = torch.nn.ModuleDict()
        self.biases = torch.nn.ParameterDict()
        self._origins: dict[str, float] = {}
        self._key = {name: f"layer_{index}" for index, name in enumerate(self.layers)}
        constants = self._slice.constants
        for name, layer in self.layers.items():
            self.weights[self._key[name]] = make_weight(layer, plan.weights[name])
            if name in soft.biases:
                bias = constants[soft.biases[name]]
                data = plan.tensors[graph.name_of(layer.data)]
                self._origins[name] = 0.0 if bias.any() else _largest_product(data, plan.weights[name])
                self.biases[self._key[name]] = torch.nn.Parameter(bias + self._origins[name])
        cut = _behind_activations(job.model)
        free = _free_tensors(job, plan.tensors, tuned) if learn_grids else set()
        known = {name: RoundingBorder.fixed(border) for name, border in plan.borders.items()} | dict(borders or {})
        self._grid_key = {name: f"tensor_{index}" for index, name in enumerate(soft.activations)}
        for name, key in self._grid_key.items():
            self.grids[key] = ActivationQuantizer(
                plan.tensors[name], learn=name in free, drop=drop, cuts=name in cut, border=known.get(name)
            )

    def quantizers(self) -> list[WeightQuantizer]:
        """Of all weights."""
        return [module for module in self.weights.values() if isinstance(module, WeightQuantizer)]

    def activations(self) -> list[ActivationQuantizer]:
        """Of all tensors."""
        return [module for module in self.grids.values() if isinstance(module, ActivationQuantizer)]

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's outputs by name."""
        constants = {self._weight_of[name]: self.weights[key]() for name, key in self._key.items()}
        constants.update((value, self._bias(name)) for name, value in self._bias_of.items())
        hooks = {self._hook_of[name]: self.grids[key] for name, key in self._grid_key.items()}
        found: dict[str, Tensor] = self._slice(feeds, replace=hooks, constants=constants)
        return found

    def _bias(self, name: str) -> Tensor:
        """The bias of a layer, rounded to int32 like the emitted one; the gradient passes straight through."""
        bias = self.biases[self._key[name]] - self._origins[name]
        grid, weight = self.grids[self._grid_key[graph.name_of(self.layers[name].data)]], self.weights[self._key[name]]
        assert isinstance(grid, ActivationQuantizer)
        assert isinstance(weight, WeightQuantizer)
        with torch.no_grad():
            steps = grid.step() * weight.learned_steps()
            rounded = torch.round(bias.double() / steps.double()).float() * steps
        result: Tensor = bias + (rounded - bias).detach()
        return result

    @torch.no_grad()
    def found(self, tuned: Tuned) -> Tuned:
        """`tuned` with what was learned."""
        plan = tuned.plan
        tensors, weights, layers = dict(plan.tensors), dict(plan.weights), dict(tuned.layers)
        for name, key in self._grid_key.items():
            quantizer = self.grids[key]
            assert isinstance(quantizer, ActivationQuantizer)
            tensors[name] = quantizer.found()
        for name, layer in self.layers.items():
            quantizer = self.weights[self._key[name]]
            assert isinstance(quantizer, WeightQuantizer)
            codes, grid = quantizer.found()
            bias = self._found_bias(name) if name in self._bias_of else None
            scale = tensors[graph.name_of(layer.data)].scale
            weights[name] = _roomy(grid, bias, scale)
            layers[name] = LearnedLayer(codes, bias)
        return Tuned(replace(plan, tensors=tensors, weights=weights), layers)

    def _found_bias(self, name: str) -> npt.NDArray[np.float32] | None:
        """The bias of a layer; None for one that was added here and stayed zero."""
        bias: npt.NDArray[np.float32] = (self.biases[self._key[name]] - self._origins[name]).cpu().numpy().copy()
        return bias if self.layers[name].bias is not None or bias.any() else None


def _layer(node: graph.Node) -> Layer:
    layer = graph.layer_of(node)
    assert isinstance(layer, Layer), layer
    return layer


def _with_biases(tuned: Tuned, layers: Mapping[str, Layer], grids: Mapping[str, WeightGrid]) -> Tuned:
    """`tuned` with a bias of zeros for each Conv that has none; emission gives one to every Gemm."""
    added = {}
    for name, layer in layers.items():
        known = tuned.layers.get(name)
        if layer.node.op_type == "Conv" and layer.bias is None and (known is None or known.bias is None):
            codes = known.codes if known is not None else weight_codes(layer, grids[name])
            added[name] = LearnedLayer(codes, np.zeros(layer.channels, np.float32))
    return replace(tuned, layers={**tuned.layers, **added})


def _largest_product(data: TensorGrid, weight: WeightGrid) -> float:
    """The largest magnitude of an input times that of a weight."""
    codes = Grid(data.bits, data.signed, symmetric=False)
    reach = data.scale * max(data.zero_point - codes.qmin, codes.qmax - data.zero_point)
    return reach * float(np.mean(weight.scales)) * float(np.mean(weight.ends()[1]))


def _roomy(grid: WeightGrid, bias: np.ndarray | None, scale: float) -> WeightGrid:
    """Steps large enough for an int32 bias."""
    if bias is None:
        return grid
    largest = bias if grid.axis is not None else np.abs(bias).max(keepdims=True)
    steps = room_for_bias(np.asarray(grid.scales, np.float32), largest, scale)
    return replace(grid, scales=tuple(map(float, steps)))


def _free_tensors(job: Job, tensors: Mapping[str, TensorGrid], tuned: Tuned) -> set[str]:
    """Tensors whose grid the block may change: those that it makes and that share their grid with no other."""
    shared: dict[tuple[float, int], int] = {}
    for grid in tuned.plan.tensors.values():
        shared[grid.scale, grid.zero_point] = shared.get((grid.scale, grid.zero_point), 0) + 1
    return {
        name
        for name, grid in tensors.items()
        if name not in job.block.inputs and shared[grid.scale, grid.zero_point] == 1
    }


def _behind_activations(model: graph.Model) -> set[str]:
    """Results of activations that an integer kernel may leave to its grid."""
    return {graph.name_of(node.outputs[0]) for node in graph.nodes(model, "Relu", "Clip")}


def as_tensors(feeds: Feeds, device: torch.device) -> dict[str, Tensor]:
    """Copies of arrays on `device`."""
    return {name: torch.tensor(value, device=device) for name, value in feeds.items()}


def learned_codes(tuned: Tuned, *, learn_steps: bool = False) -> MakeWeight:
    """Makes weights that stay at the codes of `tuned`: the learned ones, or those of plain rounding.

    Args:
        tuned: Where the codes are.
        learn_steps: Whether the steps may move.
    """

    def fixed(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
        known = tuned.layers.get(str(layer.node.name))
        codes = known.codes if known is not None else weight_codes(layer, grid)
        return FixedCodes(codes, grid, learn_steps=learn_steps)

    return fixed


@torch.no_grad()
def require_agreement(job: Job, tuned: Tuned, *, tolerance: float = AGREEMENT) -> None:
    """Refuse a block that torch does not compute as onnxruntime does: nothing could be learned there.

    On the first training batch, an output may differ by noise of `tolerance` times the block's own quantization
    noise, or by as much as rounding it to its grid costs (step^2 / 12): ties fall differently where sums run in
    another order.

    Args:
        job: The block.
        tuned: Its grids, codes and biases.
        tolerance: Noise power between torch and onnxruntime, over that of the quantization.

    Raises:
        UnsupportedError: The block cannot run in torch, or gives something else; the message says what.
    """
    batch = job.train[0]
    try:
        block = SoftBlock(job, tuned, learned_codes(tuned), learn_grids=False).eval()
        found = block(as_tensors(job.feeds[batch], torch.device("cpu")))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedError(f"torch cannot run it: {' '.join(str(error).split())[:300]}") from error
    expected = Session(quantized(job, tuned), SessionConfig(stop_spinning=True)).run(job.feeds[batch])
    targets, grids = job.targets[batch], tuned.plan.tensors
    for name, target in targets.items():
        if not _near(found[name].numpy(), expected[name], target, grids.get(name), tolerance):
            raise UnsupportedError(f"torch computes another {name} than onnxruntime")


def _near(found: Array, expected: Array, target: Array, grid: TensorGrid | None, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    wanted = expected.astype(np.float64)
    allowed = max(tolerance * _power(wanted - target), FLOAT_NOISE * _power(wanted))
    if grid is not None:
        allowed = max(allowed, grid.scale**2 / 12)
    return _power(found - wanted) <= allowed  # False for NaN, too


def _power(values: npt.NDArray[np.float64]) -> float:
    return float(np.mean(np.square(values))) if values.size else 0.0
