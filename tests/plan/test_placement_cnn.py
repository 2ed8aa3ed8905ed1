import numpy as np
import pytest
from helpers import model, weights
from planning import integer

from onnxq.passes.merge_groups import MergeGroups
from onnxq.plan import place, units_of

IMAGE = "float[1,3,8,8] x, float[4,3,3,3] w, float[4,4,3,3] v, float[4,4,1,1] u"
CONSTANTS = {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 3, 3), "u": weights(4, 4, 1, 1)}


def cnn(body, extra="", output="float[1,a,b,c] y", **constants):
    return model(f"g ({IMAGE}{extra}) => ({output}) {{ {body} }}", **CONSTANTS, **constants)


def test_convolutions_and_their_activations_run_in_integers():
    found = place(cnn("[a] h = Conv(x, w) [r] i = Relu(h) [b] y = Conv(i, v)"))
    assert integer(found) == ["a", "b"]
    assert [unit.members[-1].name for unit in found.units] == ["r", "b"]
    assert found.tensors == ("x", "i", "y")
    assert found.fixed == {"i", "y"}  # the float input is still there
    assert found.skipped == {}
    assert (found.guards, found.sums, found.tables) == ((), (), ())
    assert [unit.name for unit in found.layers] == ["a", "b"]


@pytest.mark.parametrize("activation", ["", "[r] s = Relu(s0)"])
def test_a_residual_addition_runs_in_integers(activation):
    add = "s0" if activation else "s"
    found = place(cnn(f"[a] h = Conv(x, w) [b] i = Conv(h, u) [add] {add} = Add(h, i) {activation} [c] y = Conv(s, u)"))
    assert integer(found) == ["a", "b", "add", "c"]
    assert found.tensors == ("x", "h", "i", "s", "y")
    assert found.skipped == {}


@pytest.mark.parametrize("behind", ["y = Add(h, i)", "s = Add(h, i) [r] y = Relu(s)", "s = Add(h, i) y = Tanh(s)"])
def test_an_addition_nobody_reads_in_integers_stays_float(behind):
    found = place(cnn(f"[a] h = Conv(x, w) [b] i = Conv(h, u) [add] {behind}"))
    assert integer(found) == ["a", "b"]
    assert found.skipped["add"] == "nothing behind it reads integers"
    assert "y" not in found.tensors


def test_adding_a_float_input_stays_float():
    found = place(cnn("[a] h = Conv(x, w) [add] s = Add(h, z) [b] y = Conv(s, u)", ", float[1,4,6,6] z"))
    assert found.skipped == {"add": "an operand is float"}
    assert found.tensors == ("x", "h", "s", "y")
    assert found.fixed == {"h", "y"}


