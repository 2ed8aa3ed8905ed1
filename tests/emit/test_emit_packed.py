"""Weights of few bits packed into bytes: the same numbers, the same kernels, smaller files."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from emitting import kernels, quantized, restored_constants
from helpers import model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import bench, graph
from onnxq.bench.coverage import _weight_names
from onnxq.emit import emit, packed_bytes
from onnxq.emit.packing import FORMS, Packer
from onnxq.pipeline.verify import kernel_gap
from onnxq.plan import Precision
from onnxq.types import LearnedLayer, WeightGrid

OPS = {
    "Conv": ("Conv<pads = [1, 0, 0, 1], strides = [2, 1]>(x, w, b)", lambda i, o: ((2, i, 6, 5), (o, i, 3, 2))),
    "grouped": ("Conv<group = 2>(x, w, b)", lambda i, o: ((2, 2 * i, 6, 5), (2 * o, i, 3, 2))),
    "Gemm": ("Gemm(x, w, b)", lambda i, o: ((3, 9 * i), (9 * i, o))),
    "turned": ("Gemm<transB = 1>(x, w, b)", lambda i, o: ((3, 9 * i), (o, 9 * i))),
    "MatMul": ("MatMul(x, w)", lambda i, o: ((2, 3, 9 * i), (9 * i, o))),
}


def layer(op, inputs=7, outputs=31, opset=17):
    """A model of one layer whose weight has inputs * outputs * 6 or 9 elements, and feeds."""
    call, shapes = OPS[op]
    data, weight = shapes(inputs, outputs)
    channels = 2 * outputs if op == "grouped" else outputs
    rank = ",".join("?" * len(data))
    sizes = ",".join(map(str, weight))
    text = f"g (float[{rank}] x, float[{sizes}] w, float[{channels}] b) => (float[{rank}] y) {{ [n] y = {call} }}"
    made = model(text, opset, w=weights(*weight), b=weights(channels))
    return made, {"x": weights(*data, seed=5)}


def both(made, feeds, precision):
    plan, plain = quantized(made, feeds, precision)
    return plan, plain, emit(made, plan, packed=True)


def assert_identical(plain, packed, feeds):
    for optimize in ("off", "all"):
        wanted, got = run(plain, feeds, optimize), run(packed, feeds, optimize)
        assert list(wanted) == list(got)
        for name, values in wanted.items():
            np.testing.assert_array_equal(got[name], values)
    assert sorted(kernels(packed)) == sorted(kernels(plain))
    assert len(restored_constants(packed)) == len(restored_constants(plain))


def codes_in(packed, node):
    """The int8 codes that a layer's DequantizeLinear reads, as the runtime computes them."""
    restored = graph.producer(graph.node_names(packed)[node].inputs[1], "DequantizeLinear")
    value = restored.inputs[0]
    array = graph.constant(value)
    return run(graph.sub_model(packed, [], [value.name]), {})[value.name] if array is None else array


def held(packed):
    """(element type, bytes) of the largest initializer."""
    tensors = [value.const_value for value in packed.graph.initializers.values()]
    largest = max(tensors, key=lambda tensor: tensor.nbytes)
    return largest.dtype.name, largest.nbytes


@settings(max_examples=15, deadline=None)
@given(
    op=st.sampled_from(sorted(OPS)),
    bits=st.integers(2, 8),
    inputs=st.integers(5, 9),
    outputs=st.integers(30, 45),
    opset=st.sampled_from([13, 17, 21]),
    per_channel=st.booleans(),
)
def test_outputs_and_kernels_are_those_of_the_plain_file(op, bits, inputs, outputs, opset, per_channel):
    made, feeds = layer(op, inputs, outputs, opset)
    precision = Precision(weight_bits=bits, first_last=bits, per_channel=per_channel)
    _, plain, packed = both(made, feeds, precision)
    assert_identical(plain, packed, feeds)
    np.testing.assert_array_equal(codes_in(packed, "n"), codes_in(plain, "n"))
    assert codes_in(packed, "n").dtype == np.int8
    assert len(graph.to_bytes(packed)) < len(graph.to_bytes(plain))
    onnx.checker.check_model(graph.to_bytes(packed), full_check=True)


