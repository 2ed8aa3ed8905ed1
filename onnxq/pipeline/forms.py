"""The form of every product with a float result, by the clock: a fixed grid, the grid of each run, or blocks.

    fixed    QuantizeLinear with a calibrated grid, one for all that read the tensor
    dynamic  DynamicQuantizeLinear: no range to calibrate, but to be found in every run
    blocks   MatMulNBits rounds its input by itself; weights as they are in memory, which is all that counts for one row

A site is a tensor with the products that read it. Sites of equal shapes are of one kind; the first of each kind is run
alone in all forms, in turns, and the forms that beat the fixed one beyond doubt make a network. It is kept only if it
is faster than the network with fixed grids beyond doubt, too, and about as exact: the grid of a run has the range of
its largest value, which long tails make coarse, and what was learned for a weight is lost in blocks. So all this comes
behind tuning.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from onnxq import bench, graph
from onnxq.calibrate.observe import count_rows
from onnxq.emit import emit
from onnxq.emit.products import has_float_result
from onnxq.graph import Layer, Model, Value
from onnxq.pipeline.planning import some_rows
from onnxq.pipeline.prepare import Prepared, rows_are_free
from onnxq.pipeline.weight_only import guided_rounding
from onnxq.plan.guards import THROUGH
from onnxq.plan.weight_only import BLOCK
from onnxq.recipe import Recipe
from onnxq.runtime import Session
from onnxq.tune.job import restrict
from onnxq.types import BlockGrid, Dataset, Feeds, Formed, Interval, Log, QuantPlan, Silence, Tuned, WeightGrid
from onnxq.types.target import TARGETS

LOSS_DB = 0.5
"""What another form may cost of the outputs' signal-to-noise ratio."""
ROWS = 32
"""Calibration rows that judge it."""
SECONDS = (0.15, 1.0)
"""Time per form of a kind, and per network."""
LEAST_ROUNDS = 15
Form = Callable[[QuantPlan, "Site"], QuantPlan]


@dataclass(frozen=True)
class Site:
    """A tensor and the products that read its codes.

    Attributes:
        tensor: Its name.
        layers: The products, by node name.
    """

    tensor: str
    layers: Mapping[str, Layer]

    def shapes(self, shape: tuple[int, ...], weights: Mapping[str, WeightGrid]) -> tuple[object, ...]:
        """What the time of a site and its forms depend on, if the tensor is of `shape`."""
        each = (
            (layer.weight.shape, layer.bias is None, _block_bits(weights[name])) for name, layer in self.layers.items()
        )
        return (shape, *each)


Kind = Sequence[Site]
"""Sites of equal shapes."""
Choices = list[tuple[Kind, Form]]


def sites(model: Model, plan: QuantPlan) -> list[Site]:
    """The tensors of `plan` that nothing but products with float results read, in graph order.

    Those that an integer node makes are left out, moved or not: it needs the fixed grid for its own kernel.
    """
    nodes, values = graph.node_names(model), graph.value_map(model)
    layers = {name: layer for name in plan.weights if not isinstance(layer := graph.layer_of(nodes[name]), str)}
    products = {name for name, layer in layers.items() if has_float_result(layer, plan)}
    found, inside = [], set(plan.integer)
    for tensor, grid in plan.tensors.items():
        readers = {str(node.name): node for node in graph.users(values[tensor]) if str(node.name) in inside}
        free = readers and not grid.everywhere and tensor not in plan.borders and tensor not in plan.guards
        if free and readers.keys() <= products and not _made_in_integers(values[tensor], inside):
            found.append(Site(tensor, {name: layers[name] for name in readers}))
    return found


def _made_in_integers(value: Value, inside: Collection[str]) -> bool:
    """Whether an integer node makes `value`, or what is moved or clipped to it."""
    while (node := value.producer()) is not None:
        if str(node.name) in inside:
            return True
        source = node.inputs[0] if node.op_type in THROUGH and node.inputs else None
        if source is None:
            return False
        value = source
    return False


def dynamic(plan: QuantPlan, site: Site) -> QuantPlan:
    """`plan` with the tensor of `site` rounded to its range in every run."""
    return replace(plan, dynamic=(*plan.dynamic, site.tensor))


