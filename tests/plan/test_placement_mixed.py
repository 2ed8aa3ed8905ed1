import numpy as np
import pytest
from helpers import model, weights
from planning import integer

from onnxq.plan import place

ATTENTION = """
    [to_q] q0 = MatMul(x, wq) q = Add(q0, b)
    [to_k] k0 = MatMul(x, wk) k = Add(k0, b)
    [to_v] v0 = MatMul(x, wv) v = Add(v0, b)
    [turn] kt = Transpose<perm = [0, 2, 1]>(k)
    [scores] s = MatMul(q, kt)
    [soft] p = Softmax(s)
    [mix] m = MatMul(p, v)
    [to_o] o0 = MatMul(m, wo) o = Add(o0, b)
    [res1] r = Add(x, o)
    [ln1] n = LayerNormalization<axis = -1>(r, g, b)
    [up] u0 = MatMul(n, wu) u = Add(u0, b2)
    [erf] e = Tanh(u)
    [gelu] f = Mul(u, e)
    [down] d0 = MatMul(f, wd) d = Add(d0, b)
    [res2] t = Add(d, n)
    [ln2] y = LayerNormalization<axis = -1>(t, g, b)
"""
SHAPES = {
    "wq": (8, 8),
    "wk": (8, 8),
    "wv": (8, 8),
    "wo": (8, 8),
    "wu": (8, 16),
    "wd": (16, 8),
    "b": (8,),
    "b2": (16,),
    "g": (8,),
}


