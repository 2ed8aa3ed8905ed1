"""What `quantize` returns, and what it is asked to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxq import graph
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.pipeline.prepare import Prepared
from onnxq.plan import save_learned, save_plan
from onnxq.recipe import Recipe, plain
from onnxq.report import html_report
from onnxq.types import BlockResult, Evaluation, LearnedLayer, QuantPlan, Summary, TuningStep, Verdict
from onnxq.types.details import Details


@dataclass(frozen=True)
class Checks:
    """What is measured about a result.

    Attributes:
        verify: Compare it with the float model.
        time_it: Measure latency while verifying.
        explain: Measure every layer, for the report.
    """

    verify: bool = True
    time_it: bool = True
    explain: bool = False


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
        save_plan(self.plan, Path(path))
        if self.learned:
            save_learned(self.learned, Path(path).with_suffix(".npz"))

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