@pytest.mark.parametrize(
    "op",
    [
        "MaxPool<kernel_shape = [2, 2]>(h)",
        "AveragePool<kernel_shape = [2, 2]>(h)",
        "LeakyRelu(h)",
        "Sigmoid(h)",
        "Transpose<perm = [0, 1, 3, 2]>(h)",
        "Add(h, k)",
        "Mul(k, h)",
        "Concat<axis = 2>(h, k)",
        "Reshape(h, r)",
        'Resize<mode = "nearest">(h, , t)',
        "GlobalAveragePool(h)",
    ],
)
def test_what_is_between_convolutions_follows(op):
    extra = ", float[1,4,6,6] k, int64[4] r, float[4] t"
    shape, factors = np.asarray([1, 4, 4, 9]), np.asarray([1, 1, 2, 2], np.float32)
    made = cnn(f"[a] h = Conv(x, w) [m] i = {op} [b] y = Conv(i, u)", extra, k=weights(1, 4, 6, 6), r=shape, t=factors)
    assert integer(place(made)) == ["a", "m", "b"]


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("Tanh(h)", "the runtime has no integer kernel for Tanh"),
        ("Softmax(h)", "int8 softmax is 4 to 5 times slower than float in this runtime"),
        ("ConvTranspose(h, v)", "the runtime has no integer kernel for ConvTranspose"),
        ("ReduceMean<axes = [2], keepdims = 1>(h)", "the runtime has no integer kernel for ReduceMean"),
        ('Resize<mode = "linear">(h, , t)', "the runtime has no integer kernel for Resize"),
        (
            'Resize<mode = "nearest", coordinate_transformation_mode = "tf_crop_and_resize">(h, o, t)',
            "the runtime has no",
        ),
        ("Mul(h, k)", "its constant operand k holds infinities or NaN"),
        (
            "AveragePool<kernel_shape = [2, 2], ceil_mode = 1, count_include_pad = 1>(h)",
            "the runtime's integer Average",
        ),
        ("AveragePool<kernel_shape = [2, 2], dilations = [2, 2]>(h)", "the runtime's integer AveragePool knows no dil"),
    ],
)
def test_what_has_no_kernel_stays_float_between_convolutions(op, reason):
    text = f"[a] h = Conv(x, w) [m] i = {op} [b] y = Conv(i, u)"
    constants = {"k": np.float32(np.inf), "t": np.ones(4, np.float32), "o": np.zeros(8, np.float32)}
    inputs = ", float k, float[4] t, float[8] o"
    opset = 19 if "dilations" in op else 17
    made = model(f"g ({IMAGE}{inputs}) => (float[1,a,b,c] y) {{ {text} }}", opset, **CONSTANTS, **constants)
    found = place(made)
    assert integer(found) == ["a", "b"]
    assert found.skipped["m"].startswith(reason)
    assert {"h", "i"} <= set(found.tensors)
    assert found.fixed == {"h", "y"}


def test_a_pool_with_indices_stays_float():
    body = "[a] h = Conv(x, w) [m] i, j = MaxPool<kernel_shape = [2, 2]>(h) [b] y = Conv(i, u)"
    found = place(cnn(body, output="float[1,a,b,c] y, int64[1,d,e,f] j"))
    assert found.skipped["m"] == "it also returns indices"


def test_a_global_pool_runs_in_integers_for_its_own_sake():
    found = place(cnn("[a] h = Conv(x, w) [m] i = GlobalAveragePool(h) [r] y = Flatten(i)", output="float[1,4] y"))
    assert integer(found) == ["a", "m"]
    assert found.skipped == {"r": "nothing behind it reads integers"}


def test_islands_of_float_feed_integer_additions():
    body = """[a] h = Conv(x, w) [p] i = Pad(h, q) [b] j = Conv(i, v) [add] s = Add(h, j)
              [mean] m = ReduceMean<axes = [2, 3], keepdims = 1>(s) [mul] t = Mul(s, m) [c] y = Conv(t, u)"""
    found = place(cnn(body, ", int64[8] q", q=np.asarray([0, 0, 1, 1, 0, 0, 1, 1])))
    assert integer(found) == ["a", "b", "add", "mul", "c"]
    assert set(found.skipped) == {"p", "mean"}
    assert found.tensors == ("x", "h", "i", "j", "s", "m", "t", "y")
    assert found.fixed == {"h", "j", "s", "t", "y"}


GROUPS = "float[1,16,8,8] x, float[16,1,3,3] d, float[16,2,3,3] g, float[16,8,3,3] s, float[16,16,1,1] u"
GROUPED = {
    "d": weights(16, 1, 3, 3),
    "g": weights(16, 2, 3, 3),
    "s": weights(16, 8, 3, 3),
    "u": weights(16, 16, 1, 1),
}


def grouped(body):
    return place(model(f"g ({GROUPS}) => (float[1,16,b,c] y) {{ {body} }}", **GROUPED))


def test_many_small_groups_stay_float():
    found = grouped("[a] h = Conv(x, u) [n] i = Conv<group = 8>(h, g) [r] j = Relu(i) [b] y = Conv(j, u)")
    assert integer(found) == ["a", "b"]
    assert found.skipped == {"n": "8 groups of 2 channels are slower in int8 than in float"}
    assert found.guards == ("j",)


