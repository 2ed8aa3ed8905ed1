"""Attention with the factor in its projections against attention with the factor in the graph, in onnxruntime."""

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes.base import apply
from onnxq.passes.elements import behind
from onnxq.passes.fold_attention_scale import FoldAttentionScale

HEADS, DEPTH, TOKENS = 2, 3, 5
WIDTH = HEADS * DEPTH
SCALE = {"c": np.float32(0.37)}


def ints(*values):
    return np.array(values, np.int64)


def attention(body, inputs="float[2,5,4] x", outputs="float[A,B,C,D] y", **constants):
    """A model of `body`; projections from 4 to 6 channels are there for the taking."""
    known = {
        "wq": weights(4, WIDTH, seed=1), "wk": weights(4, WIDTH, seed=2), "wv": weights(4, WIDTH, seed=3),
        "bq": weights(WIDTH, seed=4), "bk": weights(WIDTH, seed=5),
        "wqkv": weights(4, 3 * WIDTH, seed=6), "bqkv": weights(3 * WIDTH, seed=7),
        "heads": ints(0, TOKENS, HEADS, DEPTH), **SCALE,
    }  # fmt: skip
    known = {name: array for name, array in (known | constants).items() if used(name, body)}
    kinds = {"f": "float", "i": "int64"}
    given = "".join(
        f", {kinds[array.dtype.kind]}{list(array.shape) if array.ndim else ''} {name}" for name, array in known.items()
    )
    m = model(f"g ({inputs}{given}) => ({outputs}) {{ {body} }}", **known)
    graph.infer_shapes(m)
    return m, {"x": weights(2, TOKENS, 4, seed=50)}


def used(name, body):
    return any(f"{before}{name}{after}" in body for before in "( " for after in ",)")


def check(m, feeds, count=1):
    before, kinds = run(m, feeds), ops(m)
    (applied,) = apply(m, [FoldAttentionScale()], feeds)
    assert applied.count == count
    assert applied.gap <= 1e-5
    assert applied.refused == {}
    assert "Mul" not in ops(m)
    assert "Div" not in ops(m)
    assert len(ops(m)) == len(kinds) - count
    assert_same_outputs(before, run(m, feeds), rtol=1e-3, atol=1e-4)
    assert FoldAttentionScale()(m) == 0


QUERY = "q0 = MatMul(x, wq) q1 = Add(bq, q0) q2 = Reshape(q1, heads) q = Transpose<perm = [0, 2, 1, 3]>(q2)"
KEY = "k0 = MatMul(x, wk) k1 = Add(k0, bk) k2 = Reshape(k1, heads) k = Transpose<perm = [0, 2, 3, 1]>(k2)"


@pytest.mark.parametrize(
    "scores",
    [
        "s = MatMul(q, k) t = Mul(s, c)",
        "s = MatMul(q, k) t = Mul(c, s)",
        "s = MatMul(q, k) t = Div(s, c)",
        "r = Mul(q, c) t = MatMul(r, k)",
        "r = Div(k, c) t = MatMul(q, r)",
    ],
)
def test_separate_projections(scores):
    check(*attention(f"{QUERY} {KEY} {scores} y = Softmax<axis = 3>(t)"))


def test_a_reader_of_the_shape_does_not_matter():
    body = f"""q0 = MatMul(x, wq) n = Shape(q0) first = Slice(n, zero, two) like = Concat<axis = 0>(first, rest)
      q2 = Reshape(q0, like) q = Transpose<perm = [0, 2, 1, 3]>(q2) {KEY}
      r = Mul(q, c) t = MatMul(r, k) y = Softmax<axis = 3>(t)"""
    check(*attention(body, zero=ints(0), two=ints(2), rest=ints(HEADS, DEPTH)))


def test_both_sides():
    body = f"{QUERY} {KEY} r = Mul(q, c) l = Mul(k, d) t = MatMul(r, l) y = Softmax<axis = 3>(t)"
    check(*attention(body, d=np.array([1.7], np.float32)), count=2)


