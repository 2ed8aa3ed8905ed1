import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import DropIdentity

X = weights(2, 3, 4, seed=3)
IDENTITIES = {
    "Identity": "n = Identity(r)",
    "Dropout": "n = Dropout(r)",
    "Dropout with its mask": "n, mask = Dropout(r)",
    "Cast": "n = Cast<to = 1>(r)",
    "Concat": "n = Concat<axis = 1>(r)",
    "Sum": "n = Sum(r)",
    "Mean": "n = Mean(r)",
    "Max": "n = Max(r)",
    "Min": "n = Min(r)",
    "Pad": "n = Pad(r, pads)",
    "Transpose": "n = Transpose<perm = [0, 1, 2]>(r)",
    "Reshape": "n = Reshape(r, shape)",
    "Reshape that infers": "n = Reshape(r, inferred)",
    "x + 0": "n = Add(r, zero)",
    "0 + x": "n = Add(zero, r)",
    "x - 0": "n = Sub(r, zero)",
    "x * 1": "n = Mul(r, ones)",
    "1 * x": "n = Mul(ones, r)",
    "x / 1": "n = Div(r, one)",
    "x ** 1": "n = Pow(r, one)",
}
CONSTANTS = {
    "pads": np.zeros(6, np.int64),
    "shape": np.array([2, 3, 4]),
    "inferred": np.array([0, -1, 4]),
    "zero": np.float32(0),
    "one": np.ones(1, np.float32),
    "ones": np.ones((1, 3, 4), np.float32),
}
HEAD = """g (float[2,3,4] x, int64[6] pads, int64[3] shape, int64[3] inferred, float zero, float[1] one,
             float[1,3,4] ones)"""


def build(body, output="float[2,3,4] y", **constants):
    m = model(f"{HEAD} => ({output}) {{ {body} }}", **CONSTANTS | constants)
    graph.infer_shapes(m)
    return m


@pytest.mark.parametrize("name", IDENTITIES)
def test_disappears(name):
    m = build(f"r = Relu(x) {IDENTITIES[name]} y = Neg(n)")
    before = run(m, {"x": X})
    assert DropIdentity()(m) == 1
    assert ops(m) == ["Relu", "Neg"]
    assert_same_outputs(before, run(m, {"x": X}), rtol=0, atol=0)
    assert DropIdentity()(m) == 0
    assert DropIdentity().refused(m) == {}


def test_hands_the_name_of_an_output_over():
    m = build("r = Relu(x) n = Identity(r) y = Dropout(n)")
    assert DropIdentity()(m) == 2
    assert [output.name for node in m.graph for output in node.outputs] == ["y"]
    assert_same_outputs({"y": np.maximum(X, 0)}, run(m, {"x": X}))


WORKING = {
    "r - x is not x": ("n = Sub(zero, r)", {}),
    "1 / x is not x": ("n = Div(one, r)", {}),
    "1 ** x is not x": ("n = Pow(one, r)", {}),
    "nearly one": ("n = Mul(r, one)", {"one": np.array([1 + 1e-6], np.float32)}),
    "one of the zeros is not": ("n = Add(r, ones)", {"ones": np.eye(3, 4, dtype=np.float32)[None]}),
    "a Pad": ("n = Pad(r, pads)", {"pads": np.array([0, 0, 0, 0, 0, 1])}),
    "a Transpose": ("n = Transpose<perm = [0, 2, 1]>(r)", {}),
    "a Transpose that reverses": ("n = Transpose(r)", {}),
    "a Cast": ("n = Cast<to = 10>(r)", {}),
    "a sum of two": ("n = Sum(r, r)", {}),
    "a Reshape": ("n = Reshape(r, shape)", {"shape": np.array([3, 2, 4])}),
    "a Reshape that moves an open axis": ("n = Reshape(r, shape)", {"shape": np.array([4, -1, 3])}),
}


@pytest.mark.parametrize("name", WORKING)
def test_stays_where_it_does_something(name):
    body, constants = WORKING[name]
    m = build(f"r = Relu(x) {body} y = Shape(n) z = Size(n)", "int64[a] y, int64 z", **constants)
    before = ops(m)
    assert DropIdentity()(m) == 0
    assert ops(m) == before
    assert DropIdentity().refused(m) == {}


