"""The walk from block to block.

At every cut the walk holds the activations of the float network and those of the quantized network, for all
calibration rows. Only the next block runs: in float for the targets, then, once it is tuned, in the kernels that users
will run, for the inputs of the blocks behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model
from onnxq.plan import Block
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.cache import BUDGET_BYTES, Cache, View
from onnxq.tune.job import Job, Method, block_error, quantized
from onnxq.types import Feeds, Log, Silence, Tuned

QUIET = SessionConfig(stop_spinning=True)
HELD_SHARE = 0.2


@dataclass(frozen=True)
class BlockResult:
    """What one method did to one block.

    Attributes:
        block: The block.
        method: The method.
        before: Noise over signal at the block's outputs on the held rows, before.
        after: The same after.
        kept: Whether the result was kept.
        seconds: Time it took.
    """

    block: str
    method: str
    before: float
    after: float
    kept: bool
    seconds: float


def batches_of(rows: Iterable[Feeds], size: int, *, free: bool, limit: int) -> Iterator[Feeds]:
    """Rows as batches of `size`.

    Batches whose arrays differ in anything but the number of rows are never joined. The last batch may be smaller.

    Args:
        rows: Feeds of any size.
        size: Rows per batch.
        free: Whether the model takes any number of rows; if not, feeds pass as they are.
        limit: Most rows.
    """
    left = limit
    pending: list[Feeds] = []
    for feeds in rows:
        count = _rows(feeds)
        if left <= 0:
            break
        if not free:
            left -= count
            yield feeds
            continue
        taken = {name: value[: min(count, left)] for name, value in feeds.items()}
        left -= count
        if pending and not _fit(pending[0], taken):
            yield _joined(pending)
            pending = []
        pending.append(taken)
        whole = _joined(pending)
        total = _rows(whole)
        for start in range(0, total - size + 1, size):
            yield {name: value[start : start + size] for name, value in whole.items()}
        rest = {name: value[total - total % size :] for name, value in whole.items()}
        pending = [rest] if total % size else []
    if pending:
        yield _joined(pending)


def _rows(feeds: Feeds) -> int:
    return next((len(value) for value in feeds.values() if value.ndim), 1)


def _fit(one: Feeds, other: Feeds) -> bool:
    return all(one[name].shape[1:] == other[name].shape[1:] for name in one)


def _joined(feeds: Sequence[Feeds]) -> Feeds:
    return {name: np.concatenate([part[name] for part in feeds]) for name in feeds[0]} if len(feeds) > 1 else feeds[0]


def halves(batches: int, share: float = HELD_SHARE) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batches to learn from and batches that judge; a single batch is both."""
    if batches == 1:
        return (0,), (0,)
    held = max(1, round(batches * share))
    return tuple(range(batches - held)), tuple(range(batches - held, batches))


def walk(
    model: Model,
    tuned: Tuned,
    blocks: Sequence[Block],
    methods: Sequence[Method],
    batches: Sequence[Feeds],
    *,
    budget: int = BUDGET_BYTES,
    seed: int = 0,
    log: Log = Silence(),
    done: int = 0,
    after: Callable[[int, Tuned, Sequence[BlockResult]], None] | None = None,
) -> tuple[Tuned, list[BlockResult]]:
    """Tune block after block.

    Args:
        model: The prepared float model.
        tuned: What to start from.
        blocks: In topological order.
        methods: Applied to every block that has layers, in this order; the others only run.
        batches: Calibration rows.
        budget: Bytes of activations held in memory.
        seed: Of everything random; each block gets its own.
        log: Progress.
        done: Blocks at the front that `tuned` already holds; they only run.
        after: Called behind each tuned block with the number of blocks done, what is tuned, and its results.

    Returns:
        What was found, and what each method did to each block.
    """
    results: list[BlockResult] = []
    last = _last_uses(blocks)
    train, held = halves(len(batches))
    with Cache(budget) as cache:
        for batch, given in enumerate(batches):
            for name, value in given.items():
                if name in last:
                    cache.put(_key("float", name), batch, value)
                    cache.put(_key("quantized", name), batch, value)
        for index, block in enumerate(blocks):
            part = graph.sub_model(model, block.inputs, block.outputs)
            feeds = _view(cache, "quantized", block.inputs, len(batches))
            floats = _view(cache, "float", block.inputs, len(batches))
            targets = _view(cache, "float", block.outputs, len(batches))
            _advance(cache, part, "float", floats, len(batches))
            job = Job(block, part, feeds, floats, targets, train, held, seed + index)
            if index >= done and block.layers:
                log.step(f"block {index + 1} of {len(blocks)}: {block.name}")
                tuned, found = _tune(job, tuned, methods)
                results += found
                if after is not None:
                    after(index + 1, tuned, found)
            _advance(cache, quantized(job, tuned), "quantized", feeds, len(batches))
            _forget(cache, block, last, index, len(batches))
    return tuned, results


def _key(kind: str, name: str) -> str:
    return f"{kind}:{name}"


def _view(cache: Cache, kind: str, names: Sequence[str], batches: int) -> View:
    return View(cache, {name: _key(kind, name) for name in names}, batches)


def _advance(cache: Cache, model: Model, kind: str, feeds: Sequence[Feeds], batches: int) -> None:
    """Run a block on what one network feeds it, and keep its outputs."""
    session = Session(model, QUIET)
    for batch in range(batches):
        for name, value in session.run(feeds[batch]).items():
            cache.put(_key(kind, name), batch, value)


def _last_uses(blocks: Sequence[Block]) -> Mapping[str, int]:
    return {name: index for index, block in enumerate(blocks) for name in block.inputs}


def _forget(cache: Cache, block: Block, last: Mapping[str, int], index: int, batches: int) -> None:
    for name in (*block.inputs, *block.outputs):
        if last.get(name, -1) <= index:
            for batch in range(batches):
                cache.drop(_key("float", name), batch)
                cache.drop(_key("quantized", name), batch)


def _tune(job: Job, tuned: Tuned, methods: Sequence[Method]) -> tuple[Tuned, list[BlockResult]]:
    found: list[BlockResult] = []
    error = block_error(job, tuned)
    for method in methods:
        began = time.monotonic()
        trial = method(job, tuned)
        reached = block_error(job, trial)
        kept = not method.judged or reached < error
        found.append(BlockResult(job.block.name, method.name, error, reached, kept, time.monotonic() - began))
        if kept:
            tuned, error = trial, reached
    return tuned, found
