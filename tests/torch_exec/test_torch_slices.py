"""Cutting slices, hanging functions into them, and what is refused."""

import copy
import weakref

import numpy as np
import pytest
from helpers import model, run, weights

pytest.importorskip("torch")

import torch

from onnxq import graph
from onnxq.errors import UnsupportedError, UsageError
from onnxq.torch_exec import Slice, check, extract, supported_ops

CNN = """g (float[2,3,6,6] x, float[4,3,3,3] w, float[4] b, float[4,1,3,3] v, float[4] s, float[4,5] f, int64[2] r)
    => (float[2,5] y) {
    a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)
    n = BatchNormalization<epsilon=0.1>(a, s, b, b, s)
    h = Relu(n)
    d = Conv<pads=[1,1,1,1], group=4>(h, v)
    e = Add(d, h)
    p = GlobalAveragePool(e)
    q = Reshape(p, r)
    y = Gemm(q, f)
}"""
TRANSFORMER = """g (float[2,5,8] x, float[8,24] w, float[24] b, float[8] s, float[8,8] o, int64 axis, int64[1] heads)
    => (float[2,5,8] y) {
    n = LayerNormalization<epsilon=0.1>(x, s, s)
    m = MatMul(n, w)
    qkv = Add(m, b)
    q, k, v = Split<axis=2>(qkv)
    shape = Shape(x)
    two = Constant<value_ints=[2]>()
    zero = Constant<value_int=0>()
    batch = Gather(shape, zero)
    front = Unsqueeze(batch, first)
    first = Constant<value_ints=[0]>()
    rest = Constant<value_ints=[5, 2, 4]>()
    split = Concat<axis=0>(front, rest)
    q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,3,1]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
    score = MatMul(qt, kt)
    half = Constant<value_float=0.5>()
    scaled = Mul(score, half)
    weight = Softmax<axis=-1>(scaled)
    mixed = MatMul(weight, vt)
    back = Transpose<perm=[0,2,1,3]>(mixed)
    whole = Reshape(back, flat)
    flat = Constant<value_ints=[0, 0, -1]>()
    out = MatMul(whole, o)
    y = Add(out, x)
}"""


@pytest.fixture
def cnn():
    return model(
        CNN,
        w=weights(4, 3, 3, 3),
        b=weights(4),
        v=weights(4, 1, 3, 3),
        s=weights(4, low=0.5, high=1.5),
        f=weights(4, 5),
        r=np.array([0, -1]),
    )


@pytest.fixture
def transformer():
    lines = TRANSFORMER.replace(", int64 axis, int64[1] heads", "").splitlines()
    early = [line for line in lines if "Constant<" in line]
    text = "\n".join([*lines[:2], *early, *(line for line in lines[2:] if "Constant<" not in line)])
    return model(text, w=weights(8, 24), b=weights(24), s=weights(8), o=weights(8, 8))


def feed(name="x", *shape):
    return {name: torch.from_numpy(weights(*(shape or (2, 3, 6, 6))))}


def test_whole_models_agree_with_onnxruntime(cnn, transformer):
    assert check(extract(cnn, ["x"], ["y"]), cnn, {"x": weights(2, 3, 6, 6)}) < 1e-6
    assert check(extract(transformer, ["x"], ["y", "weight"]), transformer, {"x": weights(2, 5, 8)}) < 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), [("n", "e"), ("ha", "en"), ("x", "xa"), ("p", "y"), ("wx", "a")])
def test_any_part_agrees_with_onnxruntime(cnn, inputs, outputs):
    every = run(graph.with_outputs(cnn, list("anhep")), {"x": weights(2, 3, 6, 6)})
    every |= {"x": weights(2, 3, 6, 6), "w": weights(4, 3, 3, 3, seed=5)}
    assert check(extract(cnn, list(inputs), list(outputs)), cnn, {name: every[name] for name in inputs}) < 1e-6


def test_the_check_sees_a_wrong_weight(cnn):
    made = extract(cnn, ["x"], ["a"])
    with torch.no_grad():
        made.constants["w"][0, 0, 0, 0] += 0.1
    feeds = {"x": weights(2, 3, 6, 6)}
    right = run(graph.with_outputs(cnn, ["a"], keep=False), feeds)["a"]
    wrong = made({"x": torch.from_numpy(feeds["x"])})["a"].numpy()
    assert check(made, cnn, feeds) == pytest.approx(np.abs(wrong - right).max() / np.ptp(right), rel=1e-6)
    assert check(made, cnn, feeds) > 1e-3


def test_the_check_of_an_output_without_range():
    one = model("g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }", w=np.full(2, 3, np.float32))
    made = extract(one, ["x"], ["y"])
    made.constants["w"].fill_(2.5)
    assert check(made, one, {"x": np.ones(2, np.float32)}) == 0.5


