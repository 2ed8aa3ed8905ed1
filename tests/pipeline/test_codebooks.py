"""Codebooks in a run: nearer to the float model than uniform grids, and tuned without leaving their values."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers import proto, run, weights

import onnxq
from onnxq import graph
from onnxq.types import Tuned

TEXT = """
g (float[N,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[16,8,3,3] w2, float[16] b2, float[20,16,2,2] w3,
   float[20] b3, float[20,4] w4) => (float[N,4] y) {
  [stem] a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  b = Relu(a)
  [one] c = Conv<strides = [2, 1]>(b, w2, b2)
  d = Relu(c)
  [two] e = Conv<pads = [0, 1, 1, 0]>(d, w3, b3)
  f = Relu(e)
  p = GlobalAveragePool(f)
  q = Flatten(p)
  [head] y = Gemm(q, w4)
}
"""
SHAPES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (16, 8, 3, 3), "b2": (16,), "w3": (20, 16, 2, 2), "b3": (20,)}
ROWS = {"x": weights(40, 3, 8, 8, seed=5)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("codebooks") / "net.onnx"
    arrays = {name: weights(*shape, seed=2) for name, shape in (SHAPES | {"w4": (20, 4)}).items()}
    for name in ("w2", "w3"):  # heavy tails
        arrays[name] = arrays[name] * np.abs(arrays[name])
    onnx.save(proto(TEXT, **arrays), found)
    return found


def quantize(path, **changes):
    return onnxq.quantize(path, ROWS, checks=onnxq.Checks(verify=False), **{"ranges": "minmax", **changes})


def noise(path, found):
    wanted, got = (run(model, ROWS, optimize="all")["y"] for model in (graph.load(path), found.model))
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def in_their_books(found):
    for name in ("one", "two"):
        codes, grid = found.learned[name].codes, found.plan.weights[name]
        assert len(grid.values) == len(codes)
        assert all(set(np.unique(row)) <= set(book) for row, book in zip(codes, grid.values, strict=True))


def test_codebooks_are_nearer_than_uniform_grids_of_their_bits(path):
    uniform, books = (quantize(path, bn_tuning=False, **{name: 2}) for name in ("weight_bits", "codebook_bits"))
    assert noise(path, books) < 0.5 * noise(path, uniform)


def test_means_and_spreads_are_tuned_on_the_codes_of_the_codebooks(path):
    plain, tuned = (quantize(path, codebook_bits=2, bn_tuning=tuning) for tuning in (False, True))
    assert plain.learned == {}
    assert [(step.name, step.kept) for step in tuned.steps] == [("means and spreads", True)]
    assert noise(path, tuned) < 0.7 * noise(path, plain)
    assert all(tuned.learned[name].bias is not None for name in ("one", "two"))
    in_their_books(tuned)
    for name in ("one", "two"):
        assert tuned.plan.weights[name].values == plain.plan.weights[name].values


def test_biases_are_learned_behind_codebooks(path):
    pytest.importorskip("torch")
    from onnxq.tune.biases import tune_biases

    plain = quantize(path, codebook_bits=2, bn_tuning=False)
    batches = [{"x": ROWS["x"][start : start + 8]} for start in range(0, 40, 8)]
    start = Tuned(plain.plan)
    tuned = tune_biases(plain.prepared.model, start, batches, iterations=30, rate=1e-2)
    assert tuned is not start
    assert tuned.plan is plain.plan
    in_their_books(replace(plain, learned=tuned.layers))
    given = {"one": weights(*SHAPES["b2"], seed=2), "two": weights(*SHAPES["b3"], seed=2)}
    assert all(not np.array_equal(tuned.layers[name].bias, bias) for name, bias in given.items())


def test_whole_bytes_hold_the_same_codes(path):
    packed, whole = (quantize(path, codebook_bits=2, packed=packed, bn_tuning=False) for packed in (True, False))
    assert noise(path, packed) == noise(path, whole)
    assert len(graph.to_bytes(packed.model)) < len(graph.to_bytes(whole.model))
