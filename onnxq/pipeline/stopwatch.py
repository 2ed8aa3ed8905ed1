"""The clock of measured placement: profiles for prices, races for decisions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxq import bench, graph
from onnxq.emit import emit
from onnxq.graph import Model
from onnxq.pipeline.checkpoint import Clock
from onnxq.pipeline.fastest import REASON, Found, Race, fastest
from onnxq.pipeline.overriding import precision_of
from onnxq.pipeline.planning import placed
from onnxq.pipeline.prepare import Prepared, rows_are_free
from onnxq.pipeline.timing import by_unit, names_of
from onnxq.plan import Placement, Range, make_plan
from onnxq.plan.paying import Prices, crossings, total
from onnxq.recipe import Recipe
from onnxq.runtime import SessionConfig
from onnxq.types import Dataset, Feeds, Log, Observations, QuantPlan

SECONDS, LEAST_ROUNDS = (0.3, 1.5), 7
"""Time per file of a race and, where it leaves in doubt who is faster, of the next one; and the fewest rounds."""
DOUBT = 0.04
"""Width of an interval around 1 that another race may narrow; equals are let be."""
FACTORS = (0.5, 8.0)
"""Steps between float and integers may turn out this much cheaper or dearer than their nodes by themselves."""


def measured(
    prepared: Prepared,
    placement: Placement,
    seen: Observations,
    rows: Dataset,
    settings: Recipe,
    log: Log,
    kept: Clock | None = None,
) -> Found:
    """The fastest placement, where the recipe or a network slower than float asks for one.

    Args:
        prepared: The float file and the float graph.
        placement: What the rules give.
        seen: Statistics of its tensors.
        rows: Calibration rows; one of them is timed.
        settings: Says whether and how to look.
        log: Progress.
        kept: What an interrupted run measured, which this one goes on with.
    """
    if kept is not None:
        floats = dict.fromkeys(kept.placed.nodes if kept.placed is not None else (), REASON)
        return Found(placed(prepared.model, settings, seen, floats) if floats else placement, kept.placed)
    if settings.placement == "rules" or not _runs_in_integers(settings):
        return Found(placement)
    log.stage("Measuring latency")
    feeds = next(iter(rows))
    one = {name: value[:1] for name, value in feeds.items()} if rows_are_free(prepared.model) else feeds
    always = settings.placement == "measured" or bool(settings.max_latency)
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        clock = Stopwatch(prepared, seen, one, settings, Path(folder))
        return fastest(
            placement,
            lambda floats: placed(prepared.model, settings, seen, floats),
            clock,
            threads=settings.threads,
            always=always,
            log=log,
        )


def _runs_in_integers(settings: Recipe) -> bool:
    """Whether the result is meant for integer kernels: grids that have none are emulated, which is never fast."""
    eight = settings.activation_bits == settings.first_last == settings.residual_bits == 8
    return eight and not settings.attention_bits and settings.reconstruction != "aquant"


class Stopwatch:
    """Times placements of one model on this machine.

    Args:
        prepared: The float file and the float graph.
        seen: Statistics of the tensors of all placements.
        feeds: What is run.
        settings: Granularity of weights, threads and seed.
        folder: Where files may be written.
    """

    def __init__(self, prepared: Prepared, seen: Observations, feeds: Feeds, settings: Recipe, folder: Path) -> None:
        self._prepared, self._feeds, self._settings, self._folder = prepared, feeds, settings, folder
        self._ranges = {name: Range(found.low, found.high, "minmax") for name, found in seen.tensors.items()}
        self._config = SessionConfig(threads=settings.threads, stop_spinning=True)
        self._files: dict[frozenset[str], Path] = {}
        self._prices: Prices | None = None
        self._steps: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {})
        self._float_ms = self._rest_ms = 0.0

    def race(self, best: Placement, newest: Placement) -> Race:
        """Time the float file and the networks of two placements in turns."""
        files = list(dict.fromkeys([self._prepared.path, self._file(best), self._file(newest)]))
        found = self._raced(files, SECONDS[0])
        deciding = found.to_float if best is newest else found.to_best
        if deciding.low <= 1 <= deciding.high and deciding.high - deciding.low > DOUBT:
            found = self._raced(files, SECONDS[1])
        return found

    def _raced(self, files: Sequence[Path], seconds: float) -> Race:
        """The last of `files` against the first, the float file, and against the one before it."""
        seed = self._settings.seed
        found = bench.measure(
            files,
            threads=(self._settings.threads,),
            feeds=self._feeds,
            seconds=seconds,
            min_rounds=LEAST_ROUNDS,
            seed=seed,
        )
        plain, rival, last = found[0], found[1], found[-1]
        pairs = ((last, plain), (last, rival), (rival, plain))
        return Race(*(bench.ratio_interval(one.samples_ms, other.samples_ms, seed) for one, other in pairs))

    def prices(self, newest: Placement) -> Prices:
        """What nodes and steps cost, as far as known after a look into the network of `newest`."""
        names = names_of(newest.units)
        floats, integers = (
            {name: kernel.ms for name, kernel in found.items()}
            for found in bench.profiles([self._prepared.model, self._network(newest)], self._feeds, self._config)
        )
        if self._prices is None:
            self._steps = self._step_times(newest)
            self._float_ms = sum(floats.values())
            slow, quick = by_unit(floats, names), by_unit(integers, names)
            self._prices = _first(newest, slow, quick, *self._steps)
            self._rest_ms = sum(integers.values()) - sum(quick.values()) - _crossed(newest, self._prices)
        else:
            load = self._float_ms / max(sum(floats.values()), 1e-9)
            self._correct(newest, {name: time * load for name, time in integers.items()}, names)
        return self._prices

    def _correct(self, newest: Placement, times: Mapping[str, float], names: Mapping[str, str]) -> None:
        """Take what was seen in the network of `newest` for what it is."""
        assert self._prices is not None
        own, inside = by_unit(times, names), {unit.name for unit in newest.integer}
        slow = {name: own.get(name, time) if name not in inside else time for name, time in self._prices.slow.items()}
        quick = {name: own.get(name, time) if name in inside else time for name, time in self._prices.quick.items()}
        enter, leave = self._steps
        expected = _crossed(newest, Prices(slow, quick, enter, leave))
        crossed = sum(times.values()) - sum(own.values()) - self._rest_ms
        factor = min(max(crossed / expected, FACTORS[0]), FACTORS[1]) if expected > 0 else 1.0
        self._prices = Prices(slow, quick, _times(enter, factor), _times(leave, factor))

    def _step_times(self, placement: Placement) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds of every QuantizeLinear and DequantizeLinear as written, by tensor."""
        config = replace(self._config, optimize="off")
        (found,) = bench.profiles([self._network(placement)], self._feeds, config, seconds=0.2)
        enter, leave = (
            {name: found[f"{name}_{end}"].ms for name in placement.tensors if f"{name}_{end}" in found}
            for end in ("q", "dq")
        )
        return enter, leave

    def _plan(self, placement: Placement) -> QuantPlan:
        precision = replace(precision_of(self._settings, placement), codebook_bits=0, codebooks={})  # same kernels
        return make_plan(self._prepared.model, placement, self._ranges, precision)

    def _network(self, placement: Placement) -> Model:
        return emit(self._prepared.model, self._plan(placement), fused=True)

    def _file(self, placement: Placement) -> Path:
        key = frozenset(unit.name for unit in placement.integer)
        if key not in self._files:
            path = self._folder / f"{len(self._files)}.onnx"
            graph.save(self._network(placement), path)
            self._files[key] = path
        return self._files[key]


def _first(
    placement: Placement,
    slow: Mapping[str, float],
    quick: Mapping[str, float],
    enter: Mapping[str, float],
    leave: Mapping[str, float],
) -> Prices:
    """Prices from a float network and one in integers; a layer that only one of them shows has no say."""
    lost = {unit.name for unit in placement.layers if not (slow.get(unit.name) and quick.get(unit.name))}
    neutral = {name: max(slow.get(name, 0.0), quick.get(name, 0.0)) for name in lost}
    names = [unit.name for unit in placement.units]
    inside = [unit.name for unit in placement.units if unit in placement.integer]
    return Prices(
        {name: neutral.get(name, slow.get(name, 0.0)) for name in names},
        {name: neutral.get(name, quick.get(name, 0.0)) for name in inside},
        enter,
        leave,
    )


def _crossed(placement: Placement, prices: Prices) -> float:
    """Milliseconds of the steps between float and integers in the network of `placement`."""
    inside = {unit.name for unit in placement.integer}
    nothing = dict.fromkeys(inside, 0.0)
    return total(nothing, nothing, crossings(placement, prices), inside)


def _times(steps: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: time * factor for name, time in steps.items()}
