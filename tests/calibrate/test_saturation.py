import itertools
from importlib import import_module

import numpy as np
import pytest
from helpers import model, weights

from onnxq import graph
from onnxq.calibrate import saturating
from onnxq.grid import Grid
from onnxq.runtime import SessionConfig
from onnxq.types import TensorGrid, WeightGrid

MODULE = import_module("onnxq.calibrate.saturation")
ONE = SessionConfig(threads=1)
STEP = 1 / 255
"""Of activations in [0, 1], or in [-zero_point / 255, ...]."""


def layers_of(made):
    found = {str(node.name): graph.layer_of(node) for node in graph.nodes(made, *graph.LAYER_OPS)}
    assert not any(isinstance(layer, str) for layer in found.values())
    return found


def weight_grid(layer, bits=8, per_channel=True):
    others = tuple(axis for axis in range(layer.weight.ndim) if axis != layer.axis)
    bound = np.abs(layer.weight).max(axis=others if per_channel else None).reshape(-1)
    return WeightGrid(tuple(bound / Grid(bits).qmax), layer.axis if per_channel else None, bits)


def shares(made, data, zero_point=0, bits=8, per_channel=True, tensor_bits=8, **options):
    layers = layers_of(made)
    tensors = {
        graph.name_of(layer.data): TensorGrid(STEP * 255 / (2**tensor_bits - 1), zero_point, tensor_bits)
        for layer in layers.values()
    }
    grids = {name: weight_grid(layer, bits, per_channel) for name, layer in layers.items()}
    found = saturating(made, layers, tensors, grids, data, config=ONE, **options)
    return {name: saturation.share for name, saturation in found.items()}


def codes(values, step, zero, low, high):
    return np.clip(np.rint(np.asarray(values, np.float64) / step) + zero, low, high).astype(int)


