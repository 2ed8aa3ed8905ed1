"""What the report knows of layers and tensors, against the same figures computed another way."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers import model, proto, run, weights

from onnxq import calibrate, graph
from onnxq.calibrate.histogram import Histogram
from onnxq.emit import emit
from onnxq.grid import Grid, fake_quantize
from onnxq.pipeline import details as subject
from onnxq.pipeline import inspect
from onnxq.pipeline.details import details, with_study
from onnxq.pipeline.histograms import tensor_detail, weight_detail
from onnxq.pipeline.planning import choose_ranges, observe, plan_of
from onnxq.pipeline.prepare import load_float, model_inputs, prepare
from onnxq.recipe import resolve
from onnxq.types import LearnedLayer, Silence, TensorGrid, TensorStats, Tuned, WeightGrid
from onnxq.types.mixed import Added, Allocation, Sensitivities, Study

NET = """
g (float[N,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[5,8,1,1] w3) => (float[N,5,5] y) {
  a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w1, b1)
  r = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(r, w2)
  e = Relu(c)
  d = Conv(e, w3)
  shape = Constant<value_ints = [0, 5, 16]>()
  left = Reshape(d, shape)
  turned = Transpose<perm = [0, 2, 1]>(left)
  y = MatMul(left, turned)
}
"""
ROWS = np.random.default_rng(3).normal(size=(40, 3, 8, 8)).astype(np.float32)
BITS = 5


TWO_LINEAR = """
g (float[N,64] x, float[64,64] w1, float[64,64] w2) => (float[N,64] y) {
  h = MatMul(x, w1)
  r = Relu(h)
  y = MatMul(r, w2)
}
"""


def planned(path, data, **recipe):
    """(prepared model, held-out rows, observations, plan) of a file."""
    loaded, log = load_float(path), Silence()
    prepared, settings = prepare(path, loaded), resolve("fast", **recipe)
    rows, held = calibrate.split(calibrate.open_data({"x": data}, model_inputs(loaded), samples=64))
    placement, seen = observe(prepared.model, rows, settings, log)
    ranges = choose_ranges(prepared.model, placement, seen, rows, settings, log)
    return prepared, held, seen, plan_of(prepared.model, placement, ranges, rows, settings, log)


class Made:
    """A small network with activations of 5 bits, weights of 5 and 7 bits and a float convolution, stage by stage."""

    def __init__(self, folder):
        constants = {"w1": weights(8, 3, 3, 3), "b1": weights(8, seed=1), "w2": weights(8, 8, 3, 3, seed=2)}
        path = folder / "net.onnx"
        onnx.save(proto(NET, w3=weights(5, 8, 1, 1, seed=3), **constants), path)
        options = {"activation_bits": BITS, "first_last": BITS, "keep_float": ("Conv_4",)}
        self.prepared, self.held, self.seen, plan = planned(path, ROWS, **options)
        self.model = self.prepared.model
        self.names = [str(node.name) for node in graph.nodes(self.model, "Conv", "MatMul")]
        wide = replace(plan.weights[self.names[1]], bits=7)
        self.plan = replace(plan, weights={**plan.weights, self.names[1]: wide})
        self.learned = {self.names[0]: LearnedLayer(np.full((8, 3, 3, 3), 3, np.int8))}
        self.quantized = emit(self.model, self.plan, {"onnxq.version": "9.8", "onnxq.source": "net.onnx"}, self.learned)

    def details(self, seen=None, **options):
        tuned = Tuned(self.plan, self.learned)
        return details(self.prepared, self.quantized, tuned, seen or self.seen, self.held, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("details"))


@pytest.fixture(scope="module")
def found(made):
    return made.details()


def sqnr(wanted, given):
    wanted, given = wanted.astype(np.float64), given.astype(np.float64)
    return 10 * math.log10(np.square(wanted).sum() / np.square(wanted - given).sum())


def test_layers_come_in_graph_order_with_their_places(found, made):
    assert [layer.name for layer in found.layers] == made.names
    assert [layer.op_type for layer in found.layers] == ["Conv", "Conv", "Conv", "MatMul"]
    assert [layer.integer for layer in found.layers] == [True, True, False, False]
    assert [layer.shape for layer in found.layers] == [(8, 3, 3, 3), (8, 8, 3, 3), (5, 8, 1, 1), ()]
    assert [layer.tuned for layer in found.layers] == [True, False, False, False]
    assert found.layers[0].result == "r"
    assert found.layers[1].source == "r"
    assert found.layers[3].reason == "both operands are computed at run time"
    assert found.layers[3].weight is None
    stages = [layer.stage for layer in found.layers]
    assert stages == sorted(stages)
    assert stages[-1] > stages[0]


def test_bits_bytes_and_work_are_those_of_the_file(found, made):
    assert [layer.weight_bits for layer in found.layers] == [BITS, 7, 32, 32]
    assert [layer.input_bits for layer in found.layers] == [BITS, BITS, 32, 32]
    assert [layer.float_bytes for layer in found.layers] == [864, 2304, 160, 0]
    assert [layer.stored_bytes for layer in found.layers] == [216 + 8 * 5, 576 + 8 * 5, 160, 0]
    assert [layer.macs for layer in found.layers] == [216 * 16, 576 * 16, 40 * 16, 5 * 5 * 16]


def test_packed_weights_count_as_they_are_stored(tmp_path):
    path = tmp_path / "linear.onnx"
    onnx.save(proto(TWO_LINEAR, w1=weights(64, 64), w2=weights(64, 64, seed=1)), path)
    prepared, held, seen, plan = planned(path, weights(16, 64, seed=2), weight_bits=4, first_last=4)
    packed = emit(prepared.model, plan, packed=True)
    graph.save(packed, tmp_path / "packed.onnx")
    layers = inspect(tmp_path / "packed.onnx").layers
    assert [layer.packed for layer in layers] == [True, True]
    found = details(prepared, packed, Tuned(plan), seen, held).layers
    assert [layer.stored_bytes for layer in found] == [layer.weight_bytes for layer in layers]
    assert found[0].stored_bytes < 64 * 64


def test_a_layers_error_is_that_of_the_tensor_that_its_readers_get(found, made):
    assert found.rows == 5
    rows = np.concatenate([feeds["x"] for feeds in made.held])
    restored = ["r_dq", "e_dq", "d", "y"]
    values = graph.value_map(made.quantized)
    restored = [name if name in values else name.removesuffix("_dq") for name in restored]
    names = [layer.result for layer in found.layers]
    assert names == ["r", "e", "d", "y"]
    wanted = run(graph.with_outputs(made.model, names), {"x": rows})
    given = run(graph.with_outputs(made.quantized, restored), {"x": rows})
    expected = [sqnr(wanted[name], given[other]) for name, other in zip(names, restored, strict=True)]
    assert restored[0] == "r_dq"
    unrounded = run(graph.with_outputs(made.quantized, ["r"]), {"x": rows})["r"]
    assert abs(sqnr(wanted["r"], unrounded) - expected[0]) > 0.005
    assert [layer.sqnr_db for layer in found.layers] == pytest.approx(expected, abs=1e-3)


def test_looking_at_one_tensor_at_a_time_gives_the_same_errors(found, made, monkeypatch):
    opened = []

    def session(*arguments):
        opened.append(arguments)
        return real(*arguments)

    real = subject.Session
    monkeypatch.setattr(subject, "Session", session)
    again = made.details()
    assert [config.simulate for _, config in opened] == [False, True]
    opened.clear()
    # Four rows at a time: 2048 bytes each for a and c, 1280 for d, 400 for y.
    monkeypatch.setattr(subject, "GROUP_BYTES", 4096)
    twice = {name: (2 * shape[0], *shape[1:]) for name, shape in made.seen.shapes.items()}
    assert made.seen.batch_rows == 1
    again = made.details(replace(made.seen, shapes=twice, batch_rows=2))
    assert len(opened) == 4
    assert [layer.sqnr_db for layer in again.layers] == pytest.approx([layer.sqnr_db for layer in found.layers])


def test_fewer_rows_are_compared_when_asked_for(made):
    assert made.details(rows=3).rows == 3


def test_tensors_rewrites_and_versions_are_handed_on(found, made):
    assert set(found.tensors) == set(made.plan.tensors)
    assert found.tensors["r"].bits == BITS
    assert sum(found.tensors["r"].values.counts) == pytest.approx(35 * 8 * 16)
    assert found.passes == made.prepared.passes
    assert list(found.versions.items())[:2] == [("onnxq", "9.8"), ("source", "net.onnx")]
    assert found.versions["onnx"] == onnx.__version__


def conv(array):
    shape = "x".join(map(str, array.shape))
    return graph.layer_of(
        next(
            graph.nodes(
                model(
                    f"g (float[1,{array.shape[1]},9,9] x, float[{shape.replace('x', ',')}] w) => (float[1,M,H,W] y) "
                    "{ y = Conv(x, w) }",
                    w=array,
                ),
                "Conv",
            )
        )
    )


def test_a_weight_with_an_outlier_channel():
    array = weights(6, 4, 3, 3, low=-1.0, high=1.0)
    array[2] *= 10.0
    layer, steps = conv(array), np.abs(array).reshape(6, -1).max(axis=1) / 7
    grid = WeightGrid(tuple(float(step) for step in steps), 0, bits=4)
    found = weight_detail(layer, grid)
    bounds = np.abs(array).reshape(6, -1).max(axis=1)
    assert found.widest == 2
    assert found.spread == pytest.approx(bounds[2] / np.median(bounds), rel=1e-5)
    assert found.clip == pytest.approx((-bounds[2], bounds[2]))
    rounded = fake_quantize(array, steps.astype(np.float32), np.int32(0), Grid(4), 0)
    assert found.sqnr_db == pytest.approx(sqnr(array, rounded), abs=1e-4)
    assert sum(found.values.counts) == array.size == sum(found.codes.counts)
    assert (found.codes.low, found.codes.high, len(found.codes.counts)) == (-8.5, 7.5, 16)
    codes = np.rint(array / steps[:, None, None, None])
    assert list(found.codes.counts) == [float((codes == code).sum()) for code in range(-8, 8)]


def test_learned_codes_take_the_place_of_rounded_ones():
    array = weights(3, 2, 1, 1) * np.float32(0.1)
    codes = np.asarray([[[[5]], [[-7]]], [[[1]], [[2]]], [[[3]], [[0]]]], np.int8)
    found = weight_detail(conv(array), WeightGrid((0.1,), None, bits=4), LearnedLayer(codes))
    assert (found.values.low, found.values.high) == pytest.approx((-0.7, 0.7))
    assert found.sqnr_db == pytest.approx(sqnr(array, codes * np.float32(0.1)), abs=1e-4)
    assert [found.codes.counts[code + 8] for code in (5, -7, 1, 2, 3, 0)] == [1.0] * 6


def test_eight_bit_codes_are_shown_four_to_a_bin():
    array = np.arange(-127, 128, dtype=np.float32).reshape(1, 255, 1, 1)
    found = weight_detail(conv(array), WeightGrid((1.0,), 0, bits=8))
    assert found.codes.counts == (3.0, *(4.0 for _ in range(63)))
    assert found.sqnr_db == math.inf


def test_a_float_weight_has_a_histogram_alone():
    array = weights(4, 2, 3, 3, low=0.5, high=2.0)
    found = weight_detail(conv(array), None)
    assert (found.codes, found.clip, found.sqnr_db) == (None, None, None)
    assert (found.values.low, found.values.high) == (array.min(), array.max())
    np.testing.assert_array_equal(found.values.counts, np.histogram(array, 64)[0])
    assert weight_detail(conv(np.full((2, 2, 1, 1), 0.5, np.float32)), None).values.counts == (4.0,)


def test_an_activation_with_clipped_tails():
    generator = np.random.default_rng(1)
    data = np.concatenate([generator.normal(size=20000), np.full(500, 9.0), np.full(300, -5.0)]).astype(np.float32)
    seen = Histogram("t")
    seen.add(data, rows=False)
    grid = TensorGrid(scale=0.4, zero_point=6, bits=4, rule="mse")
    found = tensor_detail(seen.stats(), grid)
    codes = Grid(4, signed=False, symmetric=False)
    assert found.clip == pytest.approx((-2.4, 3.6))
    expected = np.mean((data < -2.6) | (data > 3.8))
    assert found.clipped == pytest.approx(expected, abs=2e-4)
    assert found.sqnr_db == pytest.approx(sqnr(data, fake_quantize(data, 0.4, 6, codes)), abs=0.02)
    assert (found.low, found.high, found.rule) == (-5.0, 9.0, "mse")
    assert (found.values.low, found.values.high, len(found.values.counts)) == (-5.0, 9.0, 64)
    exact = np.histogram(data, 64, (-5.0, 9.0))[0]
    np.testing.assert_allclose(found.values.counts, exact, atol=0.02 * data.size)
    assert sum(found.values.counts) == pytest.approx(data.size)
    assert found.values.counts[-1] == pytest.approx(500.0)


def test_the_error_of_a_grid_is_taken_at_the_middle_of_each_bin():
    counts = np.asarray([0.0, 0.0, 3.0, 1.0])
    found = tensor_detail(TensorStats("t", 0.0, 4.0, 0.0, 4.0, counts, 4.0, 4, True, (4,)), TensorGrid(2.0, 0))
    # 1 becomes 0 and 3 becomes 4: noise 4, signal 3 + 9.
    assert found.sqnr_db == pytest.approx(10 * math.log10(3.0))


def test_a_grid_wider_than_the_data_is_shown_whole():
    seen = Histogram("t")
    seen.add(np.linspace(0.0, 1.0, 1000, dtype=np.float32), rows=False)
    found = tensor_detail(seen.stats(), TensorGrid(scale=0.1, zero_point=0, bits=5))
    assert found.clip == pytest.approx((0.0, 3.1))
    assert (found.values.low, found.values.high) == pytest.approx((0.0, 3.1))
    assert sum(found.values.counts[:22]) == pytest.approx(1000.0)
    assert found.clipped == 0.0


def test_a_tensor_of_zeros_has_no_error():
    seen = Histogram("t")
    seen.add(np.zeros(10, np.float32), rows=False)
    found = tensor_detail(seen.stats(), TensorGrid(scale=1e-8, zero_point=0))
    assert found.sqnr_db is None
    assert found.clipped == 0.0
    assert found.values.counts == (10.0,)


def test_a_study_adds_errors_of_every_layer_and_the_front(found):
    added = {"one": {(4, 8): Added(0.5, 0.1), (32, 32): Added(0.0, 0.0)}}
    known = Sensitivities(0.1, {"one": ("one", "two")}, added, 8)
    points = [Allocation({"one": (4, 8)}, 0.5, {"size": 100.0}), Allocation({"one": (8, 8)}, 0.0, {"size": 200.0})]
    more = with_study(found, Study("net.onnx", 900, known, tuple(points)), points[1])
    assert more.sensitivity == {name: {"w4a8": 0.5, "float": 0.0} for name in ("one", "two")}
    assert more.front == ((100.0, 0.5), (200.0, 0.0))
    assert more.chosen == (200.0, 0.0)
    assert more.layers is found.layers