def blocks(plan: QuantPlan, site: Site) -> QuantPlan:
    """`plan` with the weights of `site` in blocks of 4 or 8 bits, no fewer than they have, and its tensor in float."""
    grids = {name: BlockGrid(_block_bits(plan.weights[name]), BLOCK) for name in site.layers}
    return replace(
        plan,
        tensors={name: grid for name, grid in plan.tensors.items() if name != site.tensor},
        weights={name: grid for name, grid in plan.weights.items() if name not in grids},
        integer=tuple(name for name in plan.integer if name not in grids),
        blocks={**plan.blocks, **grids},
    )


def fits_blocks(plan: QuantPlan, site: Site) -> bool:
    """Whether every weight of `site` has even steps and a block of inputs at least."""
    return all(len(layer.weight) >= BLOCK and _block_bits(plan.weights[name]) for name, layer in site.layers.items())


def _block_bits(grid: WeightGrid) -> int:
    """Bits of blocks in place of `grid`; 0 for codebooks, which have no even steps."""
    return 0 if grid.values else 4 if grid.bits <= 4 else 8


def looks(settings: Recipe, plan: QuantPlan) -> bool:
    """Whether a recipe asks for the fastest form: measured placement, and no budget that could be broken by it."""
    asked = settings.placement == "measured" and not settings.wishes
    return asked and not plan.simulated and TARGETS[plan.target].fused


def formed(prepared: Prepared, tuned: Tuned, rows: Dataset, settings: Recipe, log: Log) -> tuple[Tuned, Formed | None]:
    """The plan with every product in its fastest form, and what that gained; None where nothing was timed.

    Args:
        prepared: The float file and the float graph.
        tuned: With fixed grids.
        rows: Calibration rows; one is timed, some judge.
        settings: Say whether to look, and with how many threads.
        log: Progress.
    """
    found = sites(prepared.model, tuned.plan) if looks(settings, tuned.plan) else []
    if not found:
        return tuned, None
    log.stage("Looking for the fastest form of products")
    feeds = next(iter(rows))
    one = {name: value[:1] for name, value in feeds.items()} if rows_are_free(prepared.model) else feeds
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        contest = _Contest(prepared, tuned, (rows, one), settings, Path(folder))
        kinds = contest.kinds(found).values()
        return _kept(contest, [(members, contest.faster(members[0])) for members in kinds], log)


def _kept(contest: _Contest, won: Sequence[tuple[Kind, Sequence[Form]]], log: Log) -> tuple[Tuned, Formed]:
    """The first of the combinations that is faster as a whole, and exact enough without the kinds that cost most."""
    refused, before = "", None
    waiting, tried = _combinations(won), list[Choices]()
    while waiting:
        choices = waiting.pop(0)
        if choices in tried or not choices:
            continue
        tried.append(choices)
        made, names = contest.made(choices), _names(choices)
        lost = contest.loss(made)
        if lost > LOSS_DB:
            refused = f"faster forms cost {lost:.1f} dB"
            log.step(refused)
            waiting.insert(0, _without_worst(contest, choices))
            continue
        to_fixed, before, after = contest.race(made)
        log.step(f"{len(names[dynamic])} rounded in every run, {len(names[blocks])} in blocks: {after.value:.2f}x")
        if to_fixed.high < 1 and after.value < before.value:
            return made, Formed(len(won), names[dynamic], names[blocks], before, after)
        refused = "no faster together"
    return contest.fixed, Formed(len(won), (), (), before, None, refused)


def _combinations(won: Sequence[tuple[Kind, Sequence[Form]]]) -> list[Choices]:
    """The fastest form of every kind, then either form alone where it won."""
    fastest: Choices = [(kind, forms[0]) for kind, forms in won if forms]
    alone: list[Choices] = [[(kind, form) for kind, forms in won if form in forms] for form in (blocks, dynamic)]
    return [fastest, *alone]


def _without_worst(contest: _Contest, choices: Choices) -> Choices:
    """`choices` without the one that alone loses most."""
    if len(choices) < 2:
        return []
    lost = [contest.loss(contest.made([choice])) for choice in choices]
    worst = lost.index(max(lost))
    return [choice for index, choice in enumerate(choices) if index != worst]


def _names(choices: Choices) -> dict[Form, tuple[str, ...]]:
    """The products that get either form."""
    return {
        form: tuple(name for kind, chosen in choices if chosen is form for site in kind for name in site.layers)
        for form in (dynamic, blocks)
    }


