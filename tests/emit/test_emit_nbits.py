"""MatMul by weights in blocks, against the floats that the codes stand for."""

import numpy as np
import onnx
import pytest
from helpers import model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.emit.nbits import SHRINKS, BlockWeight, round_blocks, store_blocks
from onnxq.errors import UnsupportedError
from onnxq.grid import SMALLEST_SCALE

TEXT = """g (float[2,3,{0}] x, float[{0},{1}] w, float[{1}] b) => (float[2,3,{1}] y) {{
    [n] h = MatMul(x, w) [add] y = Add(h, b)
}}"""


def one(inputs, outputs):
    made = model(TEXT.format(inputs, outputs), w=weights(inputs, outputs), b=weights(outputs))
    return made, graph.node_names(made)["n"], {"x": weights(2, 3, inputs, seed=5)}


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64, 128]),
)
def test_the_product_is_that_of_the_floats(inputs, outputs, bits, block):
    made, node, feeds = one(inputs, outputs)
    generator = np.random.default_rng(inputs)
    half = 2 ** (bits - 1)
    codes = generator.integers(-half, half, (inputs, outputs)).astype(np.int8)
    steps = generator.uniform(0.01, 1, (-(-inputs // block), outputs)).astype(np.float32)
    weight = BlockWeight(codes, steps, bits, block)
    floats = np.asarray([[codes[k, n] * steps[k // block, n] for n in range(outputs)] for k in range(inputs)])
    np.testing.assert_allclose(weight.floats(), floats, rtol=1e-6)
    store_blocks(made, node, weight)
    assert ops(made) == ["MatMulNBits", "Add"]
    for optimize in ("off", "all"):
        got = run(made, feeds, optimize)["y"]
        expected = feeds["x"].astype(np.float64) @ floats + weights(outputs)
        # Activations are rounded to 8 bits a block: half a step of each, times the weight's magnitude.
        limit = np.abs(feeds["x"]).max(axis=-1, keepdims=True) / 254 * np.abs(floats).sum(axis=0) + 1e-4
        assert (np.abs(got - expected) <= limit).all()


@pytest.mark.parametrize(("bits", "least"), [(4, 18), (8, 35)])
def test_rounding_is_near_the_float_model(bits, least):
    made, node, feeds = one(150, 40)
    wanted = run(made, feeds)["y"]
    weight = round_blocks(graph.layer_of(node).weight, bits, 32)
    store_blocks(made, node, weight)
    graph.remove_unused(made)
    got = run(made, feeds, "all")["y"]
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()) > least
    assert graph.nbytes(made) == 160 * 40 * bits // 8 + 4 * 5 * 40 + 4 * 40
    assert graph.node_names(made)["n"].op_type == "MatMulNBits"
    onnx.checker.check_model(graph.to_bytes(made))


def test_each_block_of_8_bits_has_the_step_of_its_largest_weight():
    block, highest = 64, 127
    weight = weights(100, 7)
    weight[block : 2 * block, 3] = 0
    found = round_blocks(weight, 8, block)
    assert np.abs(found.codes).max() == highest
    for index in range(-(-100 // block)):
        part = weight[index * block : (index + 1) * block]
        expected = np.maximum(np.abs(part).max(axis=0) / highest, SMALLEST_SCALE)
        np.testing.assert_allclose(found.steps[index], expected, rtol=1e-6)
        codes = np.rint(part / expected.astype(np.float32))
        np.testing.assert_array_equal(found.codes[index * block : (index + 1) * block], codes)


@pytest.mark.parametrize("size", [1.0, 1e30])
@pytest.mark.parametrize("signed", [False, True])
def test_each_block_of_4_bits_has_the_best_of_the_candidates(signed, size):
    weight = weights(40, 6) * np.float32(size)
    weight[16:32, 3] = 0
    found = round_blocks(weight, 4, 16, signed=signed)
    assert (found.floats()[16:32, 3] == 0).all()
    assert (found.steps < 0).any() == signed
    for index in range(3):
        for column in range(6):
            part = weight[16 * index : 16 * index + 16, column].astype(np.float64)
            reached = np.square(found.floats()[16 * index : 16 * index + 16, column].astype(np.float64) - part).sum()
            tried = [s * f * np.abs(part).max() / 8 for f in SHRINKS for s in ((1, -1) if signed else (1,))]
            errors = [np.square(np.clip(np.rint(part / step), -8, 7) * step - part).sum() for step in tried if step]
            assert reached == pytest.approx(min(errors, default=0.0), rel=1e-4, abs=1e-9 * size**2)


def test_an_output_of_the_model_keeps_its_name():
    made = model("g (float[2,32] x, float[32,5] w) => (float[2,5] y) { [n] y = MatMul(x, w) }", w=weights(32, 5))
    feeds = {"x": weights(2, 32, seed=5)}
    store_blocks(made, graph.node_names(made)["n"], round_blocks(weights(32, 5), 8, 32))
    assert list(run(made, feeds)) == ["y"]
    assert [list(value.shape) for value in made.graph.outputs] == [[2, 5]]


def test_what_is_no_matmul_or_does_not_fit_is_refused():
    made, node, _ = one(40, 8)
    before = graph.to_bytes(made)
    with pytest.raises(UnsupportedError, match="'add' is no product"):
        store_blocks(made, graph.node_names(made)["add"], round_blocks(weights(40, 8), 4, 32))
    with pytest.raises(UnsupportedError, match=r"shape \[8, 40\] do not fit 'n'"):
        store_blocks(made, node, round_blocks(weights(8, 40), 4, 32))
    gemm = model("g (float[2,4] x, float[4,3] w) => (float[2,3] y) { [n] y = Gemm(x, w) }", w=weights(4, 3))
    with pytest.raises(UnsupportedError, match="'n' is no product"):
        store_blocks(gemm, graph.node_names(gemm)["n"], round_blocks(weights(4, 3), 4, 32))
    assert graph.to_bytes(made) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "4 or 8 bits, not 3"),
        ({"block": 8}, "from 16 on, not 8"),
        ({"block": 48}, "power of two"),
        ({"steps": np.ones((3, 2), np.float32)}, "in blocks of 16"),
        ({"codes": np.full((20, 2), 8, np.int8)}, "beyond 4 bits"),
        ({"codes": np.full((20, 2), -9, np.int8)}, "beyond 4 bits"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(change, message):
    given = {"codes": np.full((20, 2), 7, np.int8), "steps": np.ones((2, 2), np.float32), "bits": 4, "block": 16}
    assert BlockWeight(**given).floats().shape == (20, 2)
    with pytest.raises(ValueError, match=message):
        BlockWeight(**{**given, **change})
