"""Operators and small models against onnxruntime, with attributes that the published cases leave out."""

import numpy as np
import pytest
from helpers import model, weights
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")


from onnxq.torch_exec import check, extract

CLOSE = 2e-6


def difference(text, feeds, outputs=("y",), opset=17, **constants):
    made = model(text, opset, **constants)
    return check(extract(made, list(feeds), list(outputs)), made, feeds)


CONVOLUTIONS = [
    "Conv<pads=[1,0,2,1], strides=[2,1]>",
    "Conv<pads=[1,2,1,2], dilations=[2,1]>",
    'Conv<auto_pad="SAME_UPPER", strides=[2,2]>',
    'Conv<auto_pad="SAME_LOWER", strides=[2,2]>',
    'Conv<auto_pad="VALID", dilations=[1,2]>',
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_convolutions(op, group, bias):
    text = "g (float[n,4,8,9] x, float[6,k,3,2] w, float[6] b) => (float[a,6,c,d] y) {"
    text += f" y = {op[:-1]}, group={group}>(x, w{', b' * bias}) }}"
    w = weights(6, 4 // group, 3, 2)
    assert difference(text, {"x": weights(2, 4, 8, 9)}, w=w, b=weights(6)) < CLOSE


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(rank):
    shape, kernel = (5, 6, 7)[:rank], (2, 3, 2)[:rank]
    sizes, taps = ",".join(map(str, shape)), ",".join(map(str, kernel))
    text = f"g (float[2,3,{sizes}] x, float[4,3,{taps}] w, float[3,2,{taps}] v, float[2] b) => (float y, float z) {{"
    text += " y = Conv<strides=[2{0}]>(x, w) z = ConvTranspose<strides=[2{0}]>(x, v, b) }}".format(",1" * (rank - 1))
    feeds = {"x": weights(2, 3, *shape)}
    assert difference(text, feeds, "yz", w=weights(4, 3, *kernel), v=weights(3, 2, *kernel), b=weights(2)) < CLOSE


TRANSPOSED = [
    "strides=[2,3]",
    "strides=[2,3], pads=[1,0,0,2]",
    "strides=[2,3], pads=[1,1,1,1], output_padding=[1,2]",
    "strides=[2,2], output_padding=[1,1]",
    "dilations=[2,1], pads=[0,1,2,0]",
    "strides=[2,3], output_shape=[9,11]",
    'strides=[2,3], output_shape=[8,12], auto_pad="SAME_UPPER"',
    'strides=[2,2], auto_pad="SAME_UPPER"',
    'strides=[2,2], auto_pad="SAME_LOWER"',
    'strides=[2,1], auto_pad="VALID"',
]


@pytest.mark.parametrize("attributes", TRANSPOSED)
@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convolutions(attributes, group):
    text = "g (float[2,4,4,4] x, float[4,3,3,4] w, float[o] b) => (float[a,b,c,d] y) {"
    text += f" y = ConvTranspose<{attributes}, group={group}>(x, w, b) }}"
    assert difference(text, {"x": weights(2, 4, 4, 4)}, w=weights(4, 3, 3, 4), b=weights(3 * group)) < CLOSE


POOLS = [
    "MaxPool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>",
    "MaxPool<kernel_shape=[3,2], strides=[2,3], pads=[1,0,1,1], dilations=[2,1]>",
    'MaxPool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_LOWER">',
    "MaxPool<kernel_shape=[2,2], strides=[3,3], pads=[1,1,1,1], ceil_mode=1>",
    "AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,0,1]>",
    "AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,0,1], count_include_pad=1>",
    "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1>",
    "AveragePool<kernel_shape=[3,3], strides=[2,3], pads=[1,1,1,1], ceil_mode=1, count_include_pad=1>",
    'AveragePool<kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER">',
    "LpPool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,1,1], p=3>",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GlobalLpPool<p=3>",
]


@pytest.mark.parametrize("op", POOLS)
def test_pools(op):
    text = f"g (float[2,3,7,8] x) => (float[a,b,c,d] y) {{ y = {op}(x) }}"
    assert difference(text, {"x": weights(2, 3, 7, 8)}) < CLOSE


@pytest.mark.parametrize("order", [0, 1])
def test_indices_of_a_max_pool(order):
    text = f"g (float[2,3,7,8] x) => (float y, int64 i) {{ y, i = MaxPool<kernel_shape=[3,2], strides=[2,2], \
        pads=[1,0,1,1], storage_order={order}>(x) }}"
    assert difference(text, {"x": weights(2, 3, 7, 8)}, "yi") < CLOSE


def test_dilated_means():
    text = "g (float[2,3,7,8] x) => (float y) { y = AveragePool<kernel_shape=[3,2], dilations=[2,3],"
    text += " strides=[1,2], pads=[1,0,2,1]>(x) }"
    assert difference(text, {"x": weights(2, 3, 7, 8)}, opset=19) < CLOSE


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"]


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    transform=st.sampled_from(COORDINATES),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    a=st.sampled_from([-0.75, -0.5]),
)
def test_resizing(mode, transform, rounding, height, width, a):
    # onnxruntime crops no axis whose length stays.
    assume(transform != "tf_crop_and_resize" or (height != 5 and width != 4))
    text = f"""g (float[1,2,5,4] x, float[8] r, int64[4] s) => (float[a,b,c,d] y) {{
        y = Resize<mode="{mode}", coordinate_transformation_mode="{transform}", nearest_mode="{rounding}",
                   cubic_coeff_a={a}, extrapolation_value=7.0>(x, r, , s) }}"""
    roi = np.array([0, 0, 0.2137, -0.3171, 1, 1, 0.8719, 1.1313], np.float32)
    sizes = np.array([1, 2, height, width], np.int64)
    assert difference(text, {"x": weights(1, 2, 5, 4)}, opset=13, r=roi, s=sizes) < 1e-5


def test_sizes_are_products_in_float32():
    text = 'g (float[1,1,5,5] x, float[4] s) => (float[1,1,7,a] y) { y = Resize<mode="linear">(x, , s) }'
    scales = np.array([1, 1, 1.4, 0.6], np.float32)
    assert int(scales[2] * np.float32(5)) == 7 > int(float(scales[2]) * 5)
    assert difference(text, {"x": weights(1, 1, 5, 5)}, s=scales) < CLOSE


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resizing_against_aliasing(mode):
    text = "g (float[1,2,11,9] x, float[2] s) => (float y) {"
    text += f' y = Resize<mode="{mode}", antialias=1, axes=[2,3], exclude_outside=1>(x, , s) }}'
    scales = np.array([0.37, 1.3], np.float32)
    assert difference(text, {"x": weights(1, 2, 11, 9)}, opset=18, s=scales) < 1e-5


NORMS = {
    "InstanceNormalization<epsilon=0.1>(x, s, b)": (17, 6),
    "GroupNormalization<epsilon=0.1, num_groups=3>(x, s, b)": (21, 6),
    "BatchNormalization<epsilon=0.1>(x, s, b, b, v)": (17, 6),
    "LayerNormalization<epsilon=0.1, axis=-1>(x, s, b)": (17, 4),
    "LayerNormalization<epsilon=0.1>(x, s)": (17, 4),
    "RMSNormalization<epsilon=0.1>(x, s)": (23, 4),
    "LRN<size=3, alpha=0.3, beta=0.6, bias=1.5>(x)": (17, 6),
    "LpNormalization<axis=1, p=1>(x)": (17, 6),
    "MeanVarianceNormalization<axes=[1,3]>(x)": (17, 6),
}


@pytest.mark.parametrize("call", NORMS)
def test_norms(call):
    opset, size = NORMS[call]
    text = f"g (float[2,6,5,4] x, float[c] s, float[c] b, float[c] v) => (float[2,6,5,4] y) {{ y = {call} }}"
    constants = {"s": weights(size), "b": weights(size, seed=1), "v": weights(size, low=0.1, high=2)}
    used = call.partition("(")[2]
    for name in "sbv":
        if name not in used:
            text = text.replace(f", float[c] {name}", "")
            del constants[name]
    assert difference(text, {"x": weights(2, 6, 5, 4)}, opset=opset, **constants) < CLOSE


@pytest.mark.parametrize(
    "call", ["Gelu(x)", 'Gelu<approximate="tanh">(x)', "Mish(x)", "HardSwish(x)", "Celu<alpha=0.7>(x)"]
)
def test_activations(call):
    assert difference(f"g (float[3,4] x) => (float y) {{ y = {call} }}", {"x": 3 * weights(3, 4)}, opset=20) < CLOSE


@pytest.mark.parametrize("attributes", ["", "linear_before_reset=1, "])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent(direction, attributes):
    ways = 2 if direction == "bidirectional" else 1
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        extra = attributes if op == "GRU" else ""
        text = f"""g (float[5,3,2] x, float w, float r, float b, int32[3] l, float h) => (float y, float z) {{
            y, z = {op}<{extra}hidden_size=4, direction="{direction}">(x, w, r, b, l, h) }}"""
        found = difference(
            text.replace(
                "float w, float r, float b",
                f"float[{ways},{4 * gates},2] w, float[{ways},{4 * gates},4] r,\
                float[{ways},{8 * gates}] b",
            ).replace("float h", f"float[{ways},3,4] h"),
            {"x": weights(5, 3, 2)},
            "yz",
            w=weights(ways, 4 * gates, 2),
            r=weights(ways, 4 * gates, 4),
            b=weights(ways, 8 * gates),
            l=np.array([5, 2, 4], np.int32),
            h=weights(ways, 3, 4),
        )
        assert found < CLOSE


def test_grid_sampling():
    text = """g (float[2,3,5,6] x, float[2,4,3,2] p) => (float y, float z) {
        y = GridSample<mode="linear", padding_mode="reflection", align_corners=1>(x, p)
        z = GridSample<mode="cubic", padding_mode="border">(x, p) }"""
    feeds = {"x": weights(2, 3, 5, 6), "p": weights(2, 4, 3, 2)}
    assert difference(text, feeds, "yz", opset=20) < 1e-5


@pytest.mark.parametrize("largest", [0, 1])
def test_the_first_of_equals_come_first(largest):
    text = f"g (float[300] x, int64[1] k) => (float y, int64 i) {{ y, i = TopK<largest={largest}>(x, k) }}"
    x = np.random.default_rng(0).integers(0, 3, 300).astype(np.float32)
    assert difference(text, {"x": x}, "yi", k=np.array([250])) == 0


def test_codes_and_back():
    text = """g (float[2,3,4] x, float[3] s, int8[3] z) => (int8[2,3,4] q, float[2,3,4] y) {
        q = QuantizeLinear<axis=-2>(x, s, z) y = DequantizeLinear<axis=1>(q, s, z) }"""
    scale, zero = np.array([0.01, 0.1, 1], np.float32), np.array([-3, 0, 100], np.int8)
    assert difference(text, {"x": weights(2, 3, 4)}, "qy", s=scale, z=zero) == 0


SHAPES = """g (float[2,3,4,6] x, float[1,1,1] one, int64[2] s0, int64[2] s1, int64[2] s2, int64[2] s3, int64[8] p,
    float v, int64[2] parts, int64[4] wide) => (float a, float b, float c, float d, float e, int64 f, float h) {
    a = Slice(x, s0, s1, s2, s3)
    t = Transpose<perm=[0,2,1,3]>(x)
    b = DepthToSpace<blocksize=2, mode="CRD">(t)
    c = Pad<mode="reflect">(x, p)
    d = Pad(x, p, v)
    e, rest = Split<axis=3>(x, parts)
    f = Shape<start=1, end=-1>(x)
    h = Expand(one, wide)
}"""


def test_shapes():
    found = difference(
        SHAPES,
        {"x": weights(2, 3, 4, 6), "one": weights(1, 1, 1)},
        "abcdefh",
        s0=np.array([3, -1]),
        s1=np.array([-100, 1]),
        s2=np.array([2, -1]),
        s3=np.array([-2, -2]),
        p=np.array([0, 1, 2, 0, 0, 0, 1, 2]),
        v=np.float32(2.5),
        parts=np.array([2, 4]),
        wide=np.array([2, 1, 3, 1]),
    )
    assert found == 0
