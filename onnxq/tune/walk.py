"""The walk from block to block.

At every cut the walk holds the activations of the float network and those of the quantized network, for all
calibration rows. Only the next block runs: in float for the targets, then, once it is tuned, in the kernels that users
will run, for the inputs of the blocks behind it. Where a method cannot work on a block as a whole, it gets the block's
single layers, each between what the quantized layers in front of it make and its float output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import Model
from onnxq.plan import Block, layer_slices
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.cache import BUDGET_BYTES, Cache, View
from onnxq.tune.job import Job, Method, Rest, block_error, quantized
from onnxq.types import BlockResult, Feeds, Log, Silence, Tuned, Within

QUIET = SessionConfig(stop_spinning=True)
HELD_SHARE = 0.2


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
    batches: Iterable[Feeds],
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
        batches: Calibration rows; read once.
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
    with Cache(budget) as cache:
        count = 0
        for batch, given in enumerate(batches):
            count = batch + 1
            for name, value in given.items():
                if name in last:
                    cache.put(_key("float", name), batch, value)
                    cache.put(_key("quantized", name), batch, value)
        train, held = halves(count)
        for index, block in enumerate(blocks):
            part = graph.sub_model(model, block.inputs, block.outputs)
            feeds = _view(cache, "quantized", block.inputs, count)
            floats = _view(cache, "float", block.inputs, count)
            targets = _view(cache, "float", block.outputs, count)
            _advance(cache, part, "float", floats, count)
            here = Within(log, f"block {index + 1} of {len(blocks)}: {block.name}")
            rest = partial(_rest, model, blocks[index:], cache, count)
            job = Job(block, part, feeds, floats, targets, train, held, seed + index, here, rest)
            if index >= done and block.layers:
                here.step("measuring")
                tuned, found = tune_block(job, tuned, methods)
                results += found
                if after is not None:
                    after(index + 1, tuned, found)
            _advance(cache, quantized(job, tuned), "quantized", feeds, count)
            _forget(cache, blocks, last, index, count)
    return tuned, results


def _key(kind: str, name: str) -> str:
    return f"{kind}:{name}"


def _view(cache: Cache, kind: str, names: Sequence[str], batches: int) -> View:
    return View(cache, {name: _key(kind, name) for name in names}, batches)


def _advance(cache: Cache, model: Model, kind: str, feeds: Sequence[Feeds], batches: int) -> None:
    """Run a block on what one network feeds it, and keep its outputs."""
    session = Session(model, QUIET)
    needed = [spec.name for spec in session.inputs]
    for batch in range(batches):
        given = feeds[batch]
        for name, value in session.run({name: given[name] for name in needed}).items():
            cache.put(_key(kind, name), batch, value)


def _rest(model: Model, blocks: Sequence[Block], cache: Cache, batches: int, reach: int) -> Rest | None:
    """What is behind the first of `blocks` in its stage, at most `reach` blocks; runs them in float."""
    block = blocks[0]
    behind = [later for later in blocks[1 : 1 + reach] if later.stage == block.stage]
    made = {name for later in behind for name in later.outputs}
    inputs = tuple(dict.fromkeys(name for later in behind for name in later.inputs if name not in made))
    if not set(inputs) & set(block.outputs):
        return None
    outputs = behind[-1].outputs
    part = graph.sub_model(model, inputs, outputs)
    floats = _view(cache, "float", inputs, batches)
    _advance(cache, part, "ahead", floats, batches)
    return Rest(part, inputs, outputs, floats, _view(cache, "ahead", outputs, batches))


def _last_uses(blocks: Sequence[Block]) -> Mapping[str, int]:
    return {name: index for index, block in enumerate(blocks) for name in block.inputs}


def _forget(cache: Cache, blocks: Sequence[Block], last: Mapping[str, int], index: int, batches: int) -> None:
    block = blocks[index]
    for name in (name for later in blocks[index + 1 :] if later.stage == block.stage for name in later.outputs):
        for batch in range(batches):
            cache.drop(_key("ahead", name), batch)
    for name in (*block.inputs, *block.outputs):
        if last.get(name, -1) <= index:
            for batch in range(batches):
                cache.drop(_key("float", name), batch)
                cache.drop(_key("quantized", name), batch)


def tune_block(job: Job, tuned: Tuned, methods: Sequence[Method]) -> tuple[Tuned, list[BlockResult]]:
    """Apply methods to one block, one after the other.

    A method that refuses the block is given its layers instead; what it refuses then stays as it is, and the log says
    why. A judged method's result is dropped where it makes the block's outputs worse.

    Returns:
        What was found, and what each method did.
    """
    found: list[BlockResult] = []
    error = block_error(job, tuned)
    for method in methods:
        began = time.monotonic()
        trial = _tried(job, tuned, method)
        reached = block_error(job, trial)
        kept = not method.judged or reached < error
        found.append(BlockResult(job.block.name, method.name, error, reached, kept, time.monotonic() - began))
        if kept:
            tuned, error = trial, reached
    return tuned, found


def _tried(job: Job, tuned: Tuned, method: Method) -> Tuned:
    """What `method` makes of the block, or else of its layers."""
    try:
        return method(job, tuned)
    except UnsupportedError as reason:
        slices = [part for part in layer_slices(job.model) if part.layers[0] in tuned.plan.weights]
        if len(slices) == 1 and set(slices[0].nodes) == set(job.block.nodes):
            job.log.note(f"block {job.block.name}: plain rounding stays: {reason}")
            return tuned
        job.log.note(f"block {job.block.name}: {method.name} takes its layers one by one: {reason}")
    for index, part in enumerate(slices):
        with Cache(0) as cache:
            layer = _layer_job(job, tuned, part, cache, job.seed + index)
            try:
                trial = method(layer, tuned)
            except UnsupportedError as reason:
                job.log.note(f"layer {part.layers[0]}: plain rounding stays: {reason}")
                continue
            if not method.judged or block_error(layer, trial) < block_error(layer, tuned):
                tuned = trial
    return tuned


def _layer_job(job: Job, tuned: Tuned, part: Block, cache: Cache, seed: int) -> Job:
    """A layer of a block as a block of its own; its data goes to `cache`."""
    count = len(job.feeds)
    outer = set(job.block.inputs)
    sides = (
        ("float", job.model, job.floats, (*part.inputs, *part.outputs)),
        ("quantized", quantized(job, tuned), job.feeds, part.inputs),
    )
    for kind, model, feeds, names in sides:
        inner = [name for name in names if name not in outer]
        for name in set(names) & outer:
            for batch in range(count):
                cache.put(_key(kind, name), batch, feeds[batch][name])
        if inner:
            _advance(cache, graph.with_outputs(model, inner, keep=False), kind, feeds, count)
    return Job(
        part,
        graph.sub_model(job.model, part.inputs, part.outputs),
        _view(cache, "quantized", part.inputs, count),
        _view(cache, "float", part.inputs, count),
        _view(cache, "float", part.outputs, count),
        job.train,
        job.held,
        seed,
        job.log,
    )
