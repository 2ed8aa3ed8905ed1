import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights

from onnxq import graph
from onnxq.grid import Grid, fake_quantize
from onnxq.passes import MigrateGroups, apply
from onnxq.passes.migrate_groups import as_read, named_groups
from onnxq.passes.migration import search, search_shared
from onnxq.passes.readings import Migration, Reading
from onnxq.passes.rescale import kernel_of
from onnxq.pipeline.loud import take_down
from onnxq.types import Silence

CHAIN = """g (float[N,6,8,8] x, float[16,6,3,3] v, float[16] c, float[16,1,3,3] d, float[8,16,3,3] w) =>
    (float[N,8,h,k] y) {
    h = Conv(x, v, c) r = Relu(h)
    m = Conv<group = 16, pads = [1, 1, 1, 1]>(r, d) s = Relu(m)
    y = Conv(s, w)
}"""
RESIDUAL = """g (float[N,6,8,8] x, float[16,6,1,1] u, float[16,16,1,1] v, float[8,16,1,1] w) => (float[N,8,8,8] y) {
    a = Conv(x, u) p = Relu(a) b = Conv(p, v) s = Add(b, p) r = Relu(s) y = Conv(r, w)
}"""
LOUD = {3: 40.0, 11: 25.0}


def factors():
    return np.array([LOUD.get(channel, 1.0) for channel in range(16)], np.float32)


def chain(loud=True):
    f = factors() if loud else np.ones(16, np.float32)
    m = model(CHAIN, v=weights(16, 6, 3, 3) * f[:, None, None, None], c=weights(16) * f,
              d=weights(16, 1, 3, 3, seed=1), w=weights(8, 16, 3, 3, seed=2) / f[:, None, None])  # fmt: skip
    graph.infer_shapes(m)
    return m


def residual():
    f = factors()
    rows, columns = f[:, None, None, None], f[:, None, None]
    m = model(RESIDUAL, u=weights(16, 6, 1, 1) * rows, v=weights(16, 16, 1, 1, seed=1) * rows / columns,
              w=weights(8, 16, 1, 1, seed=2) / columns)  # fmt: skip
    graph.infer_shapes(m)
    return m


def rows(count=4):
    return [{"x": weights(4, 6, 8, 8, seed=10 + index)} for index in range(count)]


class Notes(Silence):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize(("made", "name"), [(chain, "h"), (residual, "a")])
def test_loud_channels_are_found_and_taken_down_and_the_model_stays(made, name):
    m, log = made(), Notes()
    chosen = take_down(m, rows(), 8, 8, log)
    assert name in chosen
    ratios = chosen[name].ratios
    assert not chosen[name].shifts.any()
    assert min(ratios[list(LOUD)]) > 3 * np.median(ratios)
    assert log.notes[0].startswith("loud channels hand their scale")
    before = run(m, rows()[0])
    applied = apply(m, [MigrateGroups(chosen)], rows()[0])[0]
    assert applied.count == len(chosen)
    assert_same_outputs(before, run(m, rows()[0]), rtol=1e-4, atol=1e-3)
    assert MigrateGroups(chosen)(m) == 0
    assert name not in {each for each, _ in named_groups(m)}
    assert take_down(m, rows()) == {}


MLP = """g (float[N,12] x, float[12,32] v, float[32,8] w) => (float[N,8] y) {
    h = MatMul(x, v) r = Relu(h) y = MatMul(r, w)
}"""


def mlp():
    f = np.ones(32, np.float32)
    f[31] = 40.0
    m = model(MLP, v=weights(12, 32) * f, w=weights(32, 8) / f[:, None])
    graph.infer_shapes(m)
    return m


@pytest.mark.parametrize(("count", "found"), [(64, []), (500, []), (520, ["h"])])
def test_ratios_rest_on_enough_values(count, found):
    """A Gemm shows one value per row and channel; a Conv many."""
    assert list(take_down(mlp(), [{"x": weights(count, 12)}])) == found


def test_the_middle_is_that_of_channels_that_reach_anywhere():
    m = mlp()
    first = next(graph.nodes(m, "MatMul"))
    scaled = graph.constant(first.inputs[1]).copy()
    scaled[:, 31] /= 40.0  # nothing is loud
    scaled[:, :24] *= 1e-6
    graph.replace_constant(m, first, 1, scaled)
    assert take_down(m, [{"x": weights(600, 12)}]) == {}


def test_channels_are_not_centred():
    """Padding, and the layers in front, could not make up for that."""
    m = chain()
    conv = next(graph.nodes(m, "Conv"))
    graph.replace_constant(m, conv, 2, 60.0 * factors())
    assert not take_down(m, rows())["h"].shifts.any()


