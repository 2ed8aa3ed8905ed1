"""Mean and spread of every layer's result, put back to what they are in the float network; no gradients.

For output channel c of a layer, before its activation, over the calibration rows: float mu, sd; quantized mu_q, sd_q,
with everything in front of the layer quantized and tuned already. Then

    k = sd / sd_q        weight step' = k * weight step        bias' = k * (bias - mu_q) + mu

with k between 1/2 and 2. The codes stay as they are. Layers are matched one after the other, each with all in front of
it matched already. Only the mean is moved (k = 1) where the weight has a single step, where fewer than `FEWEST` values
per channel make the spread uncertain (a classifier sees one vector per row), and for dead channels. A MatMul without a
bias is left alone, as nothing could hold one.

Below 8 bits this matters most: ranges chosen for least squared error shrink the spread a
little in every layer, and depth multiplies it.

I. Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", arXiv
2006.10518, section 3.4 (batch-norm tuning), here with measured moments, so that no BatchNormalization is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit import weight_codes
from onnxq.graph import Layer
from onnxq.plan import room_for_bias
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.job import Job, quantized
from onnxq.types import LearnedLayer, Tuned

SIMULATED = SessionConfig(stop_spinning=True, simulate=True)
FEWEST = 2000
"""Values per channel below which a spread is not trusted, and only the mean is moved."""
LIMITS = (0.5, 2.0)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation per channel of some tensors; shape [channels] each, float64."""

    count: int
    mean: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64]


@dataclass(frozen=True)
class TuneMoments:
    """Match the mean and the spread of each layer's result to the float network's.

    Attributes:
        spread: Match the spread, too, not only the mean.
        judged: Drop the result where the block gets worse.
    """

    spread: bool = True
    judged: bool = False

    @property
    def name(self) -> str:
        """As reports call it."""
        return "moments" if self.spread else "bias correction"

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with new steps and biases for the block's layers; codes stay."""
        nodes = graph.node_names(job.model)
        layers = {}
        for name in job.block.layers:
            layer = graph.layer_of(nodes[name]) if name in tuned.plan.weights else ""
            if isinstance(layer, Layer) and (layer.node.op_type != "MatMul" or layer.bias_add is not None):
                layers[name] = layer
        if not layers:
            return tuned
        wanted = _float_moments(job, list(layers.values()))
        for name, layer in layers.items():
            tuned = self._match(job, tuned, layer, wanted[name])
        return tuned

    def _match(self, job: Job, tuned: Tuned, layer: Layer, wanted: Moments) -> Tuned:
        name = str(layer.node.name)
        found = _quantized_moments(job, tuned, layer)
        grid = tuned.plan.weights[name]
        known = tuned.layers.get(name)
        codes = known.codes if known is not None else weight_codes(layer, grid)
        bias = known.bias if known is not None and known.bias is not None else layer.bias
        if bias is None:
            bias = np.zeros(layer.channels, np.float32)
        scale = tuned.plan.tensors[graph.name_of(layer.data)].scale
        units = scale * np.asarray(grid.scales)  # of the int32 bias that `found` was measured with
        emitted = np.rint(bias / units) * units
        factors = np.ones(layer.channels)
        if self.spread and grid.axis is not None and min(found.count, wanted.count) >= FEWEST:
            alive = (found.spread > 1e-6 * found.spread.max()) & (wanted.spread > 0)
            factors[alive] = np.clip(wanted.spread[alive] / found.spread[alive], *LIMITS)
        moved = (factors * (emitted - found.mean) + wanted.mean).astype(np.float32)
        if not np.isfinite(moved).all():
            return tuned
        steps = np.asarray(grid.scales) * (factors if grid.axis is not None else 1.0)
        room = moved if grid.axis is not None else np.abs(moved).max(keepdims=True)
        roomy = room_for_bias(steps.astype(np.float32), room, scale)
        plan = replace(tuned.plan, weights={**tuned.plan.weights, name: replace(grid, scales=tuple(map(float, roomy)))})
        return Tuned(plan, {**tuned.layers, name: LearnedLayer(codes, moved)})


def _float_moments(job: Job, layers: Sequence[Layer]) -> dict[str, Moments]:
    results = {str(layer.node.name): graph.name_of(layer.output) for layer in layers}
    session = Session(graph.with_outputs(job.model, list(results.values()), keep=False), SIMULATED)
    sums = {name: _Sums(_channel_axis(layer)) for name, layer in zip(results, layers, strict=True)}
    for batch in job.train:
        found = session.run(job.floats[batch])
        for name, tensor in results.items():
            sums[name].add(found[tensor])
    return {name: total.moments() for name, total in sums.items()}


def _quantized_moments(job: Job, tuned: Tuned, layer: Layer) -> Moments:
    model = quantized(job, tuned)
    holder = graph.node_names(model)[str((layer.bias_add or layer.node).name)]
    result = graph.name_of(holder.outputs[0])  # a quantized output of the block carries its name behind its rounding
    session = Session(graph.with_outputs(model, [result], keep=False), SIMULATED)
    needed = {spec.name for spec in session.inputs}
    total = _Sums(_channel_axis(layer))
    for batch in job.train:
        feeds = {name: value for name, value in job.feeds[batch].items() if name in needed}
        total.add(session.run(feeds)[result])
    return total.moments()


def _channel_axis(layer: Layer) -> int:
    return 1 if layer.node.op_type in ("Conv", "ConvTranspose") else -1


class _Sums:
    """Running sums per channel, shifted by the first batch's mean so that nothing cancels."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._shift: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, values: npt.NDArray[np.float32]) -> None:
        rows = np.moveaxis(values, self._axis, 0).reshape(values.shape[self._axis], -1).astype(np.float64)
        if self._shift is None:
            self._shift = rows.mean(axis=1)
            self._sum = np.zeros(len(rows))
            self._squares = np.zeros(len(rows))
        rows -= self._shift[:, None]
        self._count += rows.shape[1]
        self._sum += rows.sum(axis=1)
        self._squares += np.square(rows).sum(axis=1)

    def moments(self) -> Moments:
        assert self._shift is not None
        mean = self._sum / self._count
        variance = np.maximum(self._squares / self._count - mean**2, 0.0)
        return Moments(self._count, self._shift + mean, np.sqrt(variance))
