"""Shapes computed from the data's own: the same results at any size, with fewer nodes."""

import numpy as np
import pytest
from helpers import model, ops, run, weights

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.static_reshape import StaticReshape

CONSTANTS = {
    "zero": np.asarray(0), "one": np.asarray(1), "two": np.asarray(2), "last": np.asarray(-1),
    "at0": np.asarray([0]), "at1": np.asarray([1]), "at2": np.asarray([2]), "both": np.asarray([0, 1]),
    "minus": np.asarray([-1]), "heads": np.asarray([2]), "wide": np.asarray([3]), "six": np.asarray([6]),
    "w": weights(6, 6), "b": weights(6), "wider": weights(6, 12), "one1": np.asarray([1]),
    "deep": weights(4, 1, 6), "g": weights(6, low=0.5, high=1),
}  # fmt: skip
KINDS = {"f": "float", "i": "int64"}
SPLIT = "h = Shape(x) d0 = Gather(h, zero) u0 = Unsqueeze(d0, at0) "
JOIN = "t = Concat<axis = 0>(u0, minus, heads, wide) "
OWN = f"{SPLIT} d1 = Gather(h, one) u1 = Unsqueeze(d1, at0) t = Concat<axis = 0>(u0, u1, heads, wide) y = Reshape(x, t)"
FOLDED = {
    "gathers": (OWN, [0, 0, 2, 3]),
    "with a free axis": (f"{SPLIT} {JOIN} y = Reshape(x, t)", [0, -1, 2, 3]),
    "a slice": ("h = Shape(x) s = Slice(h, at0, at2) t = Concat<axis = 0>(s, heads, wide) y = Reshape(x, t)",
                [0, 0, 2, 3]),
    "a vector of indices": ("h = Shape(x) s = Gather(h, both) t = Concat<axis = 0>(s, heads, wide) y = Reshape(x, t)",
                            [0, 0, 2, 3]),
    "an index from the end": ("h = Shape(x) d = Gather(h, last) u = Unsqueeze(d, at0) v = Slice(h, at0, at2) "
                              "t = Concat<axis = 0>(v, u) y = Reshape(x, t)", [0, 0, 0]),
    "the layer's input": (f"{SPLIT} p = MatMul(x, w) q = Add(p, b) t = Concat<axis = 0>(u0, minus, heads, wide) "
                          "y = Reshape(q, t)", [0, -1, 2, 3]),
    "two results of one tensor": ("n = LayerNormalization(x, g, b) p = MatMul(n, w) h = Shape(p) d = Gather(h, zero) "
                                  "u = Unsqueeze(d, at0) k = Mul(b, n) t = Concat<axis = 0>(u, minus, heads, wide) "
                                  "y = Reshape(k, t)", [0, -1, 2, 3]),
}  # fmt: skip


def made(body):
    used = {name: array for name, array in CONSTANTS.items() if f"{name}" in body.replace("(", " ").replace(",", " ")
            .replace(")", " ").split()}  # fmt: skip
    declared = "".join(
        f", {KINDS[array.dtype.kind]}{list(array.shape) if array.ndim else ''} {name}" for name, array in used.items()
    )
    text = f"g (float[N,T,6] x{declared}) => (float[a,b,c,d] y) {{ {body} }}"
    if "at0, at2) t = Concat<axis = 0>(v, u)" in body or "one1" in body:
        text = text.replace("[a,b,c,d] y", "[a,b,c] y")
    m = model(text, **used)
    graph.infer_shapes(m)
    return m


@pytest.mark.parametrize(("body", "shape"), FOLDED.values(), ids=FOLDED)
def test_copied_axes_become_zeros(body, shape):
    m = made(body)
    sizes = [(2, 5), (1, 1), (3, 4)]
    rows = [{"x": weights(n, t, 6, seed=n)} for n, t in sizes]
    before = [run(m, feeds)["y"] for feeds in rows]
    (applied,) = apply(m, [StaticReshape()], rows[0])
    assert applied.count == 1
    node = next(graph.nodes(m, "Reshape"))
    assert graph.constant(node.inputs[1]).tolist() == shape
    assert not {"Shape", "Gather", "Unsqueeze", "Concat", "Slice"} & set(ops(m))
    for feeds, wanted in zip(rows, before, strict=True):
        np.testing.assert_array_equal(run(m, feeds)["y"], wanted)
    assert StaticReshape()(m) == 0


STAYS = {
    "another place": f"h = Shape(x) d = Gather(h, one) u0 = Unsqueeze(d, at0) {JOIN} y = Reshape(x, t)",
    "a broadcast over the axis": f"{SPLIT} q = Mul(x, deep) {JOIN} y = Reshape(q, t)",
    "computed sizes": f"{SPLIT} k = Mul(u0, heads) t = Concat<axis = 0>(k, minus, wide, at1) y = Reshape(x, t)",
    "an axis that a matrix mixes": "h = Shape(x) d = Gather(h, two) u = Unsqueeze(d, at0) q = MatMul(x, wider) "
                                   "t = Concat<axis = 0>(one1, minus, u) y = Reshape(q, t)",
    "zeros that are sizes": OWN.replace("Reshape(", "Reshape<allowzero = 1>("),
}  # fmt: skip


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_what_is_not_the_datas_own_axis_stays(body):
    m = made(body)
    before = ops(m)
    assert StaticReshape()(m) == 0
    assert ops(m) == before
    assert StaticReshape().refused(m) == {}


def test_another_tensors_axes_stay():
    m = model("g (float[N,T,6] x, float[M,6] z, int64 zero, int64[1] at0, int64[1] minus, int64[1] wide) => "
              "(float[a,b,c] y) { h = Shape(z) d = Gather(h, zero) u = Unsqueeze(d, at0) "
              "t = Concat<axis = 0>(u, minus, wide) y = Reshape(x, t) }", zero=CONSTANTS["zero"],
              at0=CONSTANTS["at0"], minus=CONSTANTS["minus"], wide=CONSTANTS["wide"])  # fmt: skip
    graph.infer_shapes(m)
    assert StaticReshape()(m) == 0