def test_the_factor_goes_into_the_queries():
    m, _ = attention(f"{QUERY} {KEY} s = MatMul(q, k) t = Mul(s, c) y = Softmax<axis = 3>(t)")
    assert FoldAttentionScale()(m) == 1
    constants = m.graph.initializers
    np.testing.assert_allclose(graph.constant(constants["wq"]), 0.37 * weights(4, WIDTH, seed=1), rtol=1e-6)
    np.testing.assert_allclose(graph.constant(constants["bq"]), 0.37 * weights(WIDTH, seed=4), rtol=1e-6)
    np.testing.assert_array_equal(graph.constant(constants["wk"]), weights(4, WIDTH, seed=2))


def test_into_the_keys_where_the_queries_have_another_reader():
    body = f"{QUERY} {KEY} s = MatMul(q, k) t = Mul(s, c) y = Softmax<axis = 3>(t) z = Relu(q1)"
    m, feeds = attention(body, outputs="float[A,B,C,D] y, float[E,F,G] z")
    check(m, feeds)
    np.testing.assert_array_equal(graph.constant(m.graph.initializers["wq"]), weights(4, WIDTH, seed=1))


FUSED = "p0 = MatMul(x, wqkv) p = Add(p0, bqkv)"
TAIL = "s = MatMul(q, kt) t = Mul(s, c) a = Softmax<axis = 3>(t) y = MatMul(a, v)"
SPLIT_LAST = f"""{FUSED} q0, k0, v0 = Split<axis = -1>(p)
  q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k1 = Reshape(k0, heads) kt = Transpose<perm = [0, 2, 3, 1]>(k1)
  v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1) {TAIL}"""
FIVE = f"{FUSED} r = Reshape(p, five) f = Transpose<perm = [2, 0, 3, 1, 4]>(r)"
GATHERED = f"""{FIVE} q = Gather<axis = 0>(f, zero) k = Gather<axis = 0>(f, one) v = Gather<axis = 0>(f, minus)
  kt = Transpose<perm = [0, 1, 3, 2]>(k) {TAIL}"""
UNBOUND = f"""{FIVE} q0, k0, v0 = Split<axis = 0>(f, parts)
  q = Squeeze(q0, axes) k = Squeeze(k0, axes) v = Squeeze(v0, axes) kt = Transpose<perm = [0, 1, 3, 2]>(k) {TAIL}"""
SLICED = f"""{FUSED}
  q0 = Slice(p, from0, to6, last) k0 = Slice(p, from6, to12, last) v0 = Slice(p, to12, far, last, unit)
  q1 = Reshape(q0, heads) q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k1 = Reshape(k0, heads) kt = Transpose<perm = [0, 2, 3, 1]>(k1)
  v1 = Reshape(v0, heads) v = Transpose<perm = [0, 2, 1, 3]>(v1) {TAIL}"""
PER_HEAD = f"""{FUSED} r = Reshape(p, perhead) f = Transpose<perm = [0, 2, 1, 3]>(r)
  q, k, v = Split<axis = 3>(f, parts3) kt = Transpose<perm = [0, 1, 3, 2]>(k) {TAIL}"""
