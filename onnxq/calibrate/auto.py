"""`auto`: per tensor, the range that hurts the model's outputs least.

The least squared error of the tensor itself is the default. It errs where a few huge values carry little (a token
whose values are normalised away) or much, which only the network behind them can tell. So for every tensor that feeds
layers other rules' ranges are tried on some rows: this tensor alone is rounded on its way into its layers, the float
model does the rest, and the candidate with the least

    sum over the model's outputs y of  ||y(rounded) - y||^2 / ||y||^2

takes the default's place if it is clearly better: few rows show few of the values that a range cuts off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxq.calibrate.observe import count_rows
from onnxq.calibrate.ranges import RULES
from onnxq.graph import Layer, Model
from onnxq.graph.gates import open_gate, with_gates
from onnxq.grid import Grid
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Array, Feeds, Observations

DEFAULT = "mse"
OTHERS = ("minmax", "percentile")
"""Rules that clip more win on few rows and lose on the next."""
SAME = 0.02
"""Ranges whose ends differ by less than this share of the width are one candidate."""
CLEARLY = 0.7
"""The share of the default's error that a candidate may leave."""
RUNS = 192
"""Rows that all trials together run through the model, if that is one batch or more."""

Choice = tuple[float, float, str]


def choose(
    model: Model,
    observations: Observations,
    readers: Mapping[str, Sequence[Layer]],
    rows: Sequence[Feeds],
    grids: Mapping[str, Grid],
    *,
    config: SessionConfig = SessionConfig(stop_spinning=True),
    progress: Callable[[int], None] | None = None,
) -> dict[str, Choice]:
    """(low, high, rule) for every observed tensor.

    Args:
        model: The prepared float model.
        observations: Statistics of the tensors.
        readers: The layers behind a tensor, by tensor name; other tensors get the default rule.
        rows: Batches to try candidates on; evenly spaced ones are taken where there are many tensors.
        grids: The grid of every tensor.
        config: How to run.
        progress: Called with the number of batches done.
    """
    options = {
        name: _options(observations, name, grids[name], bool(readers.get(name))) for name in observations.tensors
    }
    trials = {name: choices for name, choices in options.items() if len(choices) > 1}
    errors = _errors(model, trials, readers, rows, grids, config, progress) if trials else {}
    return {name: choices[_best(errors.get(name))] for name, choices in options.items()}


def _options(observations: Observations, name: str, grid: Grid, tried: bool) -> list[Choice]:
    """The default first, then the ranges that differ from it and from each other."""
    stats = observations.tensors[name]
    kept: list[Choice] = []
    for rule in (DEFAULT, *OTHERS) if tried else (DEFAULT,):
        low, high = RULES[rule](stats, grid)
        width = max(high - low, 1e-30)
        if all(abs(low - a) + abs(high - b) > SAME * width for a, b, _ in kept):
            kept.append((low, high, rule))
    return kept


def _best(errors: Sequence[float] | None) -> int:
    if errors is None:
        return 0
    best = int(np.argmin(errors))
    return best if errors[best] < CLEARLY * errors[0] else 0


def _errors(
    model: Model,
    trials: Mapping[str, Sequence[Choice]],
    readers: Mapping[str, Sequence[Layer]],
    rows: Sequence[Feeds],
    grids: Mapping[str, Grid],
    config: SessionConfig,
    progress: Callable[[int], None] | None,
) -> dict[str, list[float]]:
    """What each candidate does to the model's outputs."""
    gated = with_gates(model, {name: [str(layer.node.name) for layer in readers[name]] for name in trials})
    session = Session(gated, config)
    outputs = [spec.name for spec in session.outputs if spec.dtype.startswith("float")]
    errors = {name: [0.0] * len(choices) for name, choices in trials.items()}
    for done, feeds in enumerate(_some(rows, sum(map(len, errors.values()))) if outputs else [], 1):
        wanted = session.run(feeds, outputs)
        for number, (name, choices) in enumerate(trials.items()):
            grid = grids[name]
            for index, (low, high, _) in enumerate(choices):
                step, zero = grid.from_range(low, high)
                gate = open_gate(number, step, grid.qmin - zero, grid.qmax - zero)
                errors[name][index] += _distance(session.run(feeds | gate, outputs), wanted)
        if progress is not None:
            progress(done)
    return errors


def _some(rows: Sequence[Feeds], runs: int) -> list[Feeds]:
    """As many evenly spaced batches as may run so often."""
    if not rows:
        return []
    count = int(np.clip(RUNS // (runs * max(count_rows(rows[0]), 1)), 1, len(rows)))
    return [rows[at] for at in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def _distance(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """Sum over the outputs of the squared error, relative to the output; outputs of another size tell nothing.

    What is infinite or NaN in the float model is left out; what becomes so counts as lost.
    """
    total = 0.0
    for name, y in wanted.items():
        if found[name].shape != y.shape:
            continue
        usable = np.isfinite(y)
        clean, got = y[usable].astype(np.float64), found[name][usable].astype(np.float64)
        gap = np.where(np.isfinite(got), got, 0.0) - clean
        total += float(gap @ gap) / max(float(clean @ clean), 1e-30)
    return total