def test_merged_groups_run_in_integers():
    text = "g (float[1,64,8,8] x, float[64,4,3,3] w) => (float[1,64,b,c] y) { [n] y = Conv<group = 16>(x, w) }"
    m = model(text, w=weights(64, 4, 3, 3))
    assert place(m).skipped == {"n": "16 groups of 4 channels are slower in int8 than in float"}
    assert MergeGroups()(m) == 1
    assert integer(place(m)) == ["n"]


def test_groups_of_one_channel_with_several_outputs_stay_float():
    text = (
        "g (float[1,16,8,8] x, float[32,1,3,3] w) => (float[1,32,b,c] y) { [n] h = Conv<group = 16>(x, w) y = Tanh(h) }"
    )
    found = place(model(text, w=weights(32, 1, 3, 3)))
    assert found.skipped["n"] == "16 groups of 1 channels are slower in int8 than in float"


def test_few_groups_run_in_integers():
    assert integer(grouped("[a] h = Conv(x, u) [n] y = Conv<group = 2>(h, s)")) == ["a", "n"]


@pytest.mark.parametrize(
    "body", ["[n] h = Conv<group = 16>(x, d) y = Tanh(h)", "t = Tanh(x) [n] y = Conv<group = 16>(t, d)"]
)
def test_a_lone_depthwise_convolution_stays_float(body):
    found = grouped(body)
    assert integer(found) == []
    assert found.skipped["n"] == "a depthwise convolution between float nodes is faster in float"
    assert found.tensors == ()


@pytest.mark.parametrize(
    "body",
    [
        "[a] h = Conv(x, u) [n] y = Conv<group = 16>(h, d)",
        "[n] h = Conv<group = 16>(x, d) [b] y = Conv(h, u)",
        "[a] h = Conv(x, u) [r] i = LeakyRelu(h) [n] j = Conv<group = 16>(i, d) k = Tanh(j) y = Exp(k)",
    ],
)
def test_a_depthwise_convolution_in_integer_company_runs_in_integers(body):
    assert "n" in integer(grouped(body))


def test_a_convolution_of_one_channel_is_not_depthwise():
    text = "g (float[1,1,8,8] x, float[4,1,3,3] w) => (float[1,4,6,6] y) { [n] h = Conv(x, w) y = Tanh(h) }"
    assert integer(place(model(text, w=weights(4, 1, 3, 3)))) == ["n"]


def test_every_node_belongs_to_one_unit():
    made = cnn("[a] h = Conv(x, w) [r] i = Relu(h) [m] j = MaxPool<kernel_shape = [2, 2]>(i) [t] y = Tanh(j)")
    members = [member.name for unit in units_of(made) for member in unit.members]
    assert members == ["a", "r", "m", "t"]
    assert [unit.kind for unit in units_of(made)] == ["layer", "move", "float"]


def test_shapes_and_masks_stay_as_they_are():
    body = """[a] h = Conv(x, w) [shape] n = Shape(h) [g] k = Gather(n, z) [c] s = Concat<axis = 0>(k, e)
              [r] i = Reshape(h, s) [b] y = Conv(i, u)"""
    made = cnn(body, ", int64[2] z, int64[2] e", z=np.asarray([0, 1]), e=np.asarray([9, 4]))
    found = place(made)
    assert integer(found) == ["a", "r", "b"]
    assert set(found.skipped) == {"shape", "g", "c"}
    assert found.tensors == ("x", "h", "i", "y")


def test_a_split_shares_its_grid_with_all_parts():
    body = "[a] h = Conv(x, w) [s] i, j = Split<axis = 1>(h, n) [add] k = Add(i, j) [b] y = Conv(k, q)"
    inputs = ", int64[2] n, float[4,2,1,1] q"
    found = place(cnn(body, inputs, n=np.asarray([2, 2]), q=weights(4, 2, 1, 1)))
    assert integer(found) == ["a", "s", "add", "b"]
    assert found.tensors == ("x", "h", "i", "j", "k", "y")
