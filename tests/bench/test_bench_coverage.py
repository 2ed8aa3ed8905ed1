import importlib
import re

import numpy as np
import pytest

from onnxq import graph
from onnxq.bench import coverage, foreign_coverage, kernels
from onnxq.bench.coverage import UNFUSED, UNQUANTIZED
from onnxq.types import FloatNode

GRID = {"sx": np.float32(0.1), "zx": np.uint8(128), "sy": np.float32(0.1), "zy": np.uint8(128)}


def quantized_weight(name, shape, axis):
    """Constants of a per-channel weight: codes, scales, zero points."""
    return {
        f"{name}.weight_q": np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8),
        f"{name}.weight_scale": np.full(shape[axis], 0.01, np.float32),
        f"{name}.weight_zero": np.zeros(shape[axis], np.int8),
    }


def dequantize(name, axis):
    inputs = f'"{name}.weight_q", "{name}.weight_scale", "{name}.weight_zero"'
    return f'"{name}.w" = DequantizeLinear <axis = {axis}> ({inputs})'


IN = "xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)"


def test_a_convolution_fuses_only_where_its_output_is_quantized(write):
    path = write(
        f"""g (float[N, 3, 8, 8] x) => (float[N, 5, 6, 6] y) {{
            {IN}
            {dequantize("fused", 0)}
            [fused] a = Conv(xd, "fused.w")
            [relu] r = Relu(a)
            rq = QuantizeLinear(r, sy, zr)
            rd = DequantizeLinear(rq, sy, zr)
            {dequantize("open", 0)}
            [open] b = Conv(rd, "open.w")
            [plain] y = Conv(b, w)
        }}""",
        GRID
        | {"zr": np.uint8(0), "w": np.ones((5, 4, 1, 1), np.float32)}
        | quantized_weight("fused", (4, 3, 3, 3), 0)
        | quantized_weight("open", (4, 4, 1, 1), 0),
    )
    macs = {"fused": 4 * 36 * 27, "open": 4 * 36 * 4, "plain": 5 * 36 * 4}
    found = coverage(path, macs, reasons={"plain": "asked for"})
    assert (found.integer_macs, found.total_macs) == (3888, 3888 + 576 + 720)
    assert found.share == 3888 / 5184
    assert found.floats == (
        FloatNode("plain", "Conv", "asked for", 720),
        FloatNode("open", "Conv", UNFUSED, 576),
    )
    assert found.kernels["QLinearConv"] == 1
    assert found.kernels["Conv"] == 2
    # Without the float model: the work is counted on the file itself, and is the same.
    foreign = foreign_coverage(graph.load(path))
    assert (foreign.integer_macs, foreign.total_macs) == (3888, 5184)
    assert [node.reason for node in foreign.floats] == [UNQUANTIZED, UNFUSED]
    assert kernels(path) == found.kernels


def test_linear_layers_are_found_whatever_kernel_they_become(write):
    path = write(
        f"""g (float[2, 5, 16] x) => (float[2, 5, 9] y) {{
            {IN}
            {dequantize("into_gemm", 1)}
            "into_gemm.b" = DequantizeLinear <axis = 0> (bias_q, bias_scale)
            [into_gemm] a = MatMul(xd, "into_gemm.w")
            [add] b = Add(a, "into_gemm.b")
            bq = QuantizeLinear(b, sy, zy)
            bd = DequantizeLinear(bq, sy, zy)
            {dequantize("into_qlinear", 1)}
            [into_qlinear] c = MatMul(bd, "into_qlinear.w")
            cq = QuantizeLinear(c, sy, zy)
            cd = DequantizeLinear(cq, sy, zy)
            {dequantize("to_float", 1)}
            [to_float] y = MatMul(cd, "to_float.w")
        }}""",
        GRID
        | {"bias_q": np.arange(7, dtype=np.int32), "bias_scale": np.full(7, 0.001, np.float32)}
        | quantized_weight("into_gemm", (16, 7), 1)
        | quantized_weight("into_qlinear", (7, 8), 1)
        | quantized_weight("to_float", (8, 9), 1),
    )
    found = foreign_coverage(path)
    assert {op: found.kernels.get(op) for op in ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMul")} == {
        "QGemm": 1,
        "QLinearMatMul": 1,
        "MatMulIntegerToFloat": 1,
        "MatMul": None,
    }
    assert found.integer_macs == found.total_macs == 5 * (16 * 7 + 7 * 8 + 8 * 9)
    assert found.floats == ()


def test_products_of_activations_count_and_are_found_by_name(write):
    path = write(
        f"""g (float[N, 5, 16] x) => (float[N, 5, 16] y) {{
            {IN}
            [turn] t = Transpose <perm = [0, 2, 1]> (xd)
            tq = QuantizeLinear(t, sx, zx)
            td = DequantizeLinear(tq, sx, zx)
            [scores] a = MatMul(xd, td)
            aq = QuantizeLinear(a, sy, zy)
            ad = DequantizeLinear(aq, sy, zy)
            [soft] s = Softmax(ad)
            [mix] y = MatMul(s, x)
        }}""",
        GRID,
    )
    found = coverage(path, {"scores": 400, "mix": 300})
    assert found.integer_macs == 400
    assert found.total_macs == 700
    assert found.floats == (FloatNode("mix", "MatMul", UNQUANTIZED, 300),)


