"""Two models judged on the same rows: what each row says, and what may be said of the difference."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.types.speed import Interval

SIGNIFICANT = 0.05
"""A p-value below which a difference counts as one."""


@dataclass(frozen=True)
class PerRow:
    """Which rows a model got right, so that two runs on the same rows can be compared row by row.

    Attributes:
        rows: SHA-256 of the rows; equal where two runs saw the same ones.
        right: One character per row: "1" where it was right, else "0".
    """

    rows: str
    right: str


@dataclass(frozen=True)
class Paired:
    """A model against a reference on the same rows.

    Attributes:
        gained: Rows that only the model got right.
        lost: Rows that only the reference got right.
        difference: The model's share of right rows minus the reference's, with its interval.
        p_value: McNemar's exact test of "both are equally often right".
    """

    gained: int
    lost: int
    difference: Interval
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether there is a difference to speak of."""
        return self.p_value < SIGNIFICANT

    @property
    def brief(self) -> str:
        """What may be said: inside the noise there is neither gain nor loss."""
        return self._said(f"McNemar p = {self.p_value:.2g}")

    @property
    def words(self) -> str:
        """The same with the rows that differ."""
        return self._said(f"{self.gained} rows gained, {self.lost} lost, McNemar p = {self.p_value:.2g}")

    def _said(self, test: str) -> str:
        found = self.difference
        ends = f"95 % CI {100 * found.low:+.1f} to {100 * found.high:+.1f}"
        if not self.significant:
            return f"inside the noise ({100 * found.value:+.2f} points, {ends}, {test})"
        kind = "better" if found.value > 0 else "WORSE"
        return f"{abs(100 * found.value):.2f} points {kind} ({ends}, {test})"