class _Contest:
    """Times forms of one model's products, and networks made of them.

    Attributes:
        fixed: Fixed grids everywhere.
    """

    def __init__(
        self, prepared: Prepared, tuned: Tuned, data: tuple[Dataset, Feeds], settings: Recipe, folder: Path
    ) -> None:
        self._prepared, self._settings, self._folder = prepared, settings, folder
        self._rows, self._feeds = data
        self._values: Feeds = {}
        self._count = 0
        self.fixed = tuned
        self._file = self._saved(prepared.model, tuned)
        self._latest = (tuned, self._file)
        self._reference = Session(prepared.path)

    def made(self, choices: Choices) -> Tuned:
        """The network with some kinds in other forms; 4-bit blocks rounded with what they read."""
        plan = self.fixed.plan
        for kind, form in choices:
            for site in kind:
                plan = form(plan, site)
        kept = {name: layer for name, layer in self.fixed.layers.items() if name in plan.weights}
        return guided_rounding(self._prepared.model, Tuned(plan, kept), self._rows, Silence()).tuned

    def kinds(self, found: Sequence[Site]) -> dict[tuple[object, ...], list[Site]]:
        """Sites of equal shapes."""
        inner = [site.tensor for site in found if site.tensor not in self._feeds]
        opened = graph.with_outputs(self._prepared.model, inner, keep=False)
        made = Session(opened).run(self._feeds) if inner else {}
        self._values = {**self._feeds, **made}
        kinds: dict[tuple[object, ...], list[Site]] = {}
        for site in found:
            kinds.setdefault(site.shapes(self._values[site.tensor].shape, self.fixed.plan.weights), []).append(site)
        return kinds

    def faster(self, site: Site) -> tuple[Form, ...]:
        """The forms that beat the fixed grid at `site` beyond doubt, the fastest first."""
        ends = [graph.name_of((layer.bias_add or layer.node).outputs[0]) for layer in site.layers.values()]
        part = graph.sub_model(self._prepared.model, [site.tensor], ends)
        plan = self.fixed.plan
        tried: list[Form] = [dynamic, *([blocks] if fits_blocks(plan, site) else [])]
        plans = [plan, *(form(plan, site) for form in tried)]
        files = [self._saved(part, Tuned(restrict(each, part))) for each in plans]
        times = self._times(files, {site.tensor: self._values[site.tensor]}, SECONDS[0])
        ratios = [bench.ratio_interval(own, times[0], self._settings.seed) for own in times[1:]]
        order = sorted(range(len(tried)), key=lambda index: ratios[index].value)
        return tuple(tried[index] for index in order if ratios[index].high < 1)

    def race(self, made: Tuned) -> tuple[Interval, Interval, Interval]:
        """Time of `made` as a share of the fixed grids', that of these as a share of float's, and that of `made`."""
        files = [self._prepared.path, self._file, self._network(made)]
        plain, fixed, new = self._times(files, self._feeds, SECONDS[1])
        pairs = ((new, fixed), (fixed, plain), (new, plain))
        one, two, three = (bench.ratio_interval(a, b, self._settings.seed) for a, b in pairs)
        return one, two, three

    def loss(self, made: Tuned) -> float:
        """Decibels that `made` loses against the fixed grids, at the output that loses most."""
        fixed, new = self._fixed_db, self._decibels(self._network(made))
        lost = (fixed[name] - new[name] for name in fixed if name in new and fixed[name] != new[name])
        return max(lost, default=0.0)

    @cached_property
    def _fixed_db(self) -> Mapping[str, float]:
        return self._decibels(self._file)

    def _decibels(self, file: Path) -> Mapping[str, float]:
        return bench.compare(self._reference, Session(file), some_rows(self._rows, ROWS, self._prepared.model)).sqnr_db

    def _network(self, made: Tuned) -> Path:
        """The file of a whole network; that of the latest one is there already."""
        if self._latest[0] is not made:
            self._latest = (made, self._saved(self._prepared.model, made))
        return self._latest[1]

    def _times(self, files: Sequence[Path], feeds: Feeds, seconds: float) -> list[tuple[float, ...]]:
        found = bench.measure(
            files,
            threads=(self._settings.threads,),
            batches=(count_rows(feeds),),
            feeds=feeds,
            seconds=seconds,
            min_rounds=LEAST_ROUNDS,
            seed=self._settings.seed,
        )
        return [latency.samples_ms for latency in found]

    def _saved(self, model: Model, tuned: Tuned) -> Path:
        path = self._folder / f"{self._count}.onnx"
        self._count += 1
        graph.save(emit(model, tuned.plan, learned=tuned.layers, fused=True), path)
        return path
