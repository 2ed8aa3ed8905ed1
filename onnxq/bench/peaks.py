"""What this machine reaches at most: a few matrix products and convolutions, timed in the runtime itself.

Chains of equal layers, so that what surrounds them weighs little, in float and as they are emitted in integers: the
best rate of any of them is the peak. One row times a matrix reads every weight once and computes next to nothing: its
best rate is how fast weights arrive. Measured once per machine, version of the runtime and number of threads; the
result is kept in the user's cache folder (`peak_file`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from onnxq import graph, runtime
from onnxq.emit import emit
from onnxq.plan import Range, make_plan, place
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Peak

SECONDS, LEAST_RUNS = 0.06, 4
"""Time per chain and number type, and the fewest runs."""
ROW_SIZES = ((1024, 1024), (2048, 2048))
"""Matrices that one row is multiplied with: their float weights take 4 and 16 MB."""


@dataclass(frozen=True)
class _Chain:
    """A chain of equal layers.

    Attributes:
        kind: "Conv" or "MatMul".
        count: Number of layers.
        shape: Of its input.
        weight: Of each layer.
    """

    kind: str
    count: int
    shape: tuple[int, ...]
    weight: tuple[int, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a run."""
        places = math.prod(self.shape[2:]) if self.kind == "Conv" else math.prod(self.shape[:-1])
        return self.count * places * math.prod(self.weight)

    def model(self) -> graph.Model:
        """It, with random weights."""
        rng = np.random.default_rng(0)
        spread = (
            math.sqrt(2 * self.weight[0] / math.prod(self.weight)) if self.kind == "Conv" else self.weight[0] ** -0.5
        )
        weights = {f"w{i}": (spread * rng.standard_normal(self.weight)).astype(np.float32) for i in range(self.count)}
        pads = "<pads = [1, 1, 1, 1]>" if self.kind == "Conv" else ""
        lines = "".join(
            f"[l{i}] h{i} = {self.kind}{pads}({'x' if not i else f'r{i - 1}'}, w{i}) [a{i}] r{i} = Relu(h{i})\n"
            for i in range(self.count)
        )
        shape = ",".join(map(str, self.shape))
        text = f"g (float[{shape}] x) => (float[{','.join('?' * len(self.shape))}] r{self.count - 1}) {{ {lines} }}"
        return graph.from_text(text, weights)


CHAINS = (
    _Chain("Conv", 3, (1, 64, 56, 56), (64, 64, 3, 3)),
    _Chain("Conv", 3, (1, 256, 14, 14), (256, 256, 3, 3)),
    _Chain("MatMul", 3, (256, 768), (768, 768)),
    _Chain("MatMul", 2, (384, 1024), (1024, 1024)),
)


def measure_peak(threads: int) -> Peak:
    """Time everything, now; takes about a second."""
    floats = max(_rate(chain, threads, integer=False) for chain in CHAINS)
    integers = max(_rate(chain, threads, integer=True) for chain in CHAINS)
    rows = [_Chain("MatMul", 1, (1, size[0]), size) for size in ROW_SIZES]
    stream = max(4 * _rate(row, threads, integer=False) for row in rows)
    return Peak(threads, integers, floats, stream)


def _rate(chain: _Chain, threads: int, *, integer: bool) -> float:
    """10^9 multiply-accumulates per second, at best."""
    model = chain.model()
    if integer:
        placement = place(model)
        ranges = {name: Range(-2.0, 2.0, "given") for name in placement.tensors}
        model = emit(model, make_plan(model, placement, ranges))
    session = Session(model, SessionConfig(threads=threads))
    feeds = {"x": np.random.default_rng(1).standard_normal(chain.shape).astype(np.float32)}
    session.run(feeds)
    best, runs, began = math.inf, 0, time.perf_counter()
    while runs < LEAST_RUNS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter_ns()
        session.run(feeds)
        best, runs = min(best, time.perf_counter_ns() - start), runs + 1
    return chain.macs / best


def peak_file() -> Path:
    """Where peaks are kept: `$XDG_CACHE_HOME/onnxq/peaks.json`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "onnxq" / "peaks.json"


def peak(threads: int, *, fresh: bool = False) -> Peak:
    """What this machine reaches with so many threads (0: the runtime's choice), from the cache where it is there.

    Args:
        threads: Intra-op threads.
        fresh: Measure anew; the larger of both figures is kept, because load only lowers them.
    """
    known = _read()
    key = _key(threads)
    old = _peak_of(known.get(key), threads)
    if old is not None and not fresh:
        return old
    found = measure_peak(threads)
    if old is not None:
        found = Peak(
            threads,
            max(found.int8_gmacs, old.int8_gmacs),
            max(found.float_gmacs, old.float_gmacs),
            max(found.stream_gbytes, old.stream_gbytes),
        )
    _write({**known, key: asdict(found)})
    return found


def _key(threads: int) -> str:
    """What a peak depends on: processor, version of the runtime, threads."""
    facts = {**runtime.machine(), "processor": runtime.processor(), "threads": threads}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read() -> dict[str, object]:
    with suppress(OSError, ValueError):
        found = json.loads(peak_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _peak_of(entry: object, threads: int) -> Peak | None:
    """A cached entry, if it is one."""
    if not isinstance(entry, Mapping):
        return None
    figures = [entry.get(name) for name in ("int8_gmacs", "float_gmacs", "stream_gbytes")]
    if not all(isinstance(figure, float) and figure > 0 and math.isfinite(figure) for figure in figures):
        return None
    return Peak(threads, *(float(figure) for figure in figures if isinstance(figure, float)))


def _write(known: Mapping[str, object]) -> None:
    """Keep them; a folder that cannot be written costs a second next time."""
    with suppress(OSError):
        path = peak_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with graph.atomic_path(path) as temporary:
            temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