@given(
    rank=st.integers(0, 3),
    wide=st.lists(st.integers(1, 3), min_size=0, max_size=4),
    op=st.sampled_from(["Add(x, c)", "Mul(c, x)"]),
)
@settings(max_examples=60, deadline=None)
def test_a_constant_that_widens_its_operand_stays(rank, wide, op):
    shape = [2, 1, 3][3 - rank :]
    constant = np.full(wide, op.startswith("Mul"), np.float32)
    try:
        expected = np.broadcast_shapes(shape, wide)
    except ValueError:
        return
    dims = ",".join(map(str, shape))
    m = model(
        f"g (float{f'[{dims}]' if shape else ''} v, float{wide if wide else ''} c) => "
        f"(float{list(expected) if expected else ''} y) {{ x = Relu(v) n = {op} y = Neg(n) }}",
        c=constant,
    )
    graph.infer_shapes(m)
    feeds = {"v": weights(*shape, seed=1)}
    before = run(m, feeds)
    DropIdentity()(m)
    assert (ops(m) == ["Relu", "Neg"]) == (list(expected) == shape)
    assert_same_outputs(before, run(m, feeds), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("attributes", "target", "goes"),
    [("", [-1, 4], True), ("", [0, -1], True), ("", [2, 4], False), ("<allowzero = 1>", [0, 4], False)],
)
def test_a_reshape_of_a_symbolic_axis(attributes, target, goes):
    m = model(
        f"g (float[N,4] x, int64[2] s) => (float[M,4] y) {{ r = Relu(x) n = Reshape{attributes}(r, s) y = Neg(n) }}",
        s=np.array(target),
    )
    graph.infer_shapes(m)
    assert DropIdentity()(m) == goes


def test_a_symbolic_axis_may_be_widened():
    m = model(
        "g (float[N,3] v, float[2,1] c) => (float[M,3] y) { x = Relu(v) n = Add(x, c) y = Neg(n) }",
        c=np.zeros((2, 1), np.float32),
    )
    graph.infer_shapes(m)
    assert DropIdentity()(m) == 0


@pytest.mark.parametrize(
    ("inner", "copies"),
    [("Reshape(r, shape)", 1), ("Flatten(r)", 1), ("Unsqueeze(r, axes)", 1), ("Squeeze(u, axes)", 2)],
)
def test_only_the_last_of_two_reshapes_counts(inner, copies):
    m = model(
        f"""g (float[2,3,4] x, int64[2] shape, int64[1] axes, int64[2] last) => (float[6,4] y) {{
            r = Relu(x) u = Unsqueeze(r, axes) i = {inner} y = Reshape(i, last)
        }}""",
        shape=np.array([8, 3]),
        axes=np.array([0]),
        last=np.array([6, -1]),
    )
    graph.remove_unused(m)
    before = run(m, {"x": X})
    while DropIdentity()(m):
        pass
    assert ops(m) == ["Relu", "Reshape"]
    assert_same_outputs(before, run(m, {"x": X}), rtol=0, atol=0)


@pytest.mark.parametrize("last", [[0, 6], [0, -1]])
def test_a_reshape_that_copies_an_axis_needs_the_one_before_it(last):
    m = model(
        """g (float[2,3,4] x, int64[2] shape, int64[2] last) => (float[a,b] y) {
            r = Relu(x) i = Reshape(r, shape) y = Reshape(i, last)
        }""",
        shape=np.array([4, 6]),
        last=np.array(last),
    )
    before = run(m, {"x": X})
    DropIdentity()(m)
    assert_same_outputs(before, run(m, {"x": X}), rtol=0, atol=0)


REFUSED = {
    "directly with an input": "y = Identity(x)",
    "a constant": "y = Identity(ones)",
    "another output": "y = Relu(x) z = Identity(y)",
    "second output": "r = Relu(x) y, m = Dropout(r) z = Not(m)",
    "training mode; export": "r = Relu(x) t = Not(no) y = Dropout(r, half, yes)",
    "is computed": "r = Relu(x) t = Not(no) y = Dropout(r, half, t)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_why_it_stays(reason):
    body = REFUSED[reason]
    outputs = "float[a,b,c] y" + (f", {'bool' if 'Not' in body else 'float'}[d,e,f] z" if "z =" in body else "")
    m = model(
        f"g (float[2,3,4] x, float[2,3,4] ones, float half, bool yes, bool no) => ({outputs}) {{ {body} }}",
        ones=np.ones((2, 3, 4), np.float32),
        half=np.float32(0.5),
        yes=np.array(True),
        no=np.array(False),
    )
    before = ops(m)
    assert DropIdentity()(m) == 0
    assert ops(m) == before
    assert [reason in text for text in DropIdentity().refused(m).values()] == [True]


def test_dropout_in_inference_disappears_whatever_its_ratio():
    m = model(
        "g (float[2,3,4] x, float p, bool no) => (float[2,3,4] y) { r = Relu(x) y = Dropout(r, p, no) }",
        p=np.float32(0.5),
        no=np.array(False),
    )
    assert DropIdentity()(m) == 1
    assert_same_outputs({"y": np.maximum(X, 0)}, run(m, {"x": X}))


def test_a_value_read_in_a_body_is_followed():
    m = model(
        """g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
            r = Relu(x) n = Identity(r)
            y = If(c)<then_branch = t () => (float[2,3,4] a) { a = Neg(n) },
                      else_branch = e () => (float[2,3,4] b) { b = Abs(n) }>
        }"""
    )
    feeds = {"x": X, "c": np.array(True)}
    before = run(m, feeds)
    assert DropIdentity()(m) == 1
    assert ops(m) == ["Relu", "If"]
    assert_same_outputs(before, run(m, feeds), rtol=0, atol=0)
