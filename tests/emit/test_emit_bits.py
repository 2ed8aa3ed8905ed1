"""Fewer than 8 bits: exact emulation inside 8-bit codes."""

import numpy as np
import pytest
from emitting import assert_good, quantized, sqnr, stored
from helpers import model, run, weights

from onnxq import graph
from onnxq.grid import Grid, quantize
from onnxq.plan import Precision
from onnxq.plan.weights import absmax, offset_least_squares

TEXT = """g (float[2,3,8,8] x, float[6,3,3,3] w, float[6] b, float[6,6,3,3] v, float[6,6,1,1] u) => (float[2,6,2,2] y) {
    [one] h = Conv(x, w, b)
    [two] i = Conv(h, v) r = Relu(i)
    [pool] p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
    [three] y = Conv(p, u)
}"""
CONSTANTS = {"w": weights(6, 3, 3, 3), "b": weights(6), "v": weights(6, 6, 3, 3), "u": weights(6, 6, 1, 1)}
FEEDS = {"x": weights(2, 3, 8, 8, seed=5)}


def small():
    return model(TEXT, **CONSTANTS)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("optimize", ["off", "all"])
def test_activations_take_few_codes(bits, optimize):
    m = small()
    plan, emitted = quantized(m, FEEDS, Precision(activation_bits=bits, first_last=bits, residual_bits=bits))
    inner = ["h", "r", "p"]
    seen = run(graph.with_outputs(emitted, [*inner, *(f"{name}_q" for name in (*inner, "x", "y"))]), FEEDS, optimize)
    for name in (*inner, "x"):
        grid = plan.tensors[name]
        assert grid.bits == bits
        codes = seen[f"{name}_q"]
        assert codes.dtype == np.uint8
        assert codes.max() < 2**bits
        floats = FEEDS.get(name, seen.get(name))
        expected = quantize(floats, grid.scale, grid.zero_point, Grid(bits, False, False))
        np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(seen["h_q"])) > 0.7 * 2**bits
    assert seen["y_q"].max() < 2**bits


def test_activations_beyond_the_calibrated_range_saturate():
    m = small()
    plan, emitted = quantized(m, FEEDS, Precision(activation_bits=4, first_last=4))
    wide = {"x": 100 * FEEDS["x"]}
    codes = run(graph.with_outputs(emitted, ["x_q"]), wide, "all")["x_q"]
    expected = quantize(wide["x"], plan.tensors["x"].scale, plan.tensors["x"].zero_point, Grid(4, False, False))
    np.testing.assert_array_equal(codes, expected)
    assert set(np.unique(codes)) == {*np.unique(expected)} >= {0, 15}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_take_few_codes(bits, per_channel):
    m = small()
    _, emitted = quantized(m, FEEDS, Precision(weight_bits=bits, first_last=8, per_channel=per_channel))
    axis = 0 if per_channel else None
    for name, key, width in (("one", "w", 8), ("two", "v", bits), ("three", "u", 8)):
        top = 2 ** (width - 1) - 1
        steps, low, high = absmax(CONSTANTS[key], Grid(width), axis), np.int32(-top), np.int32(top)
        if width < 7:
            steps, low = offset_least_squares(CONSTANTS[key], width, axis)
            high = low + 2**width - 1
        shaped, low, high = (values.reshape(-1, 1, 1, 1) for values in (steps, low, high))
        expected = np.clip(np.rint(CONSTANTS[key] / shaped), low, high)
        codes = stored(emitted, f"{name}.weight_q")
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(stored(emitted, f"{name}.weight_scale").reshape(-1), steps)


@pytest.mark.parametrize("per_channel", [True, False])
def test_few_weight_bits_run_in_the_same_kernels(per_channel):
    m = small()
    precision = Precision(weight_bits=3, per_channel=per_channel)
    _, _, ran = assert_good(m, FEEDS, least=8, precision=precision)
    assert ran.count("QLinearConv") == 3
    assert ran.count("DequantizeLinear") == 1


def test_more_bits_are_nearer():
    m = small()
    ratios = [
        sqnr(m, quantized(m, FEEDS, Precision(bits, bits, first_last=bits, residual_bits=bits))[1], FEEDS)
        for bits in (2, 4, 6, 8)
    ]
    assert ratios == sorted(ratios)
    assert ratios[-1] > ratios[1] + 15


def test_one_step_for_all_channels_is_a_scalar():
    m = small()
    _, emitted, ran = assert_good(m, FEEDS, least=20, precision=Precision(per_channel=False))
    assert ran.count("QLinearConv") == 3
    for name in ("one.weight_scale", "one.weight_zero_point", "one.bias_scale"):
        assert stored(emitted, name).shape == ()
    assert stored(emitted, "one.bias_q").shape == (6,)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("op", ["Gemm(x, w, b)", "Gemm<transB = 1>(x, w, b)"])
def test_narrow_layers_of_all_kinds(op, per_channel):
    text = f"g (float[5,6] x, float[6,6] w, float[6] b) => (float[5,6] y) {{ [n] y = {op} }}"
    m = model(text, w=weights(6, 6), b=weights(6))
    precision = Precision(narrow=frozenset({"n"}), per_channel=per_channel)
    _, emitted, ran = assert_good(m, {"x": weights(5, 6, seed=5)}, precision=precision)
    assert np.abs(stored(emitted, "n.weight_q")).max() == 63
    assert "QGemm" in ran