def test_functions_are_applied_in_a_fixed_order(cnn):
    order = []
    functions = {
        name: lambda value, name=name: order.append(name) or value for name in ("v", "y", "b", "x", "n", "w", "a")
    }
    made = extract(cnn, ["x"], ["y"])
    made(feed(), replace=functions)
    assert order == ["x", *(name for name in made.constants if name in functions), "a", "n", "y"]


def test_the_check_sees_wrong_shapes_and_infinities(cnn):
    made = extract(cnn, ["x"], ["a"])
    made.constants["b"].fill_(torch.inf)
    assert check(made, cnn, {"x": weights(2, 3, 6, 6)}) == np.inf
    one = model("g (float[2] x) => (float[2] y) { y = Log(x) }")
    assert check(extract(one, ["x"], ["y"]), one, {"x": np.array([0, 1], np.float32)}) == 0
    other = model("g (float[2] x, int64[1] k) => (float[n] y) { y = Tile(x, k) }", k=np.array([2]))
    assert check(extract(one, ["x"], ["y"]), other, {"x": np.ones(2, np.float32)}) == np.inf


def test_only_what_is_needed_is_kept(cnn):
    made = extract(cnn, ["n"], ["d"])
    assert isinstance(made, Slice)
    assert (made.inputs, made.outputs) == (("n",), ("d",))
    assert set(made.constants) == {"v"}
    assert not list(made.parameters())
    assert len(list(made.buffers())) == 1


def test_constants_can_be_replaced_for_one_call(cnn):
    made = extract(cnn, ["x"], ["y"])
    before = made(feed())["y"]
    w = made.constants["w"].clone().requires_grad_()
    after = made(feed(), constants={"w": 2 * w})["y"]
    after.sum().backward()
    changed = copy.deepcopy(made)
    changed.constants["w"].mul_(2)
    torch.testing.assert_close(after, changed(feed())["y"])
    assert w.grad.abs().min() >= 0
    assert w.grad.abs().sum() > 0
    torch.testing.assert_close(made(feed())["y"], before, rtol=0, atol=0)


def test_shapes_are_constants_too(cnn):
    made = extract(cnn, ["p"], ["q"])
    feeds = feed("p", 2, 4, 1, 1)
    assert made(feeds)["q"].shape == (2, 4)
    assert made(feeds, constants={"r": torch.tensor([4, 2])})["q"].shape == (4, 2)
    assert made(feeds, replace={"r": lambda r: r + torch.tensor([1, 9])})["q"].shape == (1, 8)


@pytest.mark.parametrize("name", ["x", "w", "h", "y"])
def test_functions_can_be_hung_on_any_value(cnn, name):
    made = extract(cnn, ["x"], ["y"])
    values = list(dict.fromkeys(["y", name]))
    open_ = extract(cnn, ["x"], values if name in "hy" else ["y"])

    def halve(value):
        seen.append(value)
        return torch.floor(value * 2) / 2

    seen = []
    found = open_(feed(), replace={name: halve})
    assert len(seen) == 1
    if name == "x":
        expected = made({"x": halve(feed()["x"])})["y"]
    elif name == "w":
        expected = made(feed(), constants={"w": halve(made.constants["w"])})["y"]
    elif name == "h":
        expected = extract(cnn, ["h"], ["y"])({"h": found["h"]})["y"]
        torch.testing.assert_close(found["h"], halve(seen[0]))
    else:
        expected = halve(made(feed())["y"])
    torch.testing.assert_close(found["y"], expected)
    assert not torch.equal(found["y"], made(feed())["y"])


def test_an_override_is_replaced_as_well(cnn):
    made = extract(cnn, ["x"], ["a"])
    w = made.constants["w"]
    found = made(feed(), constants={"w": 3 * w}, replace={"w": lambda value: value + 1})
    torch.testing.assert_close(found["a"], made(feed(), constants={"w": 3 * w + 1})["a"])


def test_names_that_are_not_there(cnn):
    made = extract(cnn, ["n"], ["d"])
    feeds = feed("n", 2, 4, 3, 3)
    with pytest.raises(UsageError, match="not fed n"):
        made({"x": feeds["n"]})
    with pytest.raises(UsageError, match="no value w"):
        made(feeds, constants={"w": feeds["n"]})
    with pytest.raises(UsageError, match="no value h"):
        made(feeds, constants={"h": feeds["n"]})
    with pytest.raises(UsageError, match="no value n"):
        made(feeds, constants={"n": feeds["n"]})
    with pytest.raises(UsageError, match="no value a"):
        made(feeds, replace={"a": torch.relu})
    with pytest.raises(UsageError, match="no value nowhere"):
        extract(cnn, ["nowhere"], ["y"])


