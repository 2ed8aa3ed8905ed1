"""The walk from block to block."""

import hashlib
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning import TWO, plan_of

from onnxq import graph
from onnxq.emit import emit
from onnxq.plan import find_blocks
from onnxq.tune import TuneMoments, batches_of, block_error, halves, walk
from onnxq.types import LearnedLayer, Tuned


def network():
    """A block without layers, three with one, a residual one; a second input for the last."""
    text = """g (float[n,4,8,8] x, float[n,3] z, float mean, float[6,4,3,3] w, float[6] b, float[6,6,3,3] v, float[6] c,
    float[6,6,1,1] u, float[6,3] t, float[3] d) => (float[n,3] y, float[n,6,8,8] k) {
        s = Sub(x, mean) [a] h = Conv<pads = [1, 1, 1, 1]>(s, w, b) i = Relu(h)
        [b] j = Conv<pads = [1, 1, 1, 1]>(i, v, c) k = Add(j, i) [c] l = Conv(k, u) m = Relu(l)
        p = GlobalAveragePool(m) q = Flatten(p) [d] r = Gemm(q, t, d) y = Add(r, z)
    }"""
    constants = {"w": weights(6, 4, 3, 3) / 4, "b": weights(6), "v": weights(6, 6, 3, 3) / 6, "c": weights(6, seed=1)}
    constants |= {"u": weights(6, 6, 1, 1), "t": weights(6, 3), "d": weights(3), "mean": np.float32(0.2)}
    m = model(text, **constants)
    graph.infer_shapes(m)
    return m


BATCHES = [{"x": weights(40, 4, 8, 8, seed=s), "z": weights(40, 3, seed=s)} for s in range(5)]


@pytest.fixture(scope="module")
def start():
    m = network()
    blocks = find_blocks(m)
    assert [bool(block.layers) for block in blocks] == [False, True, True, True, True]
    return m, blocks, Tuned(plan_of(m, BATCHES, TWO, 0.8))


def digest(feeds):
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in feeds.items()}


@dataclass(frozen=True)
class Spy:
    """Tunes moments, and notes what it was given."""

    seen: dict = field(default_factory=dict)
    judged: bool = False
    name: str = "spy"

    def __call__(self, job, tuned):
        self.seen[job.block.name, "feeds"] = [digest(feeds) for feeds in job.feeds]
        self.seen[job.block.name, "floats"], self.seen[job.block.name, "targets"] = list(job.floats), list(job.targets)
        self.seen[job.block.name, "split"] = job.train, job.held, job.seed
        return TuneMoments()(job, tuned)


def test_methods_get_every_block_with_layers_once(start):
    m, blocks, tuned = start
    spy, stages = Spy(), []
    final, results = walk(m, tuned, blocks, [spy], BATCHES, seed=3, after=lambda *given: stages.append(given))
    assert [number for number, _, _ in stages] == [2, 3, 4, 5]
    assert [result.block for result in results] == [block.name for block in blocks[1:]]
    assert {name for name, _ in spy.seen} == {block.name for block in blocks[1:]}
    assert final.layers.keys() == {"a", "b", "c", "d"}
    assert [spy.seen[block.name, "split"] for block in blocks[1:]] == [
        ((0, 1, 2, 3), (4,), 3 + i) for i in (1, 2, 3, 4)
    ]
    prefixes = [tuned, *(known for _, known, _ in stages)]
    assert not any(set(after.layers) == set(before.layers) for before, after in pairwise(prefixes))


def chained(m, blocks, known, feeds):
    """What each block is fed by the ones in front of it, one quantized block after the other."""
    from onnxq.tune import Job
    from onnxq.tune.job import quantized

    values, given = dict(feeds), []
    for block in blocks:
        part = graph.sub_model(m, block.inputs, block.outputs)
        inputs = {name: values[name] for name in block.inputs}
        given.append(inputs)
        values |= run(quantized(Job(block, part, [], [], [], (), ()), known), inputs, optimize="all")
    return given, values


def test_feeds_are_what_the_emitted_blocks_in_front_make(start):
    m, blocks, tuned = start
    spy = Spy()
    final, _ = walk(m, tuned, blocks, [spy], BATCHES)
    for batch, feeds in enumerate(BATCHES):
        given, values = chained(m, blocks, final, feeds)  # behind a block, its entries do not change any more
        for block, inputs in zip(blocks[1:], given[1:], strict=True):
            assert spy.seen[block.name, "feeds"][batch] == digest(inputs)
        whole = run(emit(m, final.plan, learned=final.layers), feeds, optimize="all")
        for name, value in whole.items():
            assert np.abs(value - values[name]).max() < 0.02 * np.ptp(value)
        plain = run(graph.with_outputs(m, ["s", "i", "k", "m", "q"]), feeds) | feeds
        for block in blocks[1:]:
            for kind, names in (("floats", block.inputs), ("targets", block.outputs)):
                assert spy.seen[block.name, kind][batch].keys() == set(names)
                for name, value in spy.seen[block.name, kind][batch].items():
                    np.testing.assert_allclose(value, plain[name], rtol=1e-3, atol=1e-4)


def same(one, other):
    return one.plan == other.plan and all(
        np.array_equal(layer.codes, other.layers[name].codes) and np.array_equal(layer.bias, other.layers[name].bias)
        for name, layer in one.layers.items()
    )


