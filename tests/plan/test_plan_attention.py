"""Which operands of attention go onto grids."""

import json

import numpy as np
import pytest
from helpers import model, weights
from planning import integer, planned

from onnxq import graph
from onnxq.errors import InputError
from onnxq.plan import Precision, place, plan_from_json, plan_to_json
from onnxq.plan.attention import SOFTMAXES, Attention, cores
from onnxq.types import LogGrid

TEXT = """g (float[N,6,8] x, float[6,6] mask, float eight, float[8,8] wq, float[8,8] wk, float[8,8] wv,
        float[8,5] wo) => (float[N,6,5] y) {
    [lq] q = MatMul(x, wq)
    [lk] k = MatMul(x, wk)
    [lv] v = MatMul(x, wv)
    [turn] kt = Transpose<perm = [0, 2, 1]>(k)
    [scores] s = MatMul(q, kt)
    [scale] d = Div(s, eight)
    [masked] e = Add(d, mask)
    [soft] a = Softmax<axis = -1>(e)
    [values] h = MatMul(a, v)
    [lo] y = MatMul(h, wo)
}"""
LINEAR = ["lq", "lk", "lv", "lo"]
X = {"x": weights(2, 6, 8)}


def made(text=TEXT, mask=-1e9, **more):
    masks = np.triu(np.full((6, 6), mask, np.float32), 1)
    squares = {name: weights(8, 8, seed=seed) for seed, name in enumerate(("wq", "wk", "wv"))}
    return model(text, mask=masks, eight=np.float32(3), **squares, wo=weights(8, 5), **more)


def test_by_default_attention_stays_in_float():
    placement = place(made())
    assert integer(placement) == LINEAR
    assert placement.tensors == ("x", "h")
    assert "both operands are computed" in placement.skipped["scores"]
    assert not placement.log_softmax