@pytest.mark.parametrize("opset", [13, 21, 25])
@pytest.mark.parametrize(("bits", "share"), [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 8), (8, 8)])
def test_a_large_weight_takes_the_bits_that_its_codes_have(bits, share, opset):
    made, feeds = layer("Conv", 60, 120, opset)
    plan, plain, packed = both(made, feeds, Precision(weight_bits=bits, first_last=bits))
    count = 60 * 120 * 6
    stored = packed_bytes(count, bits)
    assert stored == pytest.approx(count * share / 8, abs=1)
    scales = sum(value.const_value.nbytes for value in plain.graph.initializers.values()) - count
    total = sum(value.const_value.nbytes for value in packed.graph.initializers.values())
    assert stored + scales <= total <= stored + scales + 3400  # the tables, and where each channel's codes begin
    assert_identical(plain, packed, feeds)
    assert graph.opset(packed) == (14 if opset == 13 and bits < 7 else opset)
    if bits == 4:
        assert held(packed) == ("INT4" if opset >= 21 else "UINT8", count // 2)
    assert plan.weights["n"].bits == bits


def test_packing_is_off_unless_asked_for():
    made, feeds = layer("Conv", 40, 80)
    plan, plain = quantized(made, feeds, Precision(weight_bits=4, first_last=4))
    assert graph.to_bytes(emit(made, plan, packed=False)) == graph.to_bytes(plain)
    assert held(plain) == ("INT8", 40 * 80 * 6)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.lowest}..{form.highest}")
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 7])
def test_bytes_and_tables_give_back_every_code(form, extra):
    """All codes of a width, at all places in a byte, without the runtime."""
    codes = np.random.default_rng(extra).integers(form.lowest, form.highest, 2 * form.group + extra, endpoint=True)
    codes[:2] = form.lowest, form.highest
    offsets = (codes - form.lowest).astype(np.uint8)
    offsets = np.pad(offsets, (0, -offsets.size % form.group))
    total, nbytes = np.zeros(offsets.size, np.int64), 0
    for plane in form.planes:
        packed = plane.pack(offsets)
        assert packed.dtype == np.uint8
        total += plane.table(form.lowest if plane is form.planes[0] else 0)[packed].reshape(-1)
        nbytes += packed.size
    np.testing.assert_array_equal(total[: codes.size], codes)
    assert nbytes == form.nbytes(codes.size)


def test_the_first_code_is_the_lowest_digit():
    low, high = (form.planes for form in FORMS if form.highest in (1, 31) and form.lowest != -2)
    assert low[0].pack(np.asarray([2, 0, 1, 0, 0], np.uint8)).tolist() == [2 + 9]
    assert low[0].table(-1)[2 + 9].tolist() == [1, -1, 0, -1, -1]
    offsets = np.asarray([63, 2, 0, 5], np.uint8)
    assert high[0].pack(offsets).tolist() == [15, 16]
    assert high[1].pack(offsets).tolist() == [3 + 2 * 4 + 1 * 64]
    assert high[0].table(-32)[0x1F].tolist() == [28, -28]


def test_every_weight_takes_the_smallest_form():
    """What one weight pays for, others use; a few codes are not worth a node."""
    made = model("g (float[1] x) => (float[1] y) { [n] y = Relu(x) }")
    generator = np.random.default_rng(0)
    bits = {"four": (4, 40_000), "three": (3, 40_000), "small three": (3, 4_000), "tiny": (2, 150), "two": (2, 40_000)}
    codes = {name: generator.integers(-(2 ** (n - 1)) + 1, 2 ** (n - 1), size) for name, (n, size) in bits.items()}
    codes = {name: array.astype(np.int8) for name, array in codes.items()}
    packer = Packer(made, codes, {})
    for name, array in codes.items():
        value = packer.store(name, array, graph.node_names(made)["n"])
        assert value.is_initializer() == (name == "tiny")
    sizes = {"four": 20_000, "three": 15_000, "small three": 1_500, "tiny": 150, "two": 8_000}
    names = {value.name: value.const_value.nbytes for value in made.graph.initializers.values()}
    for name, size in sizes.items():
        assert sum(count for key, count in names.items() if key.split("_")[0] == name) == size


def test_tables_are_only_written_where_they_pay():
    """Planes would save 500 bytes of the 3-bit weight, and take 3 KB of tables."""
    made = model("g (float[1] x) => (float[1] y) { [n] y = Relu(x) }")
    generator = np.random.default_rng(0)
    codes = {
        "four": generator.integers(-7, 8, 40_000).astype(np.int8),
        "three": generator.integers(-3, 4, 4_000).astype(np.int8),
    }
    packer = Packer(made, codes, {})
    for name, array in codes.items():
        packer.store(name, array, graph.node_names(made)["n"])
        np.testing.assert_array_equal(run(graph.sub_model(made, [], [name]), {})[name], array)
    assert graph.nbytes(made) == 20_000 + 2_000 + 2 * 256 + 2 * 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("size", [48_000, 48_001, 48_003])
