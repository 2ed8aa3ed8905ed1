"""Bits that were chosen, and the refusal that still has some to offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxq.errors import TargetNotMet
from onnxq.pipeline.calibrated import Calibrated
from onnxq.types import QuantPlan
from onnxq.types.mixed import Allocation, Bits, Sensitivities


@dataclass(frozen=True)
class Choice:
    """Bits for every layer.

    Attributes:
        found: The calibrated model; its placement leaves the layers of `kept` in float.
        bits: By layer; float ones are not in it.
        allocation: The same by group, with its figures; None where nothing but a drop at 8 bits was asked for.
        kept: Layers that had to stay in float for the drop's sake, the most harmful first.
        drop: What was measured for `max_drop`; None when it was not asked for.
        known: The sensitivities that it was chosen by; None where none were needed.
    """

    found: Calibrated
    bits: Mapping[str, Bits]
    allocation: Allocation | None = None
    kept: tuple[str, ...] = ()
    drop: float | None = None
    known: Sensitivities | None = None

    @property
    def plan(self) -> QuantPlan:
        """Grids and placement."""
        return self.found.plan(self.bits)


class DropTooLarge(TargetNotMet):
    """The drop of the metric cannot be kept as small as asked for.

    Attributes:
        best: The nearest that was found.
    """

    def __init__(self, message: str, best: Choice) -> None:
        super().__init__(message)
        self.best = best
