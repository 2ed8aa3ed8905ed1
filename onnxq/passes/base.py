"""What a pass is, and how passes are applied under guard.

A pass rewrites the graph so that the model computes the same. `apply` proves it on a probe batch: the model
runs once before and once after all passes, both without the runtime's own optimisations. Only when the
outputs disagree are the passes repeated one at a time on a copy, to find the one at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxq import graph
from onnxq.errors import DataError, ModelError, OnnxqError, RewriteError
from onnxq.runtime import Level, Session, SessionConfig
from onnxq.types import Applied, Array, Feeds

NOISE_FACTOR = 10.0
"""A difference below this multiple of what the runtime's own optimiser makes is rounding, not an error."""


class Pass(Protocol):
    """One function-preserving rewrite. Implementations are frozen dataclasses that hold no state."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of rewrites. A second call makes none."""
        ...

    def refused(self, model: graph.Model) -> Mapping[str, str]:
        """Nodes of `model` that the pass would handle but must leave as they are: node name -> reason."""
        return {}


@dataclass(frozen=True)
class Registered:
    """A pass of a user's.

    Attributes:
        name: As reports and `without` call it.
        function: Rewrites a model in place and returns the number of rewrites.
    """

    name: str
    function: Callable[[graph.Model], int]

    def __call__(self, model: graph.Model) -> int:
        """See `Pass`."""
        return self.function(model)

    def refused(self, model: graph.Model) -> Mapping[str, str]:
        """It does not say."""
        return {}


def pass_name(rewrite: Pass) -> str:
    """What reports and `without` call a pass."""
    return rewrite.name if isinstance(rewrite, Registered) else type(rewrite).__name__


def _blame(rewrite: Pass) -> str:
    if isinstance(rewrite, Registered):
        return "It was registered with register_pass."
    return "This is a bug in onnxq: please report it, with the model."


def apply(
    model: graph.Model, passes: Sequence[Pass], probe: Feeds | None = None, tolerance: float = 1e-4
) -> list[Applied]:
    """Run `passes` over `model` in place, in order, and check on `probe` that its outputs stay.

    Args:
        model: Rewritten in place; nodes and initializers that nothing reads are removed.
        passes: What to run.
        probe: A small batch of real inputs; without it nothing is checked.
        tolerance: Largest difference allowed, relative to each output's range.

    Raises:
        RewriteError: A pass failed, and `model` is as it was; or a pass changed the outputs, and `model` holds the
            rewrites of the passes before it only.
    """
    graph.remove_unused(model)
    if any(output.dtype is None or output.shape is None for node in model.graph for output in node.outputs):
        graph.infer_shapes(model)
    before = model.clone()
    counts = [_rewrite(rewrite, model, before) for rewrite in passes]
    graph.remove_unused(model)
    gap: float | None = None
    if probe is not None:
        gap = _guard(before, model, passes, probe, tolerance) if any(counts) else 0.0
    return [
        Applied(pass_name(rewrite), count, rewrite.refused(model), gap)
        for rewrite, count in zip(passes, counts, strict=True)
    ]


def _rewrite(rewrite: Pass, model: graph.Model, before: graph.Model) -> int:
    """Run one pass; where it fails, `model` becomes `before` again."""
    try:
        return rewrite(model)
    except OnnxqError:
        raise
    except Exception as error:
        model.graph = before.graph
        raise RewriteError(f"{pass_name(rewrite)} failed: {error!r}. {_blame(rewrite)}") from error


def difference(before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[float, str]:
    """The largest difference between two sets of outputs, and the output it is in.

    Floats: the largest absolute difference over the range of `before`; infinite when the shapes or the places
    of infinities and NaN differ. Everything else: the share of elements that differ.
    """
    gaps = [(_difference(before[name], after[name]), name) for name in before]
    return max(gaps, default=(0.0, ""))


def _difference(before: Array, after: Array) -> float:
    if before.shape != after.shape or before.dtype != after.dtype:
        return np.inf
    if before.size == 0:
        return 0.0
    if before.dtype.kind != "f":
        return float(np.mean(before != after))
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], np.where(finite, 0, after)[~finite], equal_nan=True):
        return np.inf
    old, new = before[finite].astype(np.float64), after[finite].astype(np.float64)
    if old.size == 0:
        return 0.0
    if not np.isfinite(new).all():
        return np.inf
    span = float(np.ptp(old)) or float(np.abs(old).max()) or 1.0
    return float(np.abs(new - old).max()) / span


def _guard(before: graph.Model, model: graph.Model, passes: Sequence[Pass], probe: Feeds, tolerance: float) -> float:
    """The gap between `before` and `model`; on a mismatch the guilty pass is undone and named."""
    expected = _outputs(before, probe)
    gap, _ = _gap(expected, model, probe)
    if gap <= tolerance:
        return gap
    # Near ties (arg-max, top-k, rounding) and random operators move with the order of additions alone.
    noise, _ = difference(expected, _outputs(before, probe, "all"))
    allowed = max(tolerance, NOISE_FACTOR * noise)
    if gap <= allowed:
        return gap
    sound, gap = before, 0.0
    for rewrite in passes:
        trial = sound.clone()
        rewrite(trial)
        gap, where = _gap(expected, trial, probe)
        if not gap <= allowed:
            model.graph = sound.graph
            graph.remove_unused(model)
            raise RewriteError(
                f"{pass_name(rewrite)} changed the model's outputs ({where}; allowed {allowed:.1g}). {_blame(rewrite)}"
            )
        sound = trial
    model.graph = sound.graph
    graph.remove_unused(model)
    return gap


def _gap(expected: Mapping[str, Array], model: graph.Model, probe: Feeds) -> tuple[float, str]:
    """Gap of `model` to `expected`, NaN when it does not run; and a description for people."""
    try:
        gap, name = difference(expected, _outputs(model, probe))
    except (ModelError, DataError) as error:
        return np.nan, str(error)
    return gap, f"{name} by {gap:.2g} of its range"


def _outputs(model: graph.Model, probe: Feeds, level: Level = "off") -> dict[str, Array]:
    return Session(model, SessionConfig(optimize=level)).run(probe)