def test_packed_weights_and_a_weight_that_two_nodes_share_are_found(write):
    path = write(
        f"""g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) {{
            {IN}
            packed = Cast <to = 22> (float_codes)
            codes = Cast <to = 3> (packed)
            w = DequantizeLinear <axis = 0> (codes, scales)
            [first] a = Conv(xd, w)
            aq = QuantizeLinear(a, sy, zy)
            ad = DequantizeLinear(aq, sy, zy)
            [second] b = Conv(ad, w)
            bq = QuantizeLinear(b, sy, zy)
            bd = DequantizeLinear(bq, sy, zy)
            {dequantize("third", 0)}
            [third] c = Conv(bd, "third.w")
            cq = QuantizeLinear(c, sy, zy)
            cd = DequantizeLinear(cq, sy, zy)
            [open] y = Conv(cd, w)
        }}""",
        GRID
        | {
            "float_codes": np.random.default_rng(0).integers(-7, 8, (3, 3, 1, 1)).astype(np.float32),
            "scales": np.full(3, 0.1, np.float32),
        }
        | quantized_weight("third", (3, 3, 1, 1), 0),
    )
    found = coverage(path, {"first": 10, "second": 20, "third": 30, "open": 40})
    assert found.integer_macs == 60
    assert [node.name for node in found.floats] == ["open"]


def test_a_weight_that_is_unpacked_is_enough_when_the_runtime_renames_the_node(write, monkeypatch):
    # Layout changes give the node another name; here no such name is recognised.
    module = importlib.import_module("onnxq.bench.coverage")
    monkeypatch.setattr(module, "_SUFFIX", re.compile("never"))
    path = write(
        f"""g (float[N, 3, 8, 8] x) => (float[N, 5, 8, 8] y) {{
            {IN}
            packed = Cast <to = 22> (float_codes)
            codes = Cast <to = 3> (packed)
            turned = Transpose <perm = [1, 0]> (codes)
            shaped = Reshape(turned, shape)
            w = DequantizeLinear <axis = 0> (shaped, scales)
            [conv] a = Conv(xd, w)
            aq = QuantizeLinear(a, sy, zy)
            y = DequantizeLinear(aq, sy, zy)
        }}""",
        GRID
        | {"float_codes": np.ones((3, 5), np.float32), "scales": np.full(5, 0.1, np.float32)}
        | {"shape": np.array([5, 3, 1, 1])},
    )
    assert coverage(path, {"conv": 10}).integer_macs == 10


def test_a_layer_that_the_runtime_quantizes_by_itself_counts_as_integer(write):
    path = write(
        f"""g (float[N, 6] x) => (float[N, 4] y) {{
            {IN}
            [dense] a = Gemm(xd, w, b)
            aq = QuantizeLinear(a, sy, zy)
            y = DequantizeLinear(aq, sy, zy)
        }}""",
        GRID | {"w": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), "b": np.ones(4, np.float32)},
    )
    assert coverage(path, {"dense": 24}).integer_macs == 24


def test_dynamic_and_weight_only_files(write):
    dynamic = write(
        """g (float[N, 5, 16] x) => (float[N, 5, 8] y) {
            q, s, z = DynamicQuantizeLinear(x)
            [dense] i = MatMulInteger(q, w_q, z, w_zero)
            f = Cast <to = 1> (i)
            t = Mul(s, w_scale)
            y = Mul(f, t)
        }""",
        {"w_q": np.ones((16, 8), np.int8), "w_zero": np.int8(0), "w_scale": np.float32(0.1)},
        "dynamic",
    )
    found = foreign_coverage(dynamic)
    assert found.kernels == {"DynamicQuantizeMatMul": 1}
    assert found.integer_macs == found.total_macs == 5 * 16 * 8
    weight_only = write(
        f"""g (float[N, 5, 32] x) => (float[N, 5, 16] y) {{
            {dequantize("dense", 1)}
            [dense] y = MatMul(x, "dense.w")
        }}""",
        quantized_weight("dense", (32, 16), 1),
        "weight_only",
    )
    found = foreign_coverage(weight_only)
    assert found.kernels == {"MatMulNBits": 1}
    assert found.integer_macs == found.total_macs == 5 * 32 * 16


def test_work_is_weight_elements_where_no_input_can_be_made_up(write):
    path = write(
        f"""g (float[N, samples, 6] x) => (float[N, samples, 4] y) {{
            {IN}
            {dequantize("dense", 1)}
            [dense] a = MatMul(xd, "dense.w")
            [plain] y = MatMul(a, w)
        }}""",
        GRID | {"w": np.ones((9, 4), np.float32)} | quantized_weight("dense", (6, 9), 1),
    )
    blind = foreign_coverage(path)
    assert (blind.integer_macs, blind.total_macs) == (54, 54 + 36)
    seen = foreign_coverage(path, shapes={"x": (1, 20, 6)})
    assert (seen.integer_macs, seen.total_macs) == (20 * 54, 20 * 90)


def test_a_model_without_matrix_nodes_has_no_coverage(write):
    found = foreign_coverage(write("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"))
    assert (found.share, found.total_macs, found.floats) == (0.0, 0, ())
    assert found.kernels == {"Relu": 1}


def test_a_node_that_is_not_in_the_file_is_float(write):
    found = coverage(write("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"), {"gone": 7})
    assert found.floats == (FloatNode("gone", "", UNQUANTIZED, 7),)
    assert found.share == pytest.approx(0.0)