def test_codes_of_any_number_and_range_come_back(bits, opset, size):
    """Two's complement down to its lowest code, which symmetric grids do not have."""
    made = model("g (float[1] x) => (float[1] y) { [n] y = Relu(x) }", opset)
    codes = np.random.default_rng(size).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (1, size)).astype(np.int8)
    value = Packer(made, {"c": codes}, {}).store("c", codes, graph.node_names(made)["n"])
    np.testing.assert_array_equal(run(graph.sub_model(made, [], ["c"]), {})["c"], codes)
    assert value.name == "c"
    assert not value.is_initializer()
    assert graph.nbytes(made) <= size * bits / 8 + 3300


def test_layers_of_all_kinds_share_tables():
    text = """g (float[1,6,9,9] x, float[90,6,3,3] w, float[90,90,3,3] v, float[90,90,3,3] u, float[90] b)
        => (float[1,90,3,3] y) { [one] h = Conv(x, w, b) [two] i = Conv(h, v) [three] y = Conv(i, u) }"""
    made = model(text, w=weights(90, 6, 3, 3), v=weights(90, 90, 3, 3), u=weights(90, 90, 3, 3), b=weights(90))
    feeds = {"x": weights(1, 6, 9, 9, seed=5)}
    _, plain, packed = both(made, feeds, Precision(weight_bits=3, first_last=8))
    assert_identical(plain, packed, feeds)
    gathers = [node for node in packed.graph if node.op_type == "Gather"]
    assert len(gathers) == 2  # the layer between the first and the last
    plan, plain, packed = both(made, feeds, Precision(weight_bits=3, first_last=3))
    gathers = [node for node in packed.graph if node.op_type == "Gather"]
    assert len(gathers) == 6
    assert len({node.inputs[0] for node in gathers}) == 2
    assert_identical(plain, packed, feeds)
    assert kernel_gap(packed, feeds) == kernel_gap(plain, feeds) <= 1
    mixed = {**plan.weights, "two": WeightGrid((0.3,), None, 2), "three": WeightGrid((0.02,), None, 8)}
    mixed_plan = replace(plan, weights=mixed)
    plain, packed = emit(made, mixed_plan), emit(made, mixed_plan, packed=True)
    assert_identical(plain, packed, feeds)


def test_a_transposed_convolution_is_packed_along_its_own_axes():
    text = """g (float[1,12,5,5] x, float[12,40,3,2] w, float[40] b) => (float[1,40,?,?] y) {
        [n] y = ConvTranspose<strides = [2, 1]>(x, w, b)
    }"""
    made = model(text, w=weights(12, 40, 3, 2), b=weights(40))
    feeds = {"x": weights(1, 12, 5, 5, seed=5)}
    other, data = layer("Conv")
    plan, _ = quantized(other, data)
    scales = tuple(np.linspace(0.2, 0.4, 40).tolist())
    plan = replace(plan, weights={"n": WeightGrid(scales, 1, 4)}, tensors={"x": plan.tensors["x"]}, integer=("n",))
    plain, packed = emit(made, plan), emit(made, plan, packed=True)
    assert_identical(plain, packed, feeds)
    assert held(packed)[0] == "UINT8"


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("size", [1, 10, 14, 40])
def test_a_packed_file_is_never_larger(size, opset):
    for bits in (2, 3, 4, 6):
        made, feeds = layer("Gemm", size, size, opset)
        _, plain, packed = both(made, feeds, Precision(weight_bits=bits, first_last=bits))
        assert len(graph.to_bytes(packed)) < len(graph.to_bytes(plain))
        assert_identical(plain, packed, feeds)


def test_learned_codes_decide_not_the_plan():
    made, feeds = layer("Conv", 40, 80)
    plan, _ = quantized(made, feeds, Precision(weight_bits=4, first_last=4))
    generator = np.random.default_rng(0)
    for low, high, share in ((-127, 128, 8), (-8, 8, 4), (-8, 9, 5), (-1, 2, 1.6), (-2, 2, 2)):
        learned = {"n": LearnedLayer(generator.integers(low, high, (80, 40, 3, 2)).astype(np.int8))}
        plain, packed = emit(made, plan, learned=learned), emit(made, plan, learned=learned, packed=True)
        assert_identical(plain, packed, feeds)
        np.testing.assert_array_equal(codes_in(packed, "n"), learned["n"].codes)
        assert held(packed)[1] == pytest.approx(80 * 240 * (4 if share == 5 else share) / 8, abs=1)


