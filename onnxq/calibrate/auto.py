"""`auto`: per tensor, the range that hurts the layers behind it least.

For every tensor that feeds layers, each rule's range is tried on a sample of rows: onnxruntime runs the layers on the
float tensor x and on its rounded versions, and the candidate with the least

    sum over the layers behind x of  ||layer(round(x)) - layer(x)||^2 / ||layer(x)||^2

wins. Tensors without layers behind them keep the least squared error of the tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxq import graph
from onnxq.calibrate.ranges import RULES
from onnxq.graph import Layer, Model
from onnxq.grid import Grid, fake_quantize
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Array, Feeds, Observations

CANDIDATES = ("minmax", "percentile", "mse", "mae", "entropy")
FALLBACK = "mse"
SAME = 0.02
"""Ranges whose ends differ by less than this share of the width are one candidate."""


def choose(
    model: Model,
    observations: Observations,
    readers: Mapping[str, Sequence[Layer]],
    rows: Sequence[Feeds],
    grid: Grid,
    *,
    config: SessionConfig = SessionConfig(stop_spinning=True),
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[float, float, str]]:
    """(low, high, rule) for every observed tensor.

    Args:
        model: The prepared float model.
        observations: Statistics of the tensors.
        readers: The layers behind a tensor, by tensor name; other tensors get the fallback rule.
        rows: Batches to try candidates on.
        grid: The activations' grid.
        config: How to run.
        progress: Called with the number of batches done.
    """
    found = {name: (*RULES[FALLBACK](stats, grid), FALLBACK) for name, stats in observations.tensors.items()}
    options = {name: _distinct(observations, name, grid) for name in observations.tensors if readers.get(name)}
    trials = {name: choices for name, choices in options.items() if len(choices) > 1}
    found.update({name: choices[0] for name, choices in options.items() if len(choices) == 1})
    if trials:
        errors = _errors(model, trials, readers, rows, grid, config, progress)
        for name, choices in trials.items():
            found[name] = choices[int(np.argmin(errors[name]))]
    return found


def _distinct(observations: Observations, name: str, grid: Grid) -> list[tuple[float, float, str]]:
    stats = observations.tensors[name]
    kept: list[tuple[float, float, str]] = []
    for rule in CANDIDATES:
        low, high = RULES[rule](stats, grid)
        width = max(high - low, 1e-30)
        if all(abs(low - a) + abs(high - b) > SAME * width for a, b, _ in kept):
            kept.append((low, high, rule))
    return kept


def _errors(
    model: Model,
    trials: Mapping[str, Sequence[tuple[float, float, str]]],
    readers: Mapping[str, Sequence[Layer]],
    rows: Sequence[Feeds],
    grid: Grid,
    config: SessionConfig,
    progress: Callable[[int], None] | None,
) -> dict[str, np.ndarray]:
    inner = [name for name in trials if name not in {spec[0] for spec in graph.input_specs(model)}]
    prefix = Session(graph.with_outputs(model, inner, keep=False), config) if inner else None
    heads = {name: Session(graph.layers_model(model, readers[name]), config) for name in trials}
    errors = {name: np.zeros(len(choices)) for name, choices in trials.items()}
    for done, feeds in enumerate(rows, 1):
        values = prefix.run(feeds, inner) if prefix is not None else {}
        for name, choices in trials.items():
            x = values.pop(name) if name in values else feeds[name]
            errors[name] += _trial(heads[name], name, np.asarray(x, np.float32), choices, grid)
        if progress is not None:
            progress(done)
    return errors


def _trial(head: Session, name: str, x: Array, choices: Sequence[tuple[float, float, str]], grid: Grid) -> np.ndarray:
    """Relative output error of every choice; x and its rounded versions go through the layers in one run."""
    versions = [x, *(fake_quantize(x, *grid.from_range(low, high), grid) for low, high, _ in choices)]
    errors = np.zeros(len(choices))
    for outputs in head.run({name: np.concatenate(versions)}).values():
        wanted, *tried = np.split(outputs, len(versions))
        power = max(float(np.vdot(wanted, wanted)), 1e-30)
        errors += [float(np.vdot(gap, gap)) / power for gap in (version - wanted for version in tried)]
    return errors