@pytest.mark.parametrize("done", [1, 2, 3, 4, 5])
def test_a_walk_goes_on_where_it_stopped(start, done):
    m, blocks, tuned = start
    stages = {1: tuned}
    final, _ = walk(m, tuned, blocks, [TuneMoments()], BATCHES, after=lambda n, known, _: stages.update({n: known}))
    spy = Spy()
    resumed, results = walk(m, stages[done], blocks, [spy], BATCHES, done=done)
    assert same(resumed, final)
    assert len(results) == 5 - done
    assert {name for name, _ in spy.seen} == {block.name for block in blocks[done:]}


def test_a_small_budget_changes_nothing(start):
    m, blocks, tuned = start
    plain, _ = walk(m, tuned, blocks, [TuneMoments()], BATCHES)
    spilled, _ = walk(m, tuned, blocks, [TuneMoments()], BATCHES, budget=10_000)
    assert same(plain, spilled)


@dataclass(frozen=True)
class Spoil:
    """Turns all signs around."""

    judged: bool
    name: str = "spoil"

    def __call__(self, job, tuned):
        known = TuneMoments()(job, tuned)
        worse = {name: LearnedLayer(-layer.codes, layer.bias) for name, layer in known.layers.items()}
        return Tuned(known.plan, worse)


def test_judged_methods_must_not_make_a_block_worse(start):
    m, blocks, tuned = start
    judged = replace(TuneMoments(), judged=True)
    final, results = walk(m, tuned, blocks, [judged, Spoil(True)], BATCHES)
    assert [(r.block, r.method) for r in results[:2]] == [("a", "moments"), ("a", "spoil")]
    assert all(result.after > result.before and not result.kept for result in results[1::2])
    assert [result.kept for result in results[::2]] == [r.after < r.before for r in results[::2]]
    alone, singles = walk(m, tuned, blocks, [judged], BATCHES)
    assert same(final, alone)
    assert [r.after for r in singles] == [r.after for r in results[::2]]
    for moved, spoiled in zip(results[::2], results[1::2], strict=True):
        assert spoiled.before == (moved.after if moved.kept else moved.before)
    spoiled, results = walk(m, tuned, blocks, [Spoil(False)], BATCHES)
    assert all(result.kept for result in results)
    assert not same(spoiled, final)


def test_the_error_of_a_block_by_hand(start):
    m, blocks, tuned = start
    caught = {}

    @dataclass(frozen=True)
    class Catch:
        judged: bool = True
        name: str = "catch"

        def __call__(self, job, known):
            _, values = chained(m, [job.block], known, job.feeds[4])
            shares = []
            for name in job.block.outputs:
                target = job.targets[4][name].astype(np.float64)
                shares.append(np.square(values[name] - target).sum() / np.square(target).sum())
            caught[job.block.name] = np.mean(shares), block_error(job, known)
            return known

    _, results = walk(m, tuned, blocks, [Catch()], BATCHES)
    for result in results:
        by_hand, found = caught[result.block]
        assert result.before == found == pytest.approx(by_hand, rel=1e-5)
        assert result.after == result.before
        assert not result.kept


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 7), st.integers(0, 40))
def test_batches_hold_the_first_rows_in_order(counts, size, limit):
    rows = np.arange(sum(counts))
    ends = np.cumsum([0, *counts])
    feeds = [{"x": rows[a:b, None], "z": -rows[a:b]} for a, b in pairwise(ends)]
    found = list(batches_of(feeds, size, free=True, limit=limit))
    wanted = min(limit, len(rows))
    assert [len(batch["x"]) for batch in found] == [size] * (wanted // size) + [wanted % size] * (wanted % size > 0)
    if found:
        np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in found])[:, 0], rows[:wanted])
        np.testing.assert_array_equal(np.concatenate([batch["z"] for batch in found]), -rows[:wanted])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 2)), max_size=8), st.integers(1, 7), st.integers(0, 40))
def test_batches_never_join_other_shapes(kinds, size, limit):
    feeds = [{"x": np.full((count, width), index)} for index, (count, width) in enumerate(kinds)]
    found = list(batches_of(feeds, size, free=True, limit=limit))
    assert all(1 <= len(batch["x"]) <= size for batch in found)
    flat = [tuple(row) for batch in found for row in batch["x"]]
    assert flat == [tuple(row) for part in feeds for row in part["x"]][:limit]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=8), st.integers(0, 20))
def test_fixed_batches_pass_as_they_are(counts, limit):
    feeds = [{"x": np.zeros((count, 2)), "k": np.asarray(3)} for count in counts]
    found = list(batches_of(feeds, 3, free=False, limit=limit))
    assert all(one is other for one, other in zip(found, feeds, strict=False))
    needed = next((i + 1 for i in range(len(counts)) if sum(counts[: i + 1]) >= limit), len(counts))
    assert len(found) == (needed if limit else 0)


def test_scalars_count_as_one_row():
    assert len(list(batches_of([{"k": np.asarray(1)}] * 5, 3, free=False, limit=2))) == 2


def test_halves():
    assert halves(1) == ((0,), (0,))
    assert halves(2) == ((0,), (1,))
    assert halves(5) == ((0, 1, 2, 3), (4,))
    assert halves(10, 0.3) == (tuple(range(7)), (7, 8, 9))
    for count in range(2, 30):
        train, held = halves(count)
        assert (*train, *held) == tuple(range(count))
        assert train
        assert held
