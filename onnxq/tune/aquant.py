"""AQuant: learn from which fraction on an activation is rounded up.

    code = clip(floor(u + 1 - B_c(u))),    u the value in codes, B = 1/2 at the start

with a border B per channel that is constant, affine or quadratic in u (`onnxq.tune.quantizers.RoundingBorder`), learned
on what the quantized network in front makes.

A constant or affine border is a shift and a scaling in front of ordinary rounding. With m = (B(1) - B(0)) / (n - 1) for
n codes from qmin on,

    round(x / s + 1/2 - B(t)) = round(x' / s),    x' = (1 - m) x + s (1/2 - B(0) - m (z - qmin))

so a layer that makes x absorbs it: weight step' = (1 - m) step, bias' = (1 - m) bias + s (...), codes unchanged. A Relu
between does no harm: at and below 0 both sides give the code of 0, as B stays off 0 and 1. Per-channel steps and biases
that other methods learn can hold any such border already: what it gives on top of them is what a longer or better
search would give. For the same reason, matching means and spreads (`onnxq.tune.moments`) behind it takes it back
exactly; it belongs in front. Only a curved border is something new: it is kept in the plan, runs in float operators,
and is a simulation.

"AQuant", arXiv 2208.11945. There is no public code; the form of the border, the gradients and the rule by which tensors
are kept are this module's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit import weight_codes
from onnxq.errors import UsageError
from onnxq.graph import Layer, Model, Value
from onnxq.grid import Grid
from onnxq.plan import room_for_bias
from onnxq.tune.adaround import AdaRound, Rounding
from onnxq.tune.job import Job, block_error
from onnxq.tune.learn import Rates, learn, look_ahead
from onnxq.tune.losses import squared
from onnxq.tune.moments import TuneMoments
from onnxq.tune.quantizers import RoundingBorder, WeightQuantizer
from onnxq.tune.soft_block import MakeWeight, SoftBlock, learned_codes, require_agreement
from onnxq.types import Border, LearnedLayer, QuantPlan, TensorGrid, Tuned, WeightGrid

WEIGHTS = ("first", "joint", "keep")
SLACK = 0.04
"""Codes by which the end of a Clip may lie inside the grid: less than any border leaves."""


@dataclass(frozen=True)
class AQuant:
    """Learned rounding borders of the tensors that a block makes.

    A border is kept where it makes the block's outputs better on the held batches, tensor by tensor.

    Attributes:
        iterations: Steps per block, for the weights and for the borders.
        kind: "constant", "affine" or "quadratic".
        weights: "first": learned before the borders by AdaRound, means and spreads then matched, each kept where it is
            better; "joint": together with the borders; "keep": not at all.
        rates: Learning rates; all but `borders` matter for "joint" only.
        pull: Weight of the rounding's penalty for "joint", relative to the block's error at the start.
        drop: Chance that an activation passes unrounded while training.
        stage: Weight of the error at the end of the stage; 0 leaves it out.
        reach: Most blocks behind the block that are looked through for that.
        device: Where torch computes.
        judged: Drop the result where the block gets worse.

    Raises:
        UsageError: There is no such kind of border, or way with the weights.
    """

    iterations: int = 500
    kind: str = "affine"
    weights: str = "first"
    rates: Rates = Rates(codes=2e-2)
    pull: float = 10.0
    drop: float = 0.0
    stage: float = 0.0
    reach: int = 4
    device: str = "cpu"
    judged: bool = True

    def __post_init__(self) -> None:
        """Refuse unknown words."""
        for word, known in ((self.kind, RoundingBorder.KINDS), (self.weights, WEIGHTS)):
            if word not in known:
                raise UsageError(f"AQuant takes one of {', '.join(known)}, not {word!r}.")

    @property
    def name(self) -> str:
        """As reports call it."""
        return "aquant"

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with borders, and codes, steps and biases, of the block; see `require_agreement` for refusals."""
        require_agreement(job, tuned)
        if self.weights == "first":
            found = AdaRound(iterations=self.iterations, device=self.device)(job, tuned)
            tuned = min((tuned, found, TuneMoments()(job, found)), key=lambda state: block_error(job, state))
        makers, refused = self._makers(job, tuned)
        for reason in dict.fromkeys(refused.values()):
            names = ", ".join(name for name, why in refused.items() if why == reason)
            job.log.note(f"block {job.block.name}: no rounding border for {names}: {reason}")
        borders = {name: maker.border(self.kind) for name, maker in makers.items()}
        tuned = self._learned(job, tuned, borders)
        return self._kept(job, tuned, makers, borders)

    def _makers(self, job: Job, tuned: Tuned) -> tuple[dict[str, Maker], dict[str, str]]:
        """Tensors that can have a border, and why the others that the block makes have none."""
        found: dict[str, Maker] = {}
        refused: dict[str, str] = {}
        made = {graph.name_of(value) for node in job.model.graph for value in node.outputs if value.name}
        for name in (name for name in tuned.plan.tensors if name in made):
            maker = maker_of(job.model, tuned.plan, name, curved=self.kind == "quadratic")
            if isinstance(maker, Maker):
                found[name] = maker
            else:
                refused[name] = maker
        return found, refused

    def _learned(self, job: Job, tuned: Tuned, borders: Mapping[str, RoundingBorder]) -> Tuned:
        """`tuned` with the weights learned beside the borders, which are changed in place."""
        joint = self.weights == "joint"
        rates = self.rates if joint else replace(self.rates, biases=0.0)
        make = self._rounded(job, tuned) if joint else learned_codes(tuned)
        block = SoftBlock(job, tuned, make, learn_grids=joint, drop=self.drop, borders=borders)
        ahead = look_ahead(job, tuned, "mse", weight=self.stage, reach=self.reach)
        learn(
            block,
            job,
            rates,
            iterations=self.iterations,
            mix=self.drop,
            loss=squared,
            ahead=ahead,
            device=self.device,
        )
        return block.found(tuned) if joint else tuned

    def _rounded(self, job: Job, tuned: Tuned) -> MakeWeight:
        pull = self.pull * block_error(job, tuned, job.train[:4])

        def make(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
            return Rounding(layer.weight, grid, learn_steps=True, pull=pull, warm_up=0.2)

        return make

    def _kept(
        self, job: Job, tuned: Tuned, makers: Mapping[str, Maker], borders: Mapping[str, RoundingBorder]
    ) -> Tuned:
        """`tuned` with those borders that help.

        Each is tried once, starting from none, or from all where they were learned together with the weights.
        """

        def state(names: Iterable[str]) -> Tuned:
            found = tuned
            for name in names:
                found = makers[name].with_border(found, name, borders[name])
            return found

        kept = list(borders) if self.weights == "joint" else []
        best, error = state(kept), block_error(job, state(kept))
        for name in borders:
            names = [other for other in borders if (other in kept) != (other == name)]
            trial = state(names)
            reached = block_error(job, trial)
            if reached < error:
                kept, best, error = names, trial, reached
        return best


@dataclass(frozen=True)
class Maker:
    """Where the channels of an activation tensor come from.

    Attributes:
        layer: Makes it, alone or with a Relu or Clip behind, or is the first of several that do.
        single: The layer's weight has a single step.
    """

    layer: Layer
    single: bool

    def border(self, kind: str) -> RoundingBorder:
        """A border of one half; where an affine one could not be absorbed by a single weight step, a constant one."""
        axis = 1 - self.layer.weight.ndim if self.layer.node.op_type == "Conv" else -1
        return RoundingBorder("constant" if kind == "affine" and self.single else kind, self.layer.channels, axis)

    def with_border(self, tuned: Tuned, name: str, border: RoundingBorder) -> Tuned:
        """`tuned` with a border for the tensor `name`: absorbed by the layer, or in the plan if it is curved."""
        grid = tuned.plan.tensors[name]
        codes = Grid(grid.bits, grid.signed, symmetric=False)
        if border.curved:
            curves: dict[str, Border] = {**tuned.plan.borders, name: border.found(codes.qmax - codes.qmin)}
            return replace(tuned, plan=replace(tuned.plan, borders=curves))
        return absorbed(tuned, self.layer, grid, border.line())


def absorbed(tuned: Tuned, layer: Layer, grid: TensorGrid, line: npt.NDArray[np.float64]) -> Tuned:
    """`tuned` with a straight border in the steps and the bias of the layer in front; the codes stay.

    Args:
        tuned: A plan in which the layer is quantized.
        layer: Makes the tensor, alone or with a Relu or Clip behind.
        grid: Of the tensor.
        line: The border at the lowest and the highest code, [2, channels]; the same where the layer's weight has a
            single step.
    """
    name = str(layer.node.name)
    weight = tuned.plan.weights[name]
    known = tuned.layers.get(name)
    codes = known.codes if known is not None else weight_codes(layer, weight)
    bias = known.bias if known is not None and known.bias is not None else layer.bias
    scale = tuned.plan.tensors[graph.name_of(layer.data)].scale
    units = scale * np.asarray(weight.scales)
    emitted = np.rint((np.zeros(layer.channels) if bias is None else bias) / units) * units
    ends = Grid(grid.bits, grid.signed, symmetric=False)
    slope = (line[1] - line[0]) / (ends.qmax - ends.qmin)
    shift = grid.scale * (0.5 - line[0] - slope * (grid.zero_point - ends.qmin))
    moved = ((1 - slope) * emitted + shift).astype(np.float32)
    steps = np.asarray(weight.scales) * (1 - slope if weight.axis is not None else 1.0)
    room = moved if weight.axis is not None else np.abs(moved).max(keepdims=True)
    roomy = room_for_bias(steps.astype(np.float32), room, scale)
    weights = {**tuned.plan.weights, name: replace(weight, scales=tuple(map(float, roomy)))}
    return Tuned(replace(tuned.plan, weights=weights), {**tuned.layers, name: LearnedLayer(codes, moved)})


def maker_of(model: Model, plan: QuantPlan, name: str, *, curved: bool) -> Maker | str:
    """The layer whose channels a tensor has, or why the tensor can have no border.

    Args:
        model: A float graph that makes the tensor.
        plan: Its grids.
        name: The tensor.
        curved: The border is not absorbed, so that any chain of Add, Relu and Clip behind layers will do.
    """
    grid = plan.tensors[name]
    if not grid.everywhere:
        return "float operators read it before it is rounded"
    value = graph.value_map(model)[name]
    layers = {}
    for node in (node for node in graph.nodes(model) if node.name in plan.weights):
        layer = graph.layer_of(node)
        if isinstance(layer, Layer) and node.op_type != "ConvTranspose":
            layers[layer.output] = layer
    if curved:
        source = _source(value, layers)
        return Maker(source, single=False) if source is not None else "its channels are not those of a layer"
    absorber = _absorber(value, layers, grid, plan)
    if isinstance(absorber, str):
        return absorber
    return Maker(absorber, plan.weights[str(absorber.node.name)].axis is None)


def _source(value: Value, layers: Mapping[Value, Layer]) -> Layer | None:
    """The first layer that `value` has its channels from, through Add, Relu and Clip."""
    waiting = [value]
    while waiting:
        value = waiting.pop(0)
        if value in layers:
            return layers[value]
        node = graph.producer(value, "Add", "Relu", "Clip")
        if node is not None:
            waiting += [given for given in node.inputs[: 2 if node.op_type == "Add" else 1] if given is not None]
    return None


def _absorber(value: Value, layers: Mapping[Value, Layer], grid: TensorGrid, plan: QuantPlan) -> Layer | str:
    """The layer that makes `value`, alone or with an activation behind, or why a border cannot move into it."""
    node = graph.producer(value, "Relu", "Clip")
    made = node.inputs[0] if node is not None else value
    if made is None or made not in layers:
        return "no quantized layer makes it"
    layer = layers[made]
    if layer.node.op_type == "MatMul" and layer.bias_add is None:
        return "its MatMul has no Add to hold a bias"
    if node is not None:
        activation = graph.activation_after(made)
        if activation is None or graph.name_of(made) in plan.tensors:
            return "its layer's result is read in front of the activation, too"
        codes = Grid(grid.bits, grid.signed, symmetric=False)
        low, high = (end / grid.scale + grid.zero_point for end in (activation.low, activation.high))
        if (activation.low and low > codes.qmin + SLACK) or (activation.high and high < codes.qmax - SLACK):
            return "its grid goes beyond its Clip"
    return layer
