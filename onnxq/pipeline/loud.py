"""Choosing, on calibration rows, which layers hand the scale of loud channels to the layers behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.calibrate.channels import ChannelRange, channel_ranges
from onnxq.graph import Layer, Model
from onnxq.passes.equalize_groups import Group, channel_axis
from onnxq.passes.migrate_groups import as_read, named_groups
from onnxq.passes.migration import search_shared
from onnxq.passes.readings import Kernel, Migration, Reading
from onnxq.pipeline.prepare import rows_are_free
from onnxq.plan.weights import rough_steps
from onnxq.tune import batches_of
from onnxq.types import Dataset, Log, Silence

LOUD = 4.0
"""A channel that reaches this many times as far as the one in the middle is loud."""
SILENT = 1e-4
"""A channel that reaches this part of the widest one's way does not count for the middle."""
FIRST_ROWS, ALL_ROWS, BATCH = 64, 512, 8
"""Rows on which loud channels are looked for, and on which what was found is looked at again if it needs more."""
SAMPLES = 256
ENOUGH = 512
"""Values of a channel that ratios may rest on: with fewer, other rows leave the ranges that are made equal."""
GAIN = 0.9
"""Share by which the layers' error must fall, with weights of 8 bits: where channels are loud indeed, it falls a
hundredfold.
"""


def take_down(
    model: Model,
    rows: Dataset,
    activation_bits: int = 8,
    weight_bits: int = 8,
    log: Log = Silence(),
    *,
    seed: int = 0,
) -> Mapping[str, Migration]:
    """The migration of each group of layers with loud channels, for `passes.migrate_groups.MigrateGroups`.

    Args:
        model: The prepared float model.
        rows: Calibration rows, of which the first few serve.
        activation_bits: Of what the layers read.
        weight_bits: Of the layers' weights, which have a step per output channel.
        log: Told the number of migrations.
        seed: Of the sample of rows.

    Returns:
        Migrations without shifts by name of what a group's first producer writes. Left out are groups that gain little,
        those without a channel that reaches `LOUD` times as far as most, and those of which too little was seen.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    found = dict(named_groups(model))
    if not found:
        return {}
    log.stage("Looking for loud channels")
    useful: dict[str, Migration] = {}
    for name, seen in _loud(model, found, rows, log, seed).items():
        readers: dict[str, list[Layer]] = {}
        for layer in found[name].consumers:
            readers.setdefault(graph.name_of(layer.data), []).append(layer)
        readings = [
            _reading(seen[tensor], [as_read(layer, found.values()) for layer in layers])
            for tensor, layers in readers.items()
        ]
        migration = search_shared(readings, activation_bits, shift=False, least_gain=GAIN)
        if weight_bits < 7 and not migration.is_identity:
            migration = search_shared(readings, activation_bits, weight_bits, shift=False, steps_of=rough_steps)
        useful |= {} if migration.is_identity else {name: migration}
    if useful:
        log.note(f"loud channels hand their scale to the layers behind them: {len(useful)} of {len(found)} groups")
    return useful


def _loud(
    model: Model, found: Mapping[str, Group], rows: Dataset, log: Log, seed: int
) -> dict[str, dict[str, ChannelRange]]:
    """Ranges of what the layers of each group with loud channels read, by the tensor's name."""
    loud: dict[str, dict[str, ChannelRange]] = {}
    wanted = found
    for limit in (FIRST_ROWS, ALL_ROWS):
        some = batches_of(rows, BATCH, free=rows_are_free(model), limit=limit)
        axes = {name: axis for group in wanted.values() for name, axis in _read(group).items()}
        seen = channel_ranges(model, some, axes, keep=SAMPLES, seed=seed, progress=log.advance)
        ranges = {name: {tensor: seen[tensor] for tensor in _read(group)} for name, group in wanted.items()}
        ranges = {name: each for name, each in ranges.items() if _is_loud(each.values())}
        short = {name for name, each in ranges.items() if min(one.count for one in each.values()) < ENOUGH}
        loud |= {name: each for name, each in ranges.items() if name not in short}
        wanted = {name: group for name, group in wanted.items() if name in short}
        if not wanted:
            break
    return loud


def _read(group: Group) -> dict[str, int]:
    """What the consumers of a group read, with the axis of the channels."""
    return {graph.name_of(layer.data): channel_axis(layer) for layer in group.consumers}


def _is_loud(ranges: Iterable[ChannelRange]) -> bool:
    every = list(ranges)
    sound = all(each.finite and len(each.sample) for each in every)
    return sound and any(_reach(each).max(initial=0.0) > LOUD * _middle(each) > 0 for each in every)


def _reach(seen: ChannelRange) -> npt.NDArray[np.float64]:
    return np.maximum(np.abs(seen.low), np.abs(seen.high)).astype(np.float64)


def _middle(seen: ChannelRange) -> float:
    """How far the channel in the middle reaches, of those that reach anywhere; 0 where none does."""
    reach = _reach(seen)
    audible = reach[reach > SILENT * reach.max(initial=0.0)]
    return float(np.median(audible)) if len(audible) else 0.0


def _reading(seen: ChannelRange, kernels: Sequence[Kernel]) -> Reading:
    """An activation and what reads it.

    Channels that hardly moved count as if they reached as far as the middle one: other rows may move them.
    """
    high = np.maximum(seen.high.astype(np.float64), _middle(seen))
    return Reading(seen.sample.astype(np.float64), kernels, seen.low.astype(np.float64), high)