@pytest.mark.parametrize("mask", [-1e4, -1e9, -np.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_products_are_found_and_the_mask_stays_in_float(mask, bits):
    plan = planned(made(mask=mask), X, Precision(activation_bits=5, first_last=5), attention=Attention(bits))
    assert list(plan.integer) == ["lq", "lk", "lv", "scores", "values", "lo"]
    operands = {"q", "kt", "v"} | ({"a"} if bits == 8 else set())
    assert set(plan.tensors) == {"x", "h"} | operands
    assert {name: grid.bits for name, grid in plan.tensors.items()} == dict.fromkeys(operands, bits) | {"x": 5, "h": 5}
    assert max(grid.scale for grid in plan.tensors.values()) < 10
    assert plan.log_softmax == ({"soft": LogGrid(4, 2)} if bits == 4 else {})
    assert {"masked", "scale", "soft"} <= set(plan.skipped)
    assert not plan.constants


def test_only_the_products_read_the_grids_of_their_operands():
    text = TEXT.replace("=> (float[N,6,5] y)", "=> (float[N,6,5] y, float[N,6,8] z)").replace(
        "[turn]", "z = Tanh(v) [turn]"
    )
    plan = planned(made(text), X, attention=Attention(4))
    assert not plan.tensors["v"].everywhere


def test_a_grid_that_a_layer_reads_too_keeps_the_more_bits():
    text = TEXT.replace("=> (float[N,6,5] y)", "=> (float[N,6,5] y, float[N,6,5] z)").replace(
        "[lo]", "[lz] z = MatMul(v, wo) [lo]"
    )
    for bits, most in ((4, 7), (8, 8)):
        plan = planned(made(text), X, Precision(activation_bits=7, first_last=7), attention=Attention(bits))
        assert plan.tensors["v"].bits == most


def test_uniform_probabilities_get_a_grid_of_their_own():
    plan = planned(made(), X, attention=Attention(4, "uniform"))
    assert plan.tensors["a"].bits == 4
    assert 0.9 <= plan.tensors["a"].scale * 15 <= 1.0001
    assert not plan.log_softmax


def test_what_is_asked_to_stay_in_float_stays():
    placement = place(made(), keep_float=["soft"], attention=Attention(4))
    assert integer(placement) == LINEAR
    assert not placement.log_softmax
    placement = place(made(), keep_float=["values"], attention=Attention(4))
    assert integer(placement) == ["lq", "lk", "lv", "scores", "lo"]
    assert not placement.log_softmax
    assert place(made(), keep_float=["scores"], attention=Attention(4)).log_softmax == {"soft": LogGrid(4)}
    refused = place(made(), refuse={"kt": "NaN"}, attention=Attention(4))
    assert refused.skipped["scores"] == "NaN"


def test_products_elsewhere_stay_in_float():
    text = """g (float[N,6,8] x, float[N,8,6] z, float[6,4] w) => (float[N,6,6] p, float[N,8,4] y) {
        [other] p = MatMul(x, z)
        s = Softmax<axis = -1>(z)
        [mean] y = MatMul(s, w)
    }"""
    m = model(text, w=weights(6, 4))
    assert not list(cores(m))
    assert integer(place(m, attention=Attention(4))) == ["mean"]


def test_scores_are_found_behind_windows_and_a_bias():
    text = """g (float[4,2,6,8] q, float[4,2,8,6] k, float[4,2,6,8] v, float[1,2,6,6] bias, float[2,1,6,6] shift,
            int64[5] apart, int64[4] joined) => (float[4,2,6,8] y) {
        [scores] s = MatMul(q, k)
        b = Add(s, bias)
        w = Reshape(b, apart)
        m = Add(w, shift)
        r = Reshape(m, joined)
        a = Softmax<axis = -1>(r)
        [values] y = MatMul(a, v)
    }"""
    m = model(text, bias=weights(1, 2, 6, 6), shift=np.full((2, 1, 6, 6), -100, np.float32),
              apart=np.array([2, 2, 2, 6, 6]), joined=np.array([4, 2, 6, 6]))  # fmt: skip
    (core,) = cores(m)
    assert [node.name for node in core.scores] == ["scores"]
    placement = place(m, attention=Attention(4))
    assert integer(placement) == ["scores", "values"]
    assert set(placement.tensors) == {"q", "k", "v"}
    assert placement.sums == (next(node.name for node in graph.nodes(m, "Add")),)  # a product has no bias to fuse


@pytest.mark.parametrize(
    ("bits", "softmax", "per_octave"),
    [(2, "auto", 1), (3, "auto", 1), (4, "auto", 2), (6, "auto", 2), (7, "auto", None), (8, "auto", None),
     (2, "log-sqrt2", 2), (8, "log-sqrt2", 2), (5, "log2", 1), (4, "uniform", None)],
)  # fmt: skip
def test_the_grid_of_the_probabilities(bits, softmax, per_octave):
    assert softmax in SOFTMAXES
    assert Attention(bits, softmax).log_grid == (None if per_octave is None else LogGrid(bits, per_octave))


def test_the_plan_file_holds_it():
    plan = planned(made(), X, attention=Attention(3))
    assert plan.log_softmax == {"soft": LogGrid(3, 1)}
    text = plan_to_json(plan)
    assert plan_from_json(text) == plan
    document = json.loads(text)
    for key, value, words in (
        ("per_octave", 3, "per_octave must be 1 or 2, not 3"),
        ("per_octave", True, "per_octave must be 1 or 2, not True"),
        ("bits", 9, "bits must be one of 2 to 8"),
        ("bit", 4, "unknown key 'bit'. Did you mean 'bits'?"),
    ):
        changed = {**document, "log_softmax": {"soft": {"bits": 4, "per_octave": 2, key: value}}}
        with pytest.raises(InputError, match="softmax soft") as caught:
            plan_from_json(json.dumps(changed))
        assert words in str(caught.value)
    del document["log_softmax"]
    assert plan_from_json(json.dumps(document)).log_softmax == {}