INDICES = {
    "zero": ints(0).reshape(()), "one": ints(1).reshape(()), "minus": ints(-1).reshape(()),
    "five": ints(0, TOKENS, 3, HEADS, DEPTH), "parts": ints(1, 1, 1), "axes": ints(0),
    "from0": ints(0), "from6": ints(6), "to6": ints(6), "to12": ints(12), "far": ints(2**62), "last": ints(-1),
    "unit": ints(1), "perhead": ints(0, TOKENS, HEADS, 3 * DEPTH), "parts3": ints(DEPTH, DEPTH, DEPTH),
}  # fmt: skip
LAYOUTS = {
    "split": (SPLIT_LAST, slice(0, 6)),
    "gathered": (GATHERED, slice(0, 6)),
    "unbound": (UNBOUND, slice(0, 6)),
    "sliced": (SLICED, slice(0, 6)),
    "per head": (PER_HEAD, [0, 1, 2, 9, 10, 11]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", ["2", "N"])
def test_one_projection_for_all(layout, batch):
    """Only the columns of the queries are scaled, wherever they are; the batch may have any size."""
    body, columns = LAYOUTS[layout]
    m, feeds = attention(body, f"float[{batch},5,4] x", **INDICES)
    check(m, feeds)
    factor = np.ones(3 * WIDTH)
    factor[columns] = 0.37
    stored = graph.constant(m.graph.initializers["wqkv"])
    np.testing.assert_allclose(stored, weights(4, 3 * WIDTH, seed=6) * factor, rtol=1e-6)
    stored = graph.constant(m.graph.initializers["bqkv"])
    np.testing.assert_allclose(stored, weights(3 * WIDTH, seed=7) * factor, rtol=1e-6)


def test_the_values_of_a_fused_projection_take_a_factor_behind_the_attention():
    body = SPLIT_LAST.replace("t = Mul(s, c)", "t = Identity(s)").replace("y = Mat", "o = Mat") + " y = Mul(o, c)"
    m, feeds = attention(body)
    check(m, feeds)
    stored = graph.constant(m.graph.initializers["wqkv"])
    np.testing.assert_allclose(stored[:, 12:], 0.37 * weights(4, 3 * WIDTH, seed=6)[:, 12:], rtol=1e-6)


def test_convolutions_project_on_axis_1():
    body = """
      p = Conv(x, w, b) q0, k0 = Split<axis = 1>(p)
      q1 = Reshape(q0, flat) q = Transpose<perm = [0, 1, 3, 2]>(q1) k = Reshape(k0, flat)
      s = MatMul(q, k) t = Div(s, c) y = Softmax<axis = 3>(t)
    """
    constants = {"w": weights(12, 4, 1, 1), "b": weights(12), "flat": ints(0, HEADS, DEPTH, 35)}
    m, _ = attention(body, "float[N,4,7,5] x", **constants)
    check(m, {"x": weights(2, 4, 7, 5, seed=50)})


def test_a_transposed_gemm():
    body = """q = Gemm<transB = 1>(x, w, b) k = Gemm<transB = 1>(x, u) kt = Transpose(k)
              s = MatMul(q, kt) y = Div(s, c)"""
    m, _ = attention(body, "float[5,4] x", "float[5,5] y", w=weights(6, 4), b=weights(6), u=weights(6, 4, seed=9))
    check(m, {"x": weights(5, 4, seed=50)})


OVERLAP = SLICED.replace("Slice(p, from6, to12, last)", "Slice(p, from5, to11, last)")
REFUSED = {
    "is read by Relu": (f"{QUERY} {KEY} r = Mul(q, c) t = MatMul(r, k) y = Softmax<axis = 3>(t) z = Relu(q)", {}),
    "a Relu is in front of it": (
        f"{QUERY} {KEY} o = Relu(q) r = Mul(o, c) y = MatMul(r, k) z = Relu(x)", {}
    ),
    "is read by Slice": (OVERLAP + " z = Relu(x)", INDICES | {"from5": ints(5), "to11": ints(11)}),
    "is an output of the model": (f"{QUERY} {KEY} z = MatMul(q, k) y = Mul(z, c)", {}),
    "adds something that is not a bias": (
        f"{QUERY.replace('Add(bq, q0)', 'Add(x6, q0)')} {KEY} r = Mul(q, c) y = MatMul(r, k) z = Relu(x)",
        {"x6": weights(TOKENS, WIDTH)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    body, constants = REFUSED[reason]
    m, _ = attention(body, outputs="float[A,B,C,D] y, float[E,F,G] z" if "z = Relu(x)" in body else
                     "float[A,B,C,D] y, float[E,F,G,H] z", **constants)  # fmt: skip
    before = ops(m)
    assert FoldAttentionScale()(m) == 0
    assert ops(m) == before
    (found,) = FoldAttentionScale().refused(m).values()
    assert reason in found


def test_a_factor_of_an_input_stays():
    m, _ = attention("r = Mul(x, c) y = MatMul(r, u)", "float[2,5,4] x, float[2,4,5] u", "float[A,B,C] y")
    assert FoldAttentionScale()(m) == 0
    assert list(FoldAttentionScale().refused(m).values()) == ["no layer is in front of it"]


def test_some_positions_of_a_projection_cannot_be_scaled():
    body = """p = MatMul(x, wk) a, b = Split<axis = 1>(p, uneven) r = Mul(a, c)
              k = Transpose<perm = [0, 2, 1]>(b) y = MatMul(r, k)"""
    m, _ = attention(body, outputs="float[A,B,C] y", uneven=ints(2, 3))
    assert FoldAttentionScale()(m) == 0
    assert list(FoldAttentionScale().refused(m).values()) == ["only some positions of MatMul_0 are scaled"]


def test_factors_far_from_attention_are_not_mentioned():
    m, _ = attention("r = Relu(x) y = Mul(r, c)", outputs="float[A,B,C] y")
    assert FoldAttentionScale()(m) == 0
    assert FoldAttentionScale().refused(m) == {}
    per_channel, _ = attention("r = MatMul(x, wq) y = Mul(r, c)", outputs="float[A,B,C] y", c=weights(WIDTH))
    assert FoldAttentionScale()(per_channel) == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_moved_elements_are_followed_exactly(data):
    """Marked elements of a random chain of moves, followed back to its start, are those that are marked there."""
    sizes, lines, constants, last = [2, 12, 3], [], {}, "x"
    for step in range(data.draw(st.integers(1, 5))):
        kind, name = data.draw(st.sampled_from(["Transpose", "Reshape", "Slice", "Gather"])), f"v{step}"
        axis = data.draw(st.integers(0, len(sizes) - 1))
        if kind == "Transpose":
            order = data.draw(st.permutations(range(len(sizes))))
            lines.append(f"{name} = Transpose<perm = {list(order)}>({last})")
            sizes = [sizes[place] for place in order]
        elif kind == "Reshape":
            factor = data.draw(st.sampled_from([n for n in (1, 2, 3) if sizes[axis] % n == 0]))
            sizes = [*sizes[:axis], factor, sizes[axis] // factor, *sizes[axis + 1 :]]
            if data.draw(st.booleans()) and len(sizes) > 2:
                sizes = [sizes[0] * sizes[1], *sizes[2:]]
            constants[f"i{step}"] = ints(*sizes)
            lines.append(f"{name} = Reshape({last}, i{step})")
        elif kind == "Slice":
            start = data.draw(st.integers(0, sizes[axis] - 1))
            stride = data.draw(st.sampled_from([1, 2, -1]))
            end = 2**40 if stride > 0 else -(2**40)
            constants |= {
                f"b{step}": ints(start),
                f"e{step}": ints(end),
                f"a{step}": ints(axis),
                f"s{step}": ints(stride),
            }
            lines.append(f"{name} = Slice({last}, b{step}, e{step}, a{step}, s{step})")
            sizes[axis] = len(range(sizes[axis])[start:end:stride])
        else:
            if len(sizes) < 2:
                continue
            constants[f"i{step}"] = np.int64(data.draw(st.integers(-sizes[axis], sizes[axis] - 1)))
            lines.append(f"{name} = Gather<axis = {axis}>({last}, i{step})")
            del sizes[axis]
        last = name
    given = "".join(
        f", int64{list(np.shape(array)) if np.ndim(array) else ''} {name}" for name, array in constants.items()
    )
    shape = ",".join("abcdefgh"[: len(sizes)])
    m = model(f"g (float[2,12,3] x{given}) => (float[{shape}] y) {{ {' '.join(lines)} y = Neg({last}) }}", **constants)
    graph.infer_shapes(m)
    moved = -run(m, {"x": np.arange(72, dtype=np.float32).reshape(2, 12, 3)})["y"]
    expected = np.isin(np.arange(72).reshape(2, 12, 3), moved)
    found = None
    for node in reversed(list(m.graph)[:-1]):
        found = behind(node, node.outputs[0], found)
        if isinstance(found, str):
            assert "spreads" in found
            return
    assert (expected == (True if found is None else found)).all()
