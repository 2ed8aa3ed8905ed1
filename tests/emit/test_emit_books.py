"""Weights looked up in codebooks: the codes, kernels and outputs of the plain file, in fewer bytes."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from emitting import quantized
from helpers import model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emit_packed import OPS, assert_identical, codes_in, layer

from onnxq import graph
from onnxq.emit import emit
from onnxq.emit.books import book_of
from onnxq.emit.packing import Packer
from onnxq.plan import Precision
from onnxq.types import LearnedLayer, WeightGrid


def both(made, feeds, bits, **precision):
    plan, plain = quantized(made, feeds, Precision(codebooks={"n": bits}, **precision))
    return plan, plain, emit(made, plan, packed=True)


def bytes_of(found, large=0):
    """Of all initializers with more elements than `large`, without biases, steps and shapes."""
    tensors = [value.const_value for value in found.graph.initializers.values()]
    return sum(
        tensor.nbytes for tensor in tensors if tensor.dtype.name in ("INT8", "UINT8", "INT4") and tensor.size > large
    )


@settings(max_examples=12, deadline=None)
@given(
    op=st.sampled_from(sorted(OPS)),
    bits=st.integers(1, 4),
    inputs=st.sampled_from([5, 9, 33]),
    outputs=st.integers(30, 45),
    opset=st.sampled_from([13, 17, 21]),
    per_channel=st.booleans(),
)
def test_outputs_and_kernels_are_those_of_the_plain_file(op, bits, inputs, outputs, opset, per_channel):
    made, feeds = layer(op, inputs, outputs, opset)
    plan, plain, packed = both(made, feeds, bits, per_channel=per_channel)
    assert_identical(plain, packed, feeds)
    codes = codes_in(packed, "n")
    np.testing.assert_array_equal(codes, codes_in(plain, "n"))
    assert codes.dtype == np.int8
    grid = plan.weights["n"]
    rows = [codes] if len(grid.values) == 1 else np.moveaxis(codes, grid.axis, 0)
    assert all(len(np.unique(row)) <= 2**bits for row in rows)
    onnx.checker.check_model(graph.to_bytes(packed), full_check=True)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("op", "books"), [("Conv", 120), ("MatMul", 120), ("turned", 120), ("Conv", 1)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_weight_takes_the_bits_of_its_indices_and_2_to_the_bits_bytes_per_codebook(bits, op, books, opset):
    made, feeds = layer(op, 60, 120, opset)
    plan, plain, packed = both(made, feeds, bits, per_channel=books > 1)
    count = 60 * 120 * (6 if op == "Conv" else 9)
    tables = books * 2**bits
    unpack = {1: 2048, 2: 1024, 3: 1024 + 2048, 4: 0 if opset == 21 else 512}[bits]
    if bits == 3 and opset == 13:
        assert graph.opset(packed) == 14
    assert bytes_of(packed, large=books) == pytest.approx(count * bits / 8 + tables + unpack, abs=8)
    assert len(graph.to_bytes(packed)) < count * bits / 8 + tables + unpack + 120 * 9 + 2500
    assert len(plan.weights["n"].values) == books
    assert_identical(plain, packed, feeds)


def test_three_values_take_a_fifth_of_a_byte_each():
    """Of 2 bits, where a third value is all that a weight has."""
    made, feeds = layer("Conv", 40, 80)
    weight = np.random.default_rng(0).choice(np.float32([-0.5, 0.25, 0.5]), (80, 40, 3, 2))
    graph.set_initializer(made, "w", weight)
    plan, plain, packed = both(made, feeds, 2)
    assert plan.weights["n"].values == ((-127, 64, 127),) * 80
    assert bytes_of(packed, large=100) == weight.size / 5 + 3 * 80 + 243 * 5
    assert_identical(plain, packed, feeds)


def test_codebooks_of_different_lengths_are_filled_up():
    made, feeds = layer("MatMul", 20, 40)
    weight = weights(180, 40)
    weight[:, 3] = np.where(weight[:, 3] > 0, np.float32(1), np.float32(-0.5))
    weight[:, 5] = 0
    graph.set_initializer(made, "w", weight)
    plan, plain, packed = both(made, feeds, 2)
    assert [len(plan.weights["n"].values[channel]) for channel in (2, 3, 5)] == [4, 2, 1]
    assert_identical(plain, packed, feeds)


def test_small_weights_stay_as_they_are():
    made, feeds = layer("MatMul", 2, 20)
    _, plain, packed = both(made, feeds, 2)
    assert_identical(plain, packed, feeds)
    assert graph.producer(graph.producer(graph.node_names(packed)["n"].inputs[1]).inputs[0]) is None


def test_a_codebook_that_costs_more_than_it_saves_is_not_written():
    """Beside a large weight that pays for the shared table: 700 codes save 525 bytes, 400 of which codebooks take."""
    made = model("g (float[1] x) => (float[1] y) { [n] y = Relu(x) }")
    grids = {
        "large": WeightGrid((0.1,), None, 2, values=((-100, -20, 10, 90),)),
        "one": WeightGrid((0.1,), None, 2, values=((-100, -20, 10, 90),)),
        "each": WeightGrid((0.1,) * 100, 0, 2, values=((-100, -20, 10, 90),) * 100),
    }
    shapes = {"large": (100, 400), "one": (100, 12), "each": (100, 7)}
    codes = {
        name: np.random.default_rng(1).choice(np.int8([-100, -20, 10, 90]), shape) for name, shape in shapes.items()
    }
    packer = Packer(made, codes, {}, {name: book_of(codes[name], grid) for name, grid in grids.items()})
    for name, array in codes.items():
        value = packer.store(name, array, graph.node_names(made)["n"])
        assert value.is_initializer() == (name == "each")
        found = array if name == "each" else run(graph.sub_model(made, [], [value.name]), {})[value.name]
        np.testing.assert_array_equal(found, array)


def test_codes_that_are_in_no_codebook_are_stored_all_the_same():
    made, feeds = layer("Conv", 40, 80)
    plan, _, packed = both(made, feeds, 2)
    codes = codes_in(packed, "n").copy()
    codes[7, 3, 1, 1] = next(code for code in range(-3, 3) if code not in plan.weights["n"].values[7])
    changed = emit(made, plan, learned={"n": LearnedLayer(codes)}, packed=True)
    np.testing.assert_array_equal(codes_in(changed, "n"), codes)
    assert_identical(emit(made, plan, learned={"n": LearnedLayer(codes)}), changed, feeds)


def test_scales_move_without_the_codes():
    """What tuning means and spreads does to a codebook."""
    made, feeds = layer("Conv", 40, 80)
    plan, _, packed = both(made, feeds, 3)
    codes, grid = codes_in(packed, "n"), plan.weights["n"]
    wider = replace(plan, weights={"n": replace(grid, scales=tuple(1.5 * step for step in grid.scales))})
    found = emit(made, wider, learned={"n": LearnedLayer(codes)}, packed=True)
    np.testing.assert_array_equal(codes_in(found, "n"), codes)
    assert bytes_of(found) == bytes_of(packed)


def test_an_index_begins_in_the_middle_of_its_codebook():
    codes = np.int8([[-100, 7, 90], [5, 5, -3]])
    whole = book_of(codes, WeightGrid((0.1,), None, 3, values=((-100, -3, 5, 7, 90),)))
    assert whole.index.tolist() == [[-2, 1, 2], [0, 0, -1]]
    assert whole.table.tolist() == [5, 7, 90, -100, -3]
    rows = book_of(codes, WeightGrid((0.1, 0.2), 0, 2, values=((-100, 7, 90), (-3, 5))))
    assert rows.index.tolist() == [[-1, 0, 1], [0, 0, -1]]
    assert (rows.table.tolist(), rows.axis) == ([[7, 90, -100], [5, 5, -3]], 1)
    columns = book_of(codes.T, WeightGrid((0.1, 0.2), 1, 2, values=((-100, 7, 90), (-3, 5))))
    assert (columns.index.tolist(), columns.axis) == (rows.index.T.tolist(), 0)
    assert columns.table.tolist() == rows.table.T.tolist()
    assert book_of(codes, WeightGrid((0.1,), None, 2, values=((-100, 5, 7, 90),))) is None
    assert book_of(codes, WeightGrid((0.1,), None, 2)) is None
    four = np.zeros((2, 3, 1, 1), np.int8)
    assert book_of(four, WeightGrid((0.1,) * 3, 1, 2, values=((0,),) * 3)) is None


def test_layers_share_what_unpacks_them():
    text = """g (float[2,60] x, float[60,70] a, float[70,80] b) => (float[2,80] y) {
        [n] h = MatMul(x, a) [m] y = MatMul(h, b)
    }"""
    made = model(text, a=weights(60, 70), b=weights(70, 80))
    plan, plain = quantized(made, {"x": weights(2, 60)}, Precision(codebooks={"n": 4, "m": 4}))
    packed = emit(made, plan, packed=True)
    assert bytes_of(packed, large=200) == 60 * 70 / 2 + 70 * 80 / 2 + 512
    assert_identical(plain, packed, {"x": weights(2, 60)})