def transformer():
    inputs = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in SHAPES.items())
    constants = {name: weights(*shape, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    return model(f"g (float[1,5,8] x{inputs}) => (float[1,5,8] y) {{ {ATTENTION} }}", **constants)


def test_only_the_linear_layers_of_a_transformer_run_in_integers():
    found = place(transformer())
    assert integer(found) == ["to_q", "to_k", "to_v", "to_o", "up", "down"]
    assert found.tensors == ("x", "m", "n", "f")  # inputs of linear layers only: their results stay float
    assert found.fixed == frozenset()
    assert found.guards == ()


def test_what_stays_float_in_a_transformer_says_why():
    skipped = place(transformer()).skipped
    assert skipped["scores"] == skipped["mix"] == "both operands are computed at run time"
    assert skipped["soft"].startswith("int8 softmax")
    assert skipped["ln1"] == skipped["ln2"] == "the runtime normalises in float"
    assert skipped["res1"] == "an operand is float"
    assert skipped["gelu"] == "an operand is float"
    assert set(skipped) == {"turn", "scores", "soft", "mix", "res1", "ln1", "erf", "gelu", "res2", "ln2"}


def test_residual_additions_in_front_of_a_normalisation_become_sums():
    assert place(transformer()).sums == ("res1", "res2")


@pytest.mark.parametrize(
    ("body", "sums"),
    [
        ("[a] h = Add(x, z) [n] y = ReduceMean<axes = [1], keepdims = 1>(h)", ("a",)),
        ("[a] h = Add(x, z) y = Tanh(h)", ()),
        ("[a] h = Add(x, w) y = LayerNormalization(h, w)", ()),  # a constant operand is no residual
        ("[a] h = Add(x, z) i = Relu(h) y = LayerNormalization(i, w)", ()),
        ("[a] h = Mul(x, z) y = LayerNormalization(h, w)", ()),
    ],
)
def test_other_additions_stay_as_they_are(body, sums):
    made = model(f"g (float[2,4] x, float[2,4] z, float[4] w) => (float[a,b] y) {{ {body} }}", w=weights(4))
    assert place(made).sums == sums


def test_a_sum_of_integers_stays_an_addition():
    made = model("g (int64[2,4] x, int64[2,4] z) => (int64[2,1] y) { h = Add(x, z) y = ReduceMean<axes = [1]>(h) }")
    assert place(made).sums == ()


GEMMS = "float[2,4] x, float[4,4] w, float[4,4] v, float[4,3] u"
GEMM_WEIGHTS = {"w": weights(4, 4), "v": weights(4, 4, seed=1), "u": weights(4, 3)}


def gemms(body, output="float[2,a] y"):
    return place(model(f"g ({GEMMS}) => ({output}) {{ {body} }}", **GEMM_WEIGHTS))


def test_linear_layers_in_a_row_pass_integers_on():
    found = gemms("[a] h = Gemm(x, w) [r] i = Relu(h) [b] j = Gemm(i, v) [c] y = Gemm(j, u)")
    assert integer(found) == ["a", "b", "c"]
    assert found.tensors == ("x", "i", "j")
    assert found.fixed == {"i", "j"}
    assert found.guards == ()


def test_a_linear_result_that_is_read_in_float_as_well_keeps_its_float_value():
    """The runtime fuses a Gemm with a QuantizeLinear or with float readers, not with both: a Sum in between."""
    for body, output in (
        ("[a] h = Gemm(x, w) y = Tanh(h) [b] z = Gemm(h, u)", "float[2,4] y, float[2,3] z"),
        ("[a] h = Gemm(x, w) [b] y = Gemm(h, u)", "float[2,4] h, float[2,3] y"),
    ):
        found = gemms(body, output)
        assert integer(found) == ["a", "b"]
        assert found.tensors == ("x", "h")
        assert found.fixed == frozenset()
        assert found.guards == ("h",)


def test_no_sum_behind_an_activation_that_is_read_in_float_as_well():
    found = gemms("[a] h = Gemm(x, w) i = Relu(h) [b] y = Gemm(i, u)", "float[2,4] i, float[2,3] y")
    assert found.guards == ()


IMAGE = "float[1,3,8,8] x, float[4,3,3,3] w, float[4,4,3,3] v, float[4,4,1,1] u, float l, float r"
IMAGE_WEIGHTS = {
    "w": weights(4, 3, 3, 3),
    "v": weights(4, 4, 3, 3),
    "u": weights(4, 4, 1, 1),
    "l": np.float32(0.5),
    "r": np.float32(4),
}


@pytest.mark.parametrize(
    ("body", "guards"),
    [
        ("h = Conv(x, w) [f] i = ConvTranspose(h, v) y = Conv(i, u)", ("i",)),
        ("h = Conv(x, w) [f] i = ConvTranspose(h, v) j = Relu(i) y = Conv(j, u)", ("j",)),
        ("h = Conv(x, w) [f] i = ConvTranspose(h, v) j = Clip(i, l, r) y = Conv(j, u)", ("j",)),
        ("h = Conv(x, w) [f] i = Conv(h, v) j = Relu(i) y = Conv(j, u)", ("j",)),
        ("h = Conv(x, w) [f] i = Conv(h, v) j = MaxPool<kernel_shape = [2, 2]>(i) y = Conv(j, u)", ("j",)),
        ("h = Conv(x, w) [t] k = Transpose<perm = [0,1,3,2]>(h) [f] i = Conv(k, v) y = Conv(i, u)", ("i",)),
        ("h = Conv(x, w) [f] i = Softmax(h) y = Conv(i, u)", ("i",)),
        (
            "h = Conv(x, w) [f] i = Conv(h, v) j = Relu(i) k = Tanh(i) s = Conv(j, u) q = Conv(k, u) y = Add(s, q)",
            ("j",),
        ),
        ("[f] i = ConvTranspose(x, t) y = Conv(i, u)", ()),  # reads float
        ("h = Conv(x, w) [f] y = ConvTranspose(h, v)", ()),  # nothing is quantized behind it
        ("h = Conv(x, w) [f] i = ConvTranspose(h, v) j = Tanh(i) y = Conv(j, u)", ()),  # nor next to it
        ("h = Conv(x, w) [f] i = Tanh(h) y = Conv(i, u)", ()),  # the runtime leaves it alone
    ],
)
def test_float_nodes_the_runtime_would_quantize_are_guarded(body, guards):
    made = model(f"g ({IMAGE}, float[3,4,3,3] t) => (float y) {{ {body} }}", **IMAGE_WEIGHTS, t=weights(3, 4, 3, 3))
    found = place(made, keep_float=["f"])
    assert "f" not in integer(found)
    assert found.guards == guards


def test_nodes_are_kept_in_float_on_request():
    text = f"g ({IMAGE}) => (float y) {{ [a] h = Conv(x, w) [relu] i = Relu(h) [b] j = Conv(i, v) [c] y = Conv(j, u) }}"
    made = model(text, **IMAGE_WEIGHTS)
    for name in ("a", "relu"):  # a unit stays whole
        found = place(made, keep_float=[name])
        assert integer(found) == ["b", "c"]
        assert found.skipped == {"a": "asked to stay in float"}
        assert found.tensors == ("i", "j", "y")
        assert found.fixed == {"j", "y"}
    assert integer(place(made, keep_float=["a", "b", "c"])) == []


@pytest.mark.parametrize(("tensor", "left"), [("x", ["b", "c"]), ("i", ["c"]), ("j", ["a"]), ("y", ["a", "b"])])
def test_tensors_that_calibration_refuses_take_their_units_out(tensor, left):
    text = f"g ({IMAGE}) => (float y) {{ [a] h = Conv(x, w) i = Relu(h) [b] j = Conv(i, v) [c] y = Conv(j, u) }}"
    found = place(model(text, **IMAGE_WEIGHTS), refuse={tensor: "it is broken"})
    assert integer(found) == left
    assert set(found.skipped.values()) == {"it is broken"}
    assert tensor not in found.tensors


def branches(then, other):
    text = f"""g ({IMAGE}, bool c, float[1,4,6,6] z) => (float y) {{
        [a] h = Conv(x, w)
        [if] k = If(c) <then_branch = t () => (float m) {{ {then} }}, else_branch = e () => (float n) {{ {other} }}>
        [b] y = Conv(k, u)
    }}"""
    return model(text, **IMAGE_WEIGHTS)


@pytest.mark.parametrize(
    ("then", "other"),
    [("m = Relu(h)", "n = Neg(h)"), ("m = Relu(h)", "n = Neg(z)"), ("m = Conv(h, v)", "n = Conv(z, v)")],
)
def test_the_branches_of_an_if_stay_as_they_are(then, other):
    found = place(branches(then, other))
    assert integer(found) == ["a", "b"]
    assert found.skipped == {"if": "its branches are left as they are"}
    assert found.tensors == ("x", "h", "k", "y")
    assert found.fixed == {"h", "y"}
    assert [len(unit.members) for unit in found.units] == [1, 1, 1]


TABLE = weights(2048, 8)


@pytest.mark.parametrize(
    ("table", "body", "tables"),
    [
        (TABLE, "[g] y = Gather(t, i)", ("g",)),
        (TABLE[:2047], "[g] y = Gather(t, i)", ()),  # too small
        (TABLE, "[g] y = Gather<axis = 1>(t, i)", ()),
        (TABLE, "[g] y = Gather(t, j)", ()),  # constant rows: folded elsewhere
        (TABLE.reshape(2048, 4, 2), "[g] y = Gather(t, i)", ()),
        (TABLE.astype(np.float64), "[g] y = Gather(t, i)", ()),
        (np.where(np.arange(8) == 3, -np.inf, TABLE).astype(np.float32), "[g] y = Gather(t, i)", ()),  # a mask
    ],
)
def test_large_tables_are_stored_in_integers(table, body, tables):
    kind, dims = "double" if table.dtype == np.float64 else "float", ",".join(map(str, table.shape))
    text = f"g (int64[2] i, int64[2] j, {kind}[{dims}] t) => ({kind} y) {{ {body} }}"
    found = place(model(text, t=table, j=np.asarray([0, 5])))
    assert found.tables == tables


def test_a_table_is_kept_in_float_on_request():
    made = model("g (int64[2] i, float[2048,8] t) => (float y) { [g] y = Gather(t, i) }", t=TABLE)
    assert place(made, keep_float=["g"]).tables == ()