def test_a_channel_that_sleeps_on_these_rows_is_not_taken_up():
    m = chain()
    conv = next(graph.nodes(m, "Conv"))
    kernel, bias = (graph.constant(value).copy() for value in conv.inputs[1:])
    kernel[7], bias[7] = 1e-6 * kernel[7], 1e-6
    graph.replace_constant(m, conv, 1, kernel)
    graph.replace_constant(m, conv, 2, bias)
    ratios = take_down(m, rows())["h"].ratios
    assert ratios[7] > 0.2 * np.median(ratios)


def test_channels_of_one_size_are_not_even_compared(monkeypatch):
    def never(*given, **options):
        raise AssertionError

    monkeypatch.setattr("onnxq.pipeline.loud.search_shared", never)
    assert take_down(chain(loud=False), rows()) == {}


def test_a_model_without_groups_is_not_even_run():
    m = model("g (float[N,4] x, float[4,2] w) => (float[N,2] y) { y = MatMul(x, w) }", w=weights(4, 2))
    assert take_down(m, []) == {}


def error(x, layers, ratios, bits=8):
    """Of each output of each layer, relative to its size, computed without any of the search's own arithmetic."""
    grid, weight = Grid(bits, signed=False, symmetric=False), Grid(bits)
    moved = x / ratios
    codes = fake_quantize(moved, *grid.from_range(moved.min(), moved.max()), grid)
    found = []
    for layer in layers:
        per_group = len(layer.weight) // graph.attribute(layer.node, "group", 1)
        for output, kernel in enumerate(layer.weight.astype(np.float64)):
            first = output // per_group * len(kernel)
            reads = slice(first, first + len(kernel))
            taps = kernel.reshape(len(kernel), -1)
            scaled = taps * ratios[reads, None]
            rounded = fake_quantize(scaled, np.abs(scaled).max() / weight.qmax, 0, weight)
            exact = x[:, reads] @ taps
            found.append(((codes[:, reads] @ rounded - exact) ** 2).sum() / (exact**2).sum())
    return np.mean(found)


@pytest.mark.parametrize("place", [0, 1])
def test_the_search_lowers_the_error_of_dense_and_of_depthwise_layers(place):
    groups = dict(named_groups(chain()))
    group = list(groups.values())[place]
    random = np.random.default_rng(0)
    x = np.maximum(random.normal(size=(200, 16)), 0.0) * factors()
    reading = Reading(x, [as_read(layer, groups.values()) for layer in group.consumers], x.min(0), x.max(0))
    found = search_shared([reading], shift=False)
    plain, moved = (error(x, group.consumers, ratios) for ratios in (np.ones(16), found.ratios))
    assert moved < plain / 10


def test_outputs_count_as_the_layers_behind_see_them(monkeypatch):
    m = chain()
    found = list(dict(named_groups(m)).values())
    first, depthwise, last = (graph.layer_of(node) for node in graph.nodes(m, "Conv"))
    seen = np.linalg.norm(last.weight.transpose(1, 0, 2, 3).reshape(16, -1), axis=1)
    wanted = kernel_of(depthwise) * seen.reshape(16, 1, 1, 1)
    np.testing.assert_allclose(as_read(depthwise, found), wanted, rtol=1e-6)
    own = np.linalg.norm(depthwise.weight.reshape(16, -1), axis=1)
    wanted = kernel_of(first) * own.reshape(1, 16, 1, 1)
    np.testing.assert_allclose(as_read(first, found), wanted, rtol=1e-6)
    np.testing.assert_array_equal(as_read(last, found), kernel_of(last))  # its result is the model's
    monkeypatch.setattr("onnxq.passes.migrate_groups.LARGE", wanted.size // 3)
    np.testing.assert_allclose(as_read(first, found), wanted[:, ::3], rtol=1e-6)
    monkeypatch.setattr("onnxq.passes.migrate_groups.WIDE", 16 * 9 // 4)
    np.testing.assert_allclose(as_read(first, found), wanted[:, ::4], rtol=1e-6)


def test_activations_that_share_ratios_are_judged_together():
    random = np.random.default_rng(0)
    w = random.normal(size=(16, 12))
    even = random.random((200, 16))
    loud = even * factors()
    kernel = w.T[None, :, :, None]
    alone, other = (Reading(x, [kernel], x.min(0), x.max(0)) for x in (loud, even / factors()))
    assert not search_shared([alone], shift=False).is_identity
    assert search_shared([alone, other], shift=False, least_gain=0.5).is_identity
    np.testing.assert_array_equal(search_shared([alone], shift=False).ratios, search(loud, [w], shift=False).ratios)


def test_what_is_not_chosen_stays():
    m = chain()
    before = m.clone()
    assert MigrateGroups({"nothing": Migration(np.full(16, 2.0), np.zeros(16), 1.0, 0)})(m) == 0
    assert graph.digest(m) == graph.digest(before)
