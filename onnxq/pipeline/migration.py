"""Choosing, on calibration rows, which normalisations hand their channels' scales to the layers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxq import passes
from onnxq.calibrate.channels import ChannelRange, channel_ranges
from onnxq.graph import Model
from onnxq.grid import Grid
from onnxq.passes.migrate import MigrateNorms, Pair, pairs
from onnxq.passes.migration import Matrix, Migration, search
from onnxq.pipeline.prepare import Prepared
from onnxq.plan.weights import least_squares
from onnxq.recipe import Recipe
from onnxq.types import Dataset, Feeds, Log, Silence
from onnxq.types.target import target_of

SAMPLE_ROWS = 512
"""Rows of each tensor on which migrations are compared."""
TRIES = 10
"""Clippings of a weight of few bits that are tried for every migration."""
FEW = 4
"""Bits that a budget of bytes or bits leaves most weights."""
COPY_GAIN = 0.25
"""Share by which a migration must lower the layers' error where it takes a Mul of its own."""


def migrates(settings: Recipe) -> bool:
    """Whether the recipe moves scales, and layers have grids for which that matters."""
    rounds_inputs = not settings.weight_only and target_of(settings.target).placing != "half"
    return settings.migrate_norms and rounds_inputs


def fewest_bits(settings: Recipe) -> int:
    """Bits that weights may come to have: what helps with them helps with more, but not the other way round."""
    shrunk = settings.max_size or settings.avg_bits or settings.max_bops or settings.max_cost
    own = (layer.weight_bits for layer in settings.layers)
    counts = (settings.weight_bits, settings.codebook_bits or 8, FEW if shrunk else 8, *(bits or 8 for bits in own))
    return max(2, min(counts))


def migrate_norms(prepared: Prepared, rows: Dataset, probe: Feeds, settings: Recipe, log: Log = Silence()) -> Prepared:
    """`prepared` with the migrations that help, checked on `probe`; what is refused is recorded with the passes."""
    bits = fewest_bits(settings)
    choices = choose_migrations(prepared.model, rows, settings.activation_bits, bits, log, seed=settings.seed)
    model = prepared.model.clone()
    applied = passes.apply(model, [MigrateNorms(choices)], probe)
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
        steps_of=_steps if weight_bits < 7 else None,
    )


def _steps(matrix: Matrix, grid: Grid) -> npt.NDArray[np.float32]:
    """Like those of the plan for few bits, but symmetric and from fewer clippings: here only their sizes matter."""
    return least_squares(matrix.astype(np.float32), grid, 1, tries=TRIES)