def test_the_model_keeps_its_own_names():
    text = """g (float[2,7,6,5] x, float[31,7,3,2] w, float[31] q0) => (float[2,31,4,4] y, float[2,31,4,4] q1) {
        [q2] h = Conv(x, w, q0) [q1] y = Relu(h) [last] q1 = Add(h, y)
    }"""
    made = model(text, w=weights(31, 7, 3, 2), q0=weights(31))
    feeds = {"x": weights(2, 7, 6, 5, seed=5)}
    _, plain, packed = both(made, feeds, Precision(weight_bits=4, first_last=4))
    assert_identical(plain, packed, feeds)
    assert set(graph.node_names(packed)) >= {"q2", "last"}
    assert {*graph.value_map(packed)} >= {"x", "h", "y", "q1"}
    names = [*graph.node_names(packed)]
    assert len(names) == len(set(names)) == len(packed.graph)
    assert graph.input_specs(packed) == graph.input_specs(made)
    written = onnx.load_from_string(graph.to_bytes(packed)).graph
    own = {*graph.node_names(made), *graph.value_map(made)}
    tensors = [tensor.name for tensor in written.initializer]
    added = {*names, *tensors, *(output for node in written.node for output in node.output)} - own
    assert all(len(name) <= 4 for name in added)
    assert len(added) > 12
    assert not written.value_info
    assert [list(value.shape) for value in packed.graph.outputs] == [[2, 31, 4, 4]] * 2


@pytest.mark.parametrize("opset", [17, 21])
def test_coverage_knows_packed_weights(tmp_path, opset):
    made, feeds = layer("Conv", 40, 80, opset)
    _, plain, packed = both(made, feeds, Precision(weight_bits=4, first_last=4))
    graph.save(packed, tmp_path / "p.onnx")
    macs = {"n": 1000}
    assert bench.coverage(packed, macs).share == bench.coverage(tmp_path / "p.onnx", macs).share == 1.0
    shapes = {"x": feeds["x"].shape}
    wanted, got = bench.foreign_coverage(plain, shapes=shapes), bench.foreign_coverage(packed, shapes=shapes)
    assert (got.integer_macs, got.total_macs, got.kernels) == (wanted.integer_macs, wanted.total_macs, wanted.kernels)
    assert got.share == 1.0
    restored = graph.producer(graph.node_names(packed)["n"].inputs[1], "DequantizeLinear")
    assert _weight_names(restored.outputs[0])[1] == restored.inputs[0].name
    assert _weight_names(graph.node_names(packed)["n"].inputs[0]) == []


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_files_are_read_again(tmp_path, bits, external):
    made, feeds = layer("Conv", 40, 80, 21)
    _, plain, packed = both(made, feeds, Precision(weight_bits=bits, first_last=bits))
    graph.save(packed, tmp_path / "p.onnx", external=external)
    again = graph.load(tmp_path / "p.onnx")
    assert_identical(plain, again, feeds)
    assert held(again) == held(packed)
    assert graph.disk_bytes(tmp_path / "p.onnx") < 0.7 * len(graph.to_bytes(plain))


def test_where_the_opset_cannot_be_raised_planes_are_not_used():
    """A normalization that trains has other outputs in opset 14."""
    text = """g (float[2,40,6,5] x, float[80,40,3,2] w, float[80] b, float[80] s, float[80] t, float[80] m, float[80] v)
        => (float[2,80,4,4] y, float[80] k) {
        [n] h = Conv(x, w, b) y, k, o, p, q = BatchNormalization(h, s, t, m, v)
    }"""
    constants = {name: weights(80, seed=number, low=0.5, high=2) for number, name in enumerate("bstmv")}
    made = model(text, 13, w=weights(80, 40, 3, 2), **constants)
    other, feeds = layer("Conv", 40, 80)
    for bits, kind in ((3, "UINT8"), (4, "UINT8"), (5, "INT8"), (6, "INT8")):
        plan, _ = quantized(other, feeds, Precision(weight_bits=bits, first_last=bits))
        plan = replace(plan, weights={"n": replace(plan.weights["n"], lowest=())})
        plan = replace(plan, tensors={"x": plan.tensors["x"]})
        packed = emit(made, plan, packed=True)
        assert graph.opset(packed) == 13
        assert held(packed) == (kind, 80 * 240 // (2 if kind == "UINT8" else 1))
