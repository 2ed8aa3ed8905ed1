"""Choosing, on calibration rows, which normalisations hand their channels' scales to the layers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxq import graph, passes
from onnxq.calibrate.channels import ChannelRange, channel_ranges
from onnxq.errors import RewriteError
from onnxq.graph import Layer, Model
from onnxq.passes.migrate import Pair, pairs
from onnxq.passes.migration import search
from onnxq.passes.readings import Migration
from onnxq.pipeline.loud import take_down
from onnxq.pipeline.prepare import Prepared
from onnxq.plan.budgets import Wishes
from onnxq.plan.weights import rough_steps
from onnxq.recipe import Recipe
from onnxq.types import Dataset, Feeds, Log, Silence
from onnxq.types.target import target_of

SAMPLE_ROWS = 512
"""Rows of each tensor on which migrations are compared."""
FEW = 4
"""Bits that a budget of bit operations or of a vendor's costs leaves most weights."""
TABLE, NODE_BYTES, CHANNEL_BYTES = 10_000, 300, 9
"""Elements of an embedding table, which is stored in int8; about what a file takes per node, and per output channel
for step, zero point and bias."""
COPY_GAIN = 0.25
"""Share by which a migration must lower the layers' error where it takes a Mul of its own."""


def migrates(settings: Recipe) -> bool:
    """Whether the recipe moves scales, and layers have grids for which that matters."""
    rounds_inputs = not settings.weight_only and target_of(settings.target).placing != "half"
    return settings.migrate_norms and rounds_inputs


def likely_bits(settings: Recipe, model: Model, float_bytes: int) -> int:
    """Bits that migrations are chosen for: those of the layers with fewest, or what a budget leaves on average.

    What helps weights of few bits helps others too, but not the other way round.

    Args:
        settings: Bits, or the budget that decides them.
        model: The prepared float model.
        float_bytes: Of the user's file, for budgets that are a share of it.
    """
    own = (bits for layer in settings.layers for bits in (layer.weight_bits, layer.codebook_bits))
    counts = (settings.weight_bits, settings.codebook_bits, _budget_bits(settings.wishes, model, float_bytes), *own)
    return min(max(2, bits) for bits in counts if bits)


def _budget_bits(wishes: Wishes, model: Model, float_bytes: int) -> int:
    """Bits per weight that budgets leave on average; 8 where they leave all of them."""
    found = [FEW] if wishes.max_bops or wishes.max_cost else [8]
    if wishes.avg_bits is not None:
        found.append(round(wishes.avg_bits))
    if wishes.max_size is not None:
        found.append(round(8.0 * _bytes_per_weight(model, wishes.max_size.of(float_bytes))))
    return max(2, min(found))


def _bytes_per_weight(model: Model, limit: float) -> float:
    """What a file of `limit` bytes has left for every weight of a layer, by an estimate of all else in it."""
    layers = [layer for layer in map(graph.layer_of, graph.nodes(model, *graph.LAYER_OPS)) if isinstance(layer, Layer)]
    weights = {id(layer.node.inputs[1]): layer.weight.size for layer in layers}
    others = [value.const_value for value in model.graph.initializers.values() if id(value) not in weights]
    rest = sum(each.size if each.size >= TABLE else each.nbytes for each in others if each is not None)
    rest += NODE_BYTES * len(model.graph) + CHANNEL_BYTES * sum(layer.channels for layer in layers)
    return (limit - rest) / max(1, sum(weights.values()))


def migrate_norms(
    prepared: Prepared, float_bytes: int, rows: Dataset, probe: Feeds, settings: Recipe, log: Log = Silence()
) -> Prepared:
    """`prepared`, from a file of `float_bytes`, with the migrations that help.

    They are checked on `probe`; what is refused is recorded with the passes.
    """
    bits = likely_bits(settings, prepared.model, float_bytes)
    asked = (prepared.model, rows, settings.activation_bits, bits, log)
    choices: dict[str, Migration] = {}
    if "MigrateNorms" not in settings.without:
        choices |= choose_migrations(*asked, seed=settings.seed)
    # with one step per weight, groups have been equalised, which needs no calibration
    if settings.per_channel and "MigrateGroups" not in settings.without:
        choices |= take_down(*asked, seed=settings.seed)
    model = prepared.model.clone()
    try:
        applied = passes.apply(model, passes.migrations(choices), probe)
    except RewriteError as error:
        log.warn(str(error))
        return prepared
    return replace(prepared, model=model, passes=(*prepared.passes, *applied), migrations=choices)


def choose_migrations(
    model: Model,
    rows: Dataset,
    activation_bits: int = 8,
    weight_bits: int = 8,
    log: Log = Silence(),
    *,
    seed: int = 0,
) -> Mapping[str, Migration]:
    """The migration of each normalisation whose linear layers it makes more exact, for `passes.migrate.MigrateNorms`.

    Args:
        model: The prepared float model.
        rows: Calibration rows.
        activation_bits: Of the layers' inputs.
        weight_bits: Of the layers' weights.
        log: Told the progress and the number of migrations.
        seed: Of the sample of rows.

    Returns:
        Migrations by name of the normalisation's result; tensors that gain nothing are left out.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    found = {pair.name: pair for _, pair in pairs(model) if isinstance(pair, Pair)}
    if not found:
        return {}
    log.stage("Migrating scales")
    axes = {name: pair.norm.axis for name, pair in found.items()}
    seen = channel_ranges(model, rows, axes, keep=SAMPLE_ROWS, seed=seed, progress=log.advance)
    useful: dict[str, Migration] = {}
    for done, (name, pair) in enumerate(found.items(), 1):
        if seen[name].finite and len(seen[name].sample):
            migration = _search(pair, seen[name], activation_bits, weight_bits)
            useful |= {} if migration.is_identity else {name: migration}
        log.step(f"{done} of {len(found)}")
    log.note(f"{len(useful)} of {len(found)} normalisations hand their channels' scales to the layers behind them")
    return useful


def _search(pair: Pair, seen: ChannelRange, activation_bits: int, weight_bits: int) -> Migration:
    return search(
        seen.sample.astype(np.float64),
        pair.weights,
        activation_bits,
        weight_bits,
        shift=pair.shifts,
        low=seen.low.astype(np.float64),
        high=seen.high.astype(np.float64),
        least_gain=COPY_GAIN if pair.shared else None,
        steps_of=rough_steps if weight_bits < 7 else None,
    )
