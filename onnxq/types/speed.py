"""Times: of models side by side, and what placing nodes by measured time gained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A point estimate with a 95 % confidence interval."""

    value: float
    low: float
    high: float


NEGLIGIBLE = 0.01
"""Ratios nearer to 1 than this are no difference: a file timed against itself differs by up to half of it."""


def _compare(ratio: Interval | None) -> str:
    if ratio is None:
        return "the reference"
    if ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) < NEGLIGIBLE:
        return f"no difference (95 % CI {1 / ratio.high:.2f}-{1 / ratio.low:.2f})"
    if ratio.value < 1:
        return f"{1 / ratio.value:.2f}x faster (95 % CI {1 / ratio.high:.2f}-{1 / ratio.low:.2f})"
    return f"{ratio.value:.2f}x SLOWER (95 % CI {ratio.low:.2f}-{ratio.high:.2f})"


@dataclass(frozen=True)
class Latency:
    """Latency of one model in one setting.

    Attributes:
        model: Path of the file.
        provider: "cpu", "cuda", ...: the provider asked for.
        ran_on: Providers that nodes really ran on.
        threads: Intra-op threads.
        batch: Rows per call.
        samples_ms: Raw wall times of single calls, milliseconds.
        median_ms: Their median.
        p95_ms: Their 95th percentile.
        ratio: Paired ratio to the first model of the same setting (below 1 is faster), None for that first model.
    """

    model: str
    provider: str
    ran_on: tuple[str, ...]
    threads: int
    batch: int
    samples_ms: tuple[float, ...]
    median_ms: float
    p95_ms: float
    ratio: Interval | None

    @property
    def words(self) -> str:
        """The comparison with the first model; says so when the provider asked for did not run."""
        fallback = ""
        if self.provider not in self.ran_on:
            fallback = f"; ran on {', '.join(self.ran_on) or 'nothing'}, not on {self.provider}"
        return _compare(self.ratio) + fallback


@dataclass(frozen=True)
class Placed:
    """What measured placement changed.

    Attributes:
        provider: Where it measured.
        threads: Intra-op threads.
        layers: Integer layers that the rules of placement alone give.
        back: Those of them that run in float again.
        before: Time of the network that the rules give, as a share of the float file's.
        after: The same of the network that was kept.
        rounds: Other placements that were timed.
    """

    provider: str
    threads: int
    layers: int
    back: tuple[str, ...]
    before: Interval
    after: Interval
    rounds: int

    @property
    def pays(self) -> bool:
        """Whether integers gain time at all: what was kept is not slower than the float file."""
        return self.after.low <= 1

    @property
    def words(self) -> str:
        """What was gained, in one phrase."""
        tried = f"{self.rounds} other placement{'s' if self.rounds != 1 else ''} timed"
        if not self.back:
            return f"the rules' placement is kept, {self.before.value:.2f}x of float's time ({tried})"
        gained = f"{self.before.value:.2f}x -> {self.after.value:.2f}x of float's time"
        return f"{len(self.back)} of {self.layers} layers back in float, {gained}"
