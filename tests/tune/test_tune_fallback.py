"""Blocks that a method refuses, tuned layer by layer."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from helpers import model, run, weights
from tuning import TWO, job_of, plan_of

from onnxq import graph
from onnxq.emit import emit, weight_codes
from onnxq.errors import UnsupportedError
from onnxq.plan import find_blocks
from onnxq.tune import TuneMoments, walk
from onnxq.tune.job import restrict
from onnxq.tune.walk import tune_block
from onnxq.types import LearnedLayer, Silence, Tuned

BATCHES = [{"x": weights(40, 4, 8, 8, seed=s)} for s in range(5)]


def stubborn():
    """A residual block with an operator that torch does not run here, between its layers, and a layer behind it."""
    text = """g (float[n,4,8,8] x, float[6,4,3,3] w, float[6] b, float[6,6,3,3] v, float[6] c, float[5,6,1,1] t,
    float[6,4,1,1] u) => (float[n,5,8,8] y) {
        [a] h = Conv<pads = [1, 1, 1, 1]>(x, w, b) i = Relu(h) e = Flatten<axis = 0>(i) q = Unique(e) r = ReduceMax(q)
        j = Min(i, r) [b] k = Conv<pads = [1, 1, 1, 1]>(j, v, c) [s] l = Conv(x, u) m = Add(k, l) o = Relu(m)
        [d] y = Conv(o, t)
    }"""
    constants = {"w": weights(6, 4, 3, 3) / 4, "b": weights(6), "v": weights(6, 6, 3, 3) / 6, "c": weights(6, seed=1)}
    m = model(text, **constants, u=weights(6, 4, 1, 1) / 2, t=weights(5, 6, 1, 1))
    graph.infer_shapes(m)
    return m


@dataclass
class Heard(Silence):
    notes: list = field(default_factory=list)

    def note(self, text):
        self.notes.append(text)


@dataclass(frozen=True)
class Whole:
    """Tunes moments, of blocks that have `refused` not among their operators."""

    refused: tuple = ("Unique",)
    seen: dict = field(default_factory=dict)
    judged: bool = False
    name: str = "whole"

    def __call__(self, job, tuned):
        names = {node.op_type for node in job.model.graph} | set(job.block.layers)
        if names & set(self.refused):
            raise UnsupportedError("it is not whole")
        self.seen[job.block.name] = job, list(job.feeds), list(job.floats), list(job.targets), tuned
        return TuneMoments()(job, tuned)


def test_a_block_that_is_refused_is_tuned_layer_by_layer():
    m = stubborn()
    blocks = find_blocks(m)
    assert [block.layers for block in blocks] == [("a", "b", "s"), ("d",)]
    tuned = Tuned(plan_of(m, BATCHES, TWO, 0.8))
    spy, heard = Whole(), Heard()
    final, results = walk(m, tuned, blocks, [spy], BATCHES, seed=7, log=heard)
    assert heard.notes == ["block a: whole takes its layers one by one: it is not whole"]
    assert [(result.block, result.method, result.kept) for result in results] == [
        ("a", "whole", True),
        ("d", "whole", True),
    ]
    assert results[0].after < results[0].before
    assert set(final.layers) == {"a", "b", "s", "d"}
    assert list(spy.seen) == ["a", "b", "s", "d"]
    inner = graph.with_outputs(m, ["i", "j", "k", "l"])
    for name, inputs, outputs in (("a", "x", "i"), ("b", "j", "k"), ("s", "x", "l")):
        job, feeds, floats, targets, state = spy.seen[name]
        assert (job.block.inputs, job.block.outputs) == ((inputs,), (outputs,))
        assert (job.train, job.held) == ((0, 1, 2, 3), (4,))
        part = emit(
            graph.sub_model(m, ["x"], ["m"]),
            restrict(state.plan, graph.sub_model(m, ["x"], ["m"])),
            learned={layer: known for layer, known in state.layers.items() if layer in ("a", "b", "s")},
        )
        for batch, fed in enumerate(BATCHES):
            plain = run(inner, fed) | fed
            np.testing.assert_allclose(floats[batch][inputs], plain[inputs], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(targets[batch][outputs], plain[outputs], rtol=1e-3, atol=1e-4)
            made = fed if inputs == "x" else run(graph.with_outputs(part, [inputs]), fed)
            assert np.mean(np.abs(feeds[batch][inputs] - made[inputs]) > 1e-4) < 0.005
    assert [spy.seen[name][0].seed for name in "abs"] == [7, 8, 9]
    assert set(spy.seen["b"][4].layers) == {"a"}


def test_layers_get_what_either_network_makes():
    m = stubborn()
    given = [{"x": weights(8, 4, 8, 8, seed=s)} for s in range(3)]
    job = replace(job_of(m, given), feeds=[{"x": 0.5 * feeds["x"]} for feeds in given])
    spy = Whole()
    tune_block(job, Tuned(plan_of(m, given, TWO)), [spy])
    assert list(spy.seen) == ["a", "b", "s", "d"]
    for name in "as":
        _, feeds, floats, _, _ = spy.seen[name]
        for batch in range(3):
            np.testing.assert_array_equal(floats[batch]["x"], given[batch]["x"])
            np.testing.assert_array_equal(feeds[batch]["x"], 0.5 * given[batch]["x"])
    inner = graph.with_outputs(m, ["j", "o"])
    for batch in range(3):
        plain = run(inner, given[batch])
        np.testing.assert_allclose(spy.seen["b"][2][batch]["j"], plain["j"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(spy.seen["d"][2][batch]["o"], plain["o"], rtol=1e-3, atol=1e-4)
        assert np.abs(spy.seen["b"][1][batch]["j"] - plain["j"]).mean() > 0.1 * np.abs(plain["j"]).mean()


def test_layers_that_are_refused_stay():
    m = stubborn()
    tuned = Tuned(plan_of(m, BATCHES, TWO, 0.8))
    heard = Heard()
    final, results = walk(m, tuned, find_blocks(m), [Whole(("Unique", "b", "d"))], BATCHES, log=heard)
    assert heard.notes == [
        "block a: whole takes its layers one by one: it is not whole",
        "layer b: plain rounding stays: it is not whole",
        "block d: plain rounding stays: it is not whole",
    ]
    assert set(final.layers) == {"a", "s"}
    assert results[1].before == results[1].after
    heard = Heard()
    same_again, _ = walk(m, tuned, find_blocks(m), [Whole(("Conv",))], BATCHES, log=heard)
    assert same_again is tuned
    assert len(heard.notes) == 5


@dataclass(frozen=True)
class Turned:
    """Turns all signs of single layers around."""

    judged: bool
    name: str = "turned"

    def __call__(self, job, tuned):
        if len(job.block.layers) > 1:
            raise UnsupportedError("too many")
        (name,) = job.block.layers
        known = tuned.layers.get(name)
        layer = graph.layer_of(graph.node_names(job.model)[name])
        codes = weight_codes(layer, tuned.plan.weights[name]) if known is None else known.codes
        return Tuned(tuned.plan, {**tuned.layers, name: LearnedLayer(-codes, None)})


def test_single_layers_are_judged():
    m = stubborn()
    tuned = Tuned(plan_of(m, BATCHES, TWO, 0.8))
    layer = graph.layer_of(graph.node_names(m)["b"])
    codes = weight_codes(layer, tuned.plan.weights["b"])
    wrong = replace(tuned, layers={"b": LearnedLayer(-codes, None)})
    final, results = walk(m, wrong, find_blocks(m)[:1], [Turned(True)], BATCHES)
    assert list(final.layers) == ["b"]
    np.testing.assert_array_equal(final.layers["b"].codes, codes)
    assert results[0].kept
    assert results[0].after < 0.5 * results[0].before
    final, results = walk(m, tuned, find_blocks(m)[:1], [Turned(True)], BATCHES)
    assert final is tuned
    assert not results[0].kept
    final, _ = walk(m, tuned, find_blocks(m)[:1], [Turned(False)], BATCHES)
    assert set(final.layers) == {"a", "b", "s"}


def test_what_torch_cannot_run_is_tuned_around():
    pytest.importorskip("torch").set_num_threads(1)
    from onnxq.tune.adaquant import AdaQuant

    m = stubborn()
    heard = Heard()
    tuned = Tuned(plan_of(m, BATCHES, TWO, 0.8))
    blocks = find_blocks(m)[:1]
    final, results = walk(m, tuned, blocks, [AdaQuant(iterations=30)], [{"x": b["x"][:8]} for b in BATCHES], log=heard)
    assert len(heard.notes) == 1
    assert heard.notes[0].startswith("block a: adaquant takes its layers one by one: node ")
    assert heard.notes[0].endswith("(Unique) cannot run in torch: no such operator here")
    assert results[0].kept
    assert results[0].after < 0.97 * results[0].before
    assert "b" in final.layers
