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
DRIFT = 0.05
"""The same for two runs of the program: where memory happens to lie differs from process to process."""


def compare_words(ratio: Interval | None) -> str:
    """What a ratio of times to the reference's says; below 1 is faster."""
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
        return compare_words(self.ratio) + fallback


@dataclass(frozen=True)
class Change:
    """One model in one setting, in two runs of `benchmark`.

    Attributes:
        model: As it is called now.
        provider: Execution provider.
        threads: Intra-op threads.
        batch: Rows per call.
        then_ms: Median of the older run.
        now_ms: Median of this one.
        times: now / then of the medians.
        against_first: The same of the paired ratios to the first model of the setting, in which the load of the machine
            cancels; None for that first model, or where the older run has another.
    """

    model: str
    provider: str
    threads: int
    batch: int
    then_ms: float
    now_ms: float
    times: Interval
    against_first: Interval | None

    @property
    def exceeds(self) -> bool:
        """Whether the difference is larger than the noise, within the runs and from run to run."""
        found = self.against_first or self.times
        clear = found.low > 1 or found.high < 1
        return clear and abs(found.value - 1) >= DRIFT

    @property
    def words(self) -> str:
        """What may be said about it."""
        found = self.against_first or self.times
        interval = f"({found.low:.2f}-{found.high:.2f})"
        if not self.exceeds:
            return f"within the noise {interval}"
        word = f"{1 / found.value:.2f}x faster" if found.value < 1 else f"{found.value:.2f}x SLOWER"
        return f"{word} than then {interval}" + ("" if self.against_first else ", or the machine is")


@dataclass(frozen=True)
class Comparison:
    """One run of `benchmark` against an older one.

    Attributes:
        old: File of the older run.
        machine_differs: How the machines differ, one phrase each.
        missing: Models and settings of this run that the older one does not have.
        changes: Those that both have.
    """

    old: str
    machine_differs: tuple[str, ...]
    missing: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Peak:
    """What this machine reaches through the runtime, at best.

    Attributes:
        threads: Intra-op threads.
        int8_gmacs: 10^9 multiply-accumulates of 8-bit integers per second.
        float_gmacs: 10^9 of float32.
        stream_gbytes: 10^9 bytes of weights per second that one row is multiplied with.
    """

    threads: int
    int8_gmacs: float
    float_gmacs: float
    stream_gbytes: float


@dataclass(frozen=True)
class Work:
    """What one call of a model takes.

    Attributes:
        integer_macs: Multiply-accumulates in integer kernels.
        float_macs: Those in float kernels.
        bytes: Of constants, inputs and outputs.
    """

    integer_macs: int
    float_macs: int
    bytes: int


@dataclass(frozen=True)
class Roof:
    """How near a model comes to the machine's peak.

    Attributes:
        work: Of one call.
        peak: Of the machine.
        best_ms: Its fastest call.
    """

    work: Work
    peak: Peak
    best_ms: float

    @property
    def least_ms(self) -> float:
        """Milliseconds that the work takes at the peak."""
        compute = self.work.integer_macs / self.peak.int8_gmacs + self.work.float_macs / self.peak.float_gmacs
        return max(compute, self.work.bytes / self.peak.stream_gbytes) / 1e6

    @property
    def share(self) -> float:
        """Of the machine's peak that the fastest call reaches."""
        return self.least_ms / self.best_ms


@dataclass(frozen=True)
class Placed:
    """What measured placement changed.

    Attributes:
        provider: Where it measured.
        threads: Intra-op threads.
        layers: Integer layers that the rules of placement alone give.
        back: Those of them that run in float again.
        nodes: All nodes that do, layers or not.
        before: Time of the network that the rules give, as a share of the float file's.
        after: The same of the network that was kept.
        rounds: Other placements that were timed.
    """

    provider: str
    threads: int
    layers: int
    back: tuple[str, ...]
    nodes: tuple[str, ...]
    before: Interval
    after: Interval
    rounds: int

    @property
    def words(self) -> str:
        """What was gained, in one phrase."""
        tried = f"{self.rounds} other placement{'s' if self.rounds != 1 else ''} timed"
        if not self.back:
            return f"the rules' placement is kept, {self.before.value:.2f}x of float's time ({tried})"
        gained = f"{self.before.value:.2f}x -> {self.after.value:.2f}x of float's time"
        return f"{len(self.back)} of {self.layers} layers back in float, {gained}"


@dataclass(frozen=True)
class Formed:
    """Products that are computed in another form than on a fixed grid, because the clock said so.

    Attributes:
        kinds: Kinds of products that were timed.
        dynamic: Layers whose input is rounded to its own range in every run.
        blocks: Layers with weights in blocks, which round their input themselves.
        before: Time of the network with fixed grids alone, as a share of the float file's; None where no other network
            was timed.
        after: The same of the network with other forms; None where none was kept.
        refused: Why what the kinds promised was not kept; "" where nothing was refused.
    """

    kinds: int
    dynamic: tuple[str, ...]
    blocks: tuple[str, ...]
    before: Interval | None = None
    after: Interval | None = None
    refused: str = ""

    @property
    def words(self) -> str:
        """What was gained, in one phrase."""
        timed = f"{self.kinds} kind{'s' if self.kinds != 1 else ''} timed"
        if self.before is None or self.after is None:
            return f"fixed grids are kept ({timed}{'; ' if self.refused else ''}{self.refused})"
        parts = ((self.dynamic, "rounded in every run"), (self.blocks, "in blocks"))
        forms = ", ".join(f"{len(names)} {how}" for names, how in parts if names)
        return f"{forms}: {self.before.value:.2f}x -> {self.after.value:.2f}x of float's time"
