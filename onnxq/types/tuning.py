"""What tuning did to a whole model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningStep:
    """One stage of tuning, judged by the model's outputs on rows that nothing was learned from.

    Attributes:
        name: What was done ("learned weights").
        before: Noise over signal at the outputs, before.
        after: The same after.
        kept: Whether the result was kept.
    """

    name: str
    before: float
    after: float
    kept: bool
