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
from onnxq.plan import room_for_bias
from onnxq.runtime import Session, SessionConfig
from onnxq.torch_exec import extract
from onnxq.tune.job import Job, quantized, restrict
from onnxq.tune.quantizers import ActivationQuantizer, FixedCodes, WeightQuantizer
from onnxq.types import Array, Feeds, LearnedLayer, TensorGrid, Tuned, WeightGrid

MakeWeight = Callable[[Layer, WeightGrid], WeightQuantizer]

AGREEMENT = 10**-1.5
"""Noise between torch and onnxruntime, over the block's own quantization noise: 15 dB below it."""
FLOAT_NOISE = 1e-10
"""The same over the signal, where nothing is rounded."""


class SoftBlock(torch.nn.Module):
    """A block with learnable grids, codes and biases.

    Weights start at the float weights on the grids of `tuned`: codes that an earlier method learned are not looked at.

    Args:
        job: The block.
        tuned: Where grids and biases start.
        make_weight: Gives the quantizer of a layer.
        learn_grids: Learn the grids of the tensors that the block makes.
        drop: Chance that an element passes a quantizer unrounded while training.

    Raises:
        UnsupportedError: An operator of the block cannot run in torch.
    """

    def __init__(
        self, job: Job, tuned: Tuned, make_weight: MakeWeight, *, learn_grids: bool = True, drop: float = 0.0
    ) -> None:
        super().__init__()
        plan = restrict(tuned.plan, job.model)
        soft = graph.soften(quantized(job, tuned), plan.tensors)
        self._slice = extract(soft.model, job.block.inputs, job.block.outputs)
        nodes = graph.node_names(job.model)
        self.layers = {name: _layer(nodes[name]) for name in soft.weights}
        self._weight_of, self._bias_of, self._hook_of = soft.weights, soft.biases, soft.activations
        self.weights = torch.nn.ModuleDict()
        self.biases = torch.nn.ParameterDict()
        self._key = {name: f"layer_{index}" for index, name in enumerate(self.layers)}
        constants = self._slice.constants
        for name, layer in self.layers.items():
            self.weights[self._key[name]] = make_weight(layer, plan.weights[name])
            if name in soft.biases:
                self.biases[self._key[name]] = torch.nn.Parameter(constants[soft.biases[name]].clone())
        cut = _behind_activations(job.model)
        free = _free_tensors(job, plan.tensors, tuned) if learn_grids else set()
        self._grid_key = {name: f"tensor_{index}" for index, name in enumerate(soft.activations)}
        self.grids = torch.nn.ModuleDict(
            {
                key: ActivationQuantizer(plan.tensors[name], learn=name in free, drop=drop, cuts=name in cut)
                for name, key in self._grid_key.items()
            }
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
        bias = self.biases[self._key[name]]
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
            bias = self.biases[self._key[name]].detach().cpu().numpy().copy() if name in self._bias_of else None
            scale = tensors[graph.name_of(layer.data)].scale
            weights[name] = _roomy(grid, bias, scale)
            layers[name] = LearnedLayer(codes, bias)
        return Tuned(replace(plan, tensors=tensors, weights=weights), layers)


def _layer(node: graph.Node) -> Layer:
    layer = graph.layer_of(node)
    assert isinstance(layer, Layer), layer
    return layer


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


@torch.no_grad()
def agrees(job: Job, tuned: Tuned) -> bool:
    """Whether torch computes the quantized block as onnxruntime does; where it does not, nothing can be learned.

    On the first training batch, an output may differ by noise 15 dB below the block's own quantization noise, or by
    as much as rounding it to its grid costs (step^2 / 12): ties fall differently where sums run in another order.
    False as well where an operator of the block cannot run in torch.
    """

    def fixed(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
        known = tuned.layers.get(str(layer.node.name))
        return FixedCodes(known.codes if known is not None else weight_codes(layer, grid), grid)

    try:
        block = SoftBlock(job, tuned, fixed, learn_grids=False).eval()
    except UnsupportedError:
        return False
    batch = job.train[0]
    expected = Session(quantized(job, tuned), SessionConfig(stop_spinning=True)).run(job.feeds[batch])
    found = block(as_tensors(job.feeds[batch], torch.device("cpu")))
    targets, grids = job.targets[batch], tuned.plan.tensors
    return all(_near(found[name].numpy(), expected[name], targets[name], grids.get(name)) for name in targets)


def _near(found: Array, expected: Array, target: Array, grid: TensorGrid | None) -> bool:
    if found.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    wanted = expected.astype(np.float64)
    allowed = max(AGREEMENT * _power(wanted - target), FLOAT_NOISE * _power(wanted))
    if grid is not None:
        allowed = max(allowed, grid.scale**2 / 12)
    return _power(found - wanted) <= allowed  # False for NaN, too


def _power(values: npt.NDArray[np.float64]) -> float:
    return float(np.mean(np.square(values))) if values.size else 0.0