def count_pairs(x, w):
    """(saturated, all) pairs of the sums of products that one output is, element by element."""
    saturated = 0
    for at in range(0, len(x) // 2 * 2, 2):
        total = int(x[at]) * int(w[at]) + int(x[at + 1]) * int(w[at + 1])
        saturated += total > 32767 or total < -32767
    return saturated, len(x) // 2


def tally(pairs):
    saturated, total = np.sum(list(pairs), axis=0)
    return saturated / total


def loud(*shape, seed=0, low=0.3):
    """Weights most of which are near their largest, of either sign."""
    sign = np.where(weights(*shape, seed=seed + 50) > 0, 1, -1).astype(np.float32)
    return weights(*shape, seed=seed, low=low, high=1.0) * sign


LINEAR = {
    "MatMul": ("g (float[N,9] x, float[9,5] w) => (float[N,5] y) { y = MatMul(x, w) }", (9, 5)),
    "Gemm": ("g (float[N,9] x, float[9,5] w) => (float[N,5] y) { y = Gemm(x, w) }", (9, 5)),
    "transposed": ("g (float[N,9] x, float[5,9] w) => (float[N,5] y) { y = Gemm<transB = 1>(x, w) }", (5, 9)),
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("zero_point", [0, 100])
def test_linear_layers_against_a_loop(kind, per_channel, zero_point):
    text, shape = LINEAR[kind]
    w = loud(*shape)
    made, x = model(text, w=w), weights(7, 9, low=0.2, high=1.0)
    (name,) = layers_of(made)
    (layer,) = layers_of(made).values()
    steps = np.asarray(weight_grid(layer, per_channel=per_channel).scales)
    wq = codes(w, steps[:, None] if kind == "transposed" else steps, 0, -127, 127)
    columns = wq if kind == "transposed" else wq.T
    xq = codes(x, STEP, zero_point, 0, 255)
    wanted = tally(count_pairs(row, column) for row in xq for column in columns)
    assert 0.02 < wanted < 0.98
    assert shares(made, [{"x": x}], zero_point, per_channel=per_channel) == {name: pytest.approx(wanted, rel=1e-12)}


def test_rows_of_any_rank_and_several_batches():
    w, x = loud(6, 4), weights(3, 5, 6, low=0.2, high=1.0)
    made = model("g (float[N,S,6] x, float[6,4] w) => (float[N,S,4] y) { y = MatMul(x, w) }", w=w)
    whole = shares(made, [{"x": x}])
    wq = codes(w, np.abs(w).max(axis=0) / 127, 0, -127, 127)
    wanted = tally(count_pairs(row, column) for row in codes(x, STEP, 0, 0, 255).reshape(-1, 6) for column in wq.T)
    assert list(whole.values()) == [pytest.approx(wanted)]
    assert shares(made, [{"x": x[:1]}, {"x": x[1:]}]) == whole


def conv_by_hand(x, w, zero_point, strides, dilations, pads, groups):
    """Pairs of every output of a convolution, the reduction in the kernel's order: positions first, channels last."""
    axes = x.ndim - 2
    xq = codes(x, STEP, zero_point, 0, 255)
    xq = np.pad(xq, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)], constant_values=zero_point)
    others = tuple(range(1, w.ndim))
    wq = codes(w, np.abs(w).max(axis=others, keepdims=True) / 127, 0, -127, 127)
    per_group, outputs = w.shape[1], len(w) // groups
    sizes = [(xq.shape[2 + a] - (w.shape[2 + a] - 1) * dilations[a] - 1) // strides[a] + 1 for a in range(axes)]
    for sample, channel in itertools.product(range(len(xq)), range(len(w))):
        first = channel // outputs * per_group
        for at in itertools.product(*map(range, sizes)):
            u, v = [], []
            for k in itertools.product(*map(range, w.shape[2:])):
                place = tuple(at[a] * strides[a] + k[a] * dilations[a] for a in range(axes))
                u += [xq[(sample, first + c, *place)] for c in range(per_group)]
                v += [wq[(channel, c, *k)] for c in range(per_group)]
            yield count_pairs(u, v)


CONVS = [
    ((2, 3, 5, 4), (4, 3, 3, 2), {}),
    ((1, 3, 7, 6), (4, 3, 3, 2), {"strides": [2, 3]}),
    ((1, 3, 7, 6), (2, 3, 2, 3), {"dilations": [3, 2]}),
    ((1, 4, 5, 5), (6, 2, 3, 3), {"group": 2}),
    ((1, 3, 3, 3), (4, 3, 3, 3), {"pads": [1, 0, 2, 1]}),
    ((1, 6, 1, 1), (8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((1, 4, 6, 6), (4, 2, 2, 2), {"group": 2, "strides": [1, 2], "dilations": [2, 1], "pads": [0, 1, 1, 0]}),
    ((2, 3, 9), (4, 3, 4), {"strides": [2], "pads": [1, 2]}),
    ((1, 3, 4, 4), (5, 3, 1, 1), {}),
    ((1, 2, 4, 4), (4, 1, 2, 2), {"group": 2}),
]


@pytest.mark.parametrize("zero_point", [0, 90])
@pytest.mark.parametrize(("x_shape", "w_shape", "attributes"), CONVS)
def test_convolutions_against_a_loop(x_shape, w_shape, attributes, zero_point):
    axes = len(w_shape) - 2
    shown = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    dims, kernel = (",".join(map(str, shape)) for shape in (x_shape, w_shape))
    made = model(
        f"g (float[{dims}] x, float[{kernel}] w) => (float[{'N,' * (axes + 1)}N] y) {{ y = Conv<{shown}>(x, w) }}"
        .replace("<>", ""),
        w=loud(*w_shape),
    )  # fmt: skip
    x = weights(*x_shape, low=0.5, high=1.0)
    wanted = tally(
        conv_by_hand(
            x,
            loud(*w_shape),
            zero_point,
            attributes.get("strides", [1] * axes),
            attributes.get("dilations", [1] * axes),
            attributes.get("pads", [0] * 2 * axes),
            attributes.get("group", 1),
        )
    )
    assert wanted > 0.01
    assert list(shares(made, [{"x": x}], zero_point).values()) == [pytest.approx(wanted, rel=1e-12)]


def test_same_padding_reaches_the_border():
    made = model(
        'g (float[1,4,1,1] x, float[3,4,3,3] w) => (float[1,3,1,1] y) { y = Conv<auto_pad = "SAME_UPPER">(x, w) }',
        w=np.ones((3, 4, 3, 3), np.float32),
    )
    assert shares(made, [{"x": np.ones((1, 4, 1, 1), np.float32)}])


@pytest.mark.parametrize("channels", [3, 4])
def test_depthwise_convolutions_never_saturate(channels):
    """Their kernel multiplies in 32 bits."""
    text = "g (float[1,{c},6,6] x, float[{c},1,3,3] w) => (float[1,{c},4,4] y) {{ y = Conv<group = {c}>(x, w) }}"
    made = model(text.format(c=channels), w=np.ones((channels, 1, 3, 3), np.float32))
    assert shares(made, [{"x": np.ones((1, channels, 6, 6), np.float32)}]) == {}


LOUD = {"x": np.ones((4, 9), np.float32)}


def test_seven_bits_never_saturate():
    made = model(LINEAR["MatMul"][0], w=np.ones((9, 5), np.float32))
    assert list(shares(made, [LOUD]).values()) == [1.0]
    assert shares(made, [LOUD], bits=7) == {}


@pytest.mark.parametrize("bits", [7, 6, 4])
def test_narrow_activations_never_saturate(bits):
    """Values beyond their range are cut off at the highest of their own codes."""
    made = model(LINEAR["MatMul"][0], w=np.ones((9, 5), np.float32))
    assert shares(made, [{"x": 100 * LOUD["x"]}], tensor_bits=bits) == {}


@pytest.mark.parametrize(("codes_of_pair", "saturates"), [((127, 1), False), ((127, 2), True), ((127, -127), False)])
def test_the_limit_is_16_bits(codes_of_pair, saturates):
    """255 * (127 + 1) = 32640 fits, 255 * (127 + 2) = 32895 does not."""
    w = np.zeros((9, 5), np.float32)
    w[:2, 0] = codes_of_pair
    w[2, 0] = 127
    made = model(LINEAR["MatMul"][0], w=w)
    assert bool(shares(made, [LOUD], per_channel=False)) == saturates
    quiet = {"x": np.float32([[1, 1 - 1 / 255, *[0] * 7]])}  # 255 * 127 + 254 * 2 = 32893
    assert bool(shares(made, [quiet], per_channel=False)) == saturates
    small = {"x": np.float32([[1, 191 / 255, *[0] * 7]])}  # 255 * 127 + 191 * 2 = 32767
    assert shares(made, [small], per_channel=False) == {}


def test_a_lone_last_weight_has_no_pair():
    made = model(
        "g (float[N,3] x, float[3,2] w) => (float[N,2] y) { y = MatMul(x, w) }", w=np.float32([[1, 0], [0, 0], [1, 1]])
    )
    assert shares(made, [{"x": np.ones((2, 3), np.float32)}]) == {}
    one = model("g (float[N,1] x, float[1,2] w) => (float[N,2] y) { y = MatMul(x, w) }", w=np.ones((1, 2), np.float32))
    assert shares(one, [{"x": np.ones((2, 1), np.float32)}]) == {}


CHAIN = """g (float[N,8] x, float[8,8] w, float[8,8] v, float[8,8] u) => (float[N,8] y) {
    [one] a = MatMul(x, w)
    s = Sigmoid(a)
    [two] b = MatMul(s, v)
    t = Sigmoid(b)
    [three] y = MatMul(t, u)
}"""


def test_only_the_layers_that_saturate_are_returned():
    quiet = np.eye(8, dtype=np.float32)
    made = model(CHAIN, w=quiet * 9, v=quiet, u=np.ones((8, 8), np.float32))
    names = [str(node.name) for node in graph.nodes(made, "MatMul")]
    x = np.ones((4, 8), np.float32)
    found = shares(made, [{"x": x}])  # sigmoid(sigmoid(...)) is 0.73: 2 * 127 * 186 saturates
    assert found == {names[2]: 1.0}
    loud_twice = model(CHAIN, w=quiet * 9, v=np.ones((8, 8), np.float32), u=np.ones((8, 8), np.float32))
    assert set(shares(loud_twice, [{"x": x}])) == set(names[1:])
    assert shares(model(CHAIN, w=quiet, v=quiet, u=quiet), [{"x": x}]) == {}


def test_weights_that_could_saturate_but_do_not():
    made = model(CHAIN, w=np.eye(8, dtype=np.float32), v=np.eye(8, dtype=np.float32), u=loud(8, 8))
    assert shares(made, [{"x": np.full((4, 8), -9, np.float32)}]) == {}


def test_large_inputs_are_sampled(monkeypatch):
    x, w = weights(4000, 9, low=0.2, high=1.0), loud(9, 5)
    made = model(LINEAR["MatMul"][0], w=w)
    (share,) = shares(made, [{"x": x}]).values()
    monkeypatch.setattr(MODULE, "POSITIONS", 4000)
    (exact,) = shares(made, [{"x": x}]).values()
    assert share == pytest.approx(exact, rel=0.1)
    assert share != exact
    monkeypatch.setattr(MODULE, "POSITIONS", 50)
    same, again, other = (shares(made, [{"x": x}], seed=seed) for seed in (1, 1, 2))
    assert same == again != other


def test_sampled_convolutions(monkeypatch):
    w = loud(4, 3, 3, 3)
    made = model("g (float[N,3,30,30] x, float[4,3,3,3] w) => (float[N,4,15,15] y) "
                 "{ y = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) }", w=w)  # fmt: skip
    x = weights(3, 3, 30, 30, low=0.3, high=1.0)
    (share,) = shares(made, [{"x": x}]).values()
    monkeypatch.setattr(MODULE, "POSITIONS", 10_000)
    (exact,) = shares(made, [{"x": x}]).values()
    assert share == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_loss_is_that_of_sums_whose_pairs_saturate(transposed):
    w, zero = loud(9, 5) * np.linspace(0.4, 2.0, 5, dtype=np.float32), 40
    attributes, stored = ("<transB = 1>", w.T.copy()) if transposed else ("", w)
    dims = ",".join(map(str, stored.shape))
    made = model(f"g (float[N,9] x, float[{dims}] w) => (float[N,5] y) {{ y = Gemm{attributes}(x, w) }}", w=stored)
    x = weights(11, 9, low=0.1, high=0.85)
    (name, layer), *_ = layers_of(made).items()
    grid = weight_grid(layer)
    (found,) = saturating(
        made, {name: layer}, {"x": TensorGrid(STEP, zero)}, {name: grid}, [{"x": x[:6]}, {"x": x[6:]}], config=ONE
    ).values()
    xq, wq = codes(x, STEP, zero, 0, 255), codes(w, np.asarray(grid.scales), 0, -127, 127)
    signal = noise = 0.0
    for row in xq:
        for column, step in zip(wq.T, grid.scales, strict=True):
            pairs = [int(row[k] * column[k] + row[k + 1] * column[k + 1]) for k in range(0, 8, 2)]
            lost = sum(pair - min(max(pair, -32768), 32767) for pair in pairs)
            signal += (step * int((row - zero) @ column)) ** 2
            noise += (step * lost) ** 2
    assert noise > 0
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_groups_lose_what_their_own_outputs_lack():
    w = loud(6, 2, 1, 1) * np.array([1, 3, 1, 2, 1, 5], np.float32).reshape(6, 1, 1, 1)
    made = model("g (float[1,4,2,3] x, float[6,2,1,1] w) => (float[1,6,2,3] y) { y = Conv<group = 2>(x, w) }", w=w)
    x = weights(1, 4, 2, 3, low=0.5, high=1.0)
    (name, layer), *_ = layers_of(made).items()
    grid = weight_grid(layer)
    (found,) = saturating(
        made, {name: layer}, {"x": TensorGrid(STEP, 0)}, {name: grid}, [{"x": x}], config=ONE
    ).values()
    xq, steps = codes(x, STEP, 0, 0, 255)[0], np.asarray(grid.scales)
    wq = codes(w, steps.reshape(6, 1, 1, 1), 0, -127, 127)[:, :, 0, 0]
    signal = noise = 0.0
    for channel in range(6):
        first = channel // 3 * 2
        whole = xq[first] * wq[channel, 0] + xq[first + 1] * wq[channel, 1]
        signal += np.square(steps[channel] * whole).sum()
        noise += np.square(steps[channel] * (whole - np.clip(whole, -32768, 32767))).sum()
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