def test_values_are_freed_when_their_last_reader_ran(cnn):
    born = {}

    def watch(name):
        def look(value):
            born[name] = weakref.ref(value)
            alive[name] = {other for other, ref in born.items() if ref() is not None}
            return value

        return look

    alive = {}
    with torch.no_grad():
        extract(cnn, ["x"], ["y", "n"])(feed(), replace={name: watch(name) for name in "anhdepqy"})
    assert alive["h"] == {"n", "h"}
    assert alive["d"] == {"n", "h", "d"}
    assert alive["p"] == {"n", "e", "p"}


def test_constants_follow_the_module(cnn):
    made = extract(cnn, ["x"], ["y"]).double()
    assert made({"x": feed()["x"].double()})["y"].dtype is torch.float64
    moved = extract(cnn, ["x"], ["y"]).to("meta")
    assert moved({"x": torch.zeros(2, 3, 6, 6, device="meta")})["y"].device.type == "meta"


def test_float16_and_bfloat16_constants():
    import ml_dtypes

    for dtype, name in ((np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")):
        text = f"g ({name}[3] x, {name}[3] w) => ({name}[3] y) {{ y = Mul(x, w) }}"
        made = extract(model(text, w=np.array([0.5, -2, 3], dtype)), ["x"], ["y"])
        kind = getattr(torch, name)
        found = made({"x": torch.ones(3, dtype=kind)})["y"]
        assert found.dtype is kind
        assert found.tolist() == [0.5, -2, 3]


REFUSALS = {
    "y = Unique(x)": "Unique",
    'y = Resize<mode="linear", coordinate_transformation_mode="tf_half_pixel_for_nn">(x, , s)': "tf_half",
    'y = RNN<hidden_size=4, activations=["Relu"]>(x, s, s)': "attribute activations",
    "y = GRU<hidden_size=4, clip=3.0>(x, s, s)": "attribute clip",
    "y, m = BatchNormalization(x, s, s, s, s)": "1 output",
    'y = Pad<mode="mirror">(x, s)': "mode = mirror",
    "y = Cast<to=8>(x)": "element type",
    "y = Gelu(x, x)": "1 input",
    "y = Concat(x, x)": "axis is missing",
    "y = Expand(x)": "input shape is missing",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals_name_the_node_and_the_reason(line):
    made = graph_of(line)
    with pytest.raises(UnsupportedError, match=rf"the_node.*{REFUSALS[line]}"):
        extract(made, ["x"], ["y"])


def graph_of(line, opset=18):
    """A model that the checker would not let through."""
    import onnx_ir
    from helpers import proto

    made = onnx_ir.from_proto(proto(f"g (float[2,2] x, float[2] s) => (float y) {{ {line} }}", opset, s=weights(2)))
    for node in made.graph:
        node.name = "the_node"
    return made


def test_other_refusals(cnn):
    with pytest.raises(UnsupportedError, match="graph input x"):
        extract(cnn, ["n"], ["y", "a"])
    with pytest.raises(UnsupportedError, match="operator set 12"):
        extract(graph_of("y = Relu(x)", 12), ["x"], ["y"])
    strange = graph_of("y = Relu(x)")
    next(iter(strange.graph)).domain = "com.example"
    with pytest.raises(UnsupportedError, match=r"the_node.*com\.example"):
        extract(strange, ["x"], ["y"])
    wide = model("g (uint32[2] x, uint32[2] w) => (uint32[2] y) { y = Add(x, w) }", w=np.ones(2, np.uint32))
    with pytest.raises(UnsupportedError, match="uint32"):
        extract(wide, ["x"], ["y"])


def test_a_constant_that_asks_for_training_is_refused_at_once():
    text = "g (float[2] x, float r, bool t) => (float[2] y) { y = Dropout(x, r, t) }"
    made = model(text, r=np.float32(0.3), t=np.array(True))
    with pytest.raises(UnsupportedError, match="t is True"):
        extract(made, ["x"], ["y"])


def test_attributes_of_older_operator_sets_stand_for_inputs():
    text = """g (float[2,1,3] x) => (float[a] y, float[a] z) {
        s = ReduceMax<axes=[0], keepdims=1>(x) t = ReduceMin<axes=[-1], keepdims=0>(x)
        y = Add(s, s) z = Sub(t, t) }"""
    made = model(text.replace("(float[a] y, float[a] z)", "(float y, float z)"), 13)
    assert check(extract(made, ["x"], ["s", "t"]), made, {"x": weights(2, 1, 3)}) == 0


def test_the_operators_are_sorted_and_many():
    names = supported_ops()
    assert list(names) == sorted(set(names))
    assert {"Conv", "ConvTranspose", "MatMul", "LayerNormalization", "Resize", "Attention"} <= set(names)
