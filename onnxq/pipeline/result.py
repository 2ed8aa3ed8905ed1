"""What `quantize` returns, and what it is asked to measure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnxq import graph
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.pipeline.prepare import Prepared
from onnxq.plan import Origin, save_learned, save_with_origin
from onnxq.recipe import Recipe, plain
from onnxq.report import html_report
from onnxq.types import BlockResult, Evaluation, LearnedLayer, QuantPlan, Summary, TuningStep, Verdict
from onnxq.types.details import Details
from onnxq.types.target import target_of


@dataclass(frozen=True)
class Checks:
    """What is measured about a result.

    Attributes:
        verify: Compare it with the float model.
        time_it: Measure latency while verifying.
        explain: Measure every layer, for the report.
        ranges: Look for the extremes of every tensor, so that the plan can be emitted for any target.
    """

    verify: bool = True
    time_it: bool = True
    explain: bool = False
    ranges: bool = False


@dataclass(frozen=True)
class QuantizedModel:
    """The result of `quantize`.

    Attributes:
        model: The QDQ graph.
        plan: The grids and the placement behind it.
        prepared: The float graph it was made from.
        recipe: The resolved recipe.
        data: Where the calibration rows came from.
        rows: How many of them calibrated the ranges.
        verdict: What verification found; None for a dry run.
        learned: Codes and biases that replace plain rounding, by node name.
        blocks: What learning did to each block.
        missed: Why the budgets are not met; "" where they are.
        steps: What each stage of tuning did to the outputs.
        details: Every layer measured, for the report; None where that was not asked for.
        progress: Folder that holds what this run learned block by block; None where it kept none.
        ranges: (smallest, largest) of every float tensor, where `Checks.ranges` asked for it.
    """

    model: Model
    plan: QuantPlan
    prepared: Prepared
    recipe: Recipe
    data: Mapping[str, object]
    rows: int
    verdict: Verdict | None
    learned: Mapping[str, LearnedLayer]
    blocks: tuple[BlockResult, ...] = ()
    steps: tuple[TuningStep, ...] = ()
    missed: str = ""
    details: Details | None = None
    progress: Path | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether some grid has no kernel and is emulated at the cost of speed."""
        return self.plan.simulated

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file, whole or not at all; returns its path."""
        target = Path(path)
        graph.save(self.model, target)
        return target

    def save_plan(self, path: str | Path) -> None:
        """Write the plan as JSON; learned codes and biases go beside it, into a file ending in .npz."""
        target = Path(path)
        save_with_origin(self.plan, self._origin(target), target)
        if self.learned:
            save_learned(self.learned, target.with_suffix(".npz"))

    def _origin(self, path: Path) -> Origin:
        """Where the plan in `path` came from."""
        said = {key: text for key, text in self.model.metadata_props.items() if key.startswith("onnxq.")}
        return Origin(
            model=Path(os.path.relpath(self.prepared.path.resolve(), path.parent.resolve())).as_posix(),
            sha256=said.get("onnxq.source_sha256", ""),
            simplified=self.prepared.simplified is None,
            rewritten=bool(self.prepared.passes),
            without=left_out(self.recipe),
            equalize=not self.recipe.per_channel,
            migrations={
                name: {
                    "ratios": chosen.ratios.tolist(),
                    "shifts": chosen.shifts.tolist(),
                    "scale": float(chosen.scale),
                    "zero_point": int(chosen.zero_point),
                }
                for name, chosen in self.prepared.migrations.items()
            },
            packed=packs(self.recipe, self.plan),
            learned=bool(self.learned),
            metadata=said,
            ranges=self.ranges,
        )

    def summary(
        self, output: str | Path | None = None, *, evaluation: Evaluation | None = None, seconds: float = 0.0
    ) -> Summary:
        """The run as reports show it.

        Args:
            output: The file that `save` wrote; None where there is none.
            evaluation: What `evaluate` found about it.
            seconds: Wall time of the run.
        """
        return Summary(
            source=str(self.prepared.path),
            output=None if output is None else str(output),
            recipe=plain(self.recipe),
            data=self.data,
            rows=self.rows,
            plan=self.plan,
            verdict=self.verdict,
            evaluation=evaluation,
            seconds=seconds,
            blocks=self.blocks,
            steps=self.steps,
        )

    def save_report(
        self, path: str | Path, output: str | Path | None = None, *, evaluation: Evaluation | None = None
    ) -> Path:
        """Write the HTML report; returns its path. Arguments as of `summary`.

        Raises:
            UsageError: The run did not measure its layers: `Checks(explain=True)` makes it.
        """
        if self.details is None:
            raise UsageError("the report needs every layer measured: quantize with checks=Checks(explain=True).")
        target = Path(path)
        target.write_text(html_report(self.summary(output, evaluation=evaluation), self.details), encoding="utf-8")
        return target


def left_out(settings: Recipe) -> tuple[str, ...]:
    """Rewrites that a recipe leaves out: by name, and those that its target gains nothing by."""
    useless = (*target_of(settings.target).without, *(("SplitIdentity",) if settings.weight_only else ()))
    return (*settings.without, *(name for name in useless if name not in settings.without))


def packs(settings: Recipe, plan: QuantPlan) -> bool:
    """Whether the file stores weights packed."""
    few = any(grid.bits < 7 for grid in plan.weights.values())
    return settings.packed and few and target_of(settings.target).packed
