import numpy as np

from onnxq import graph
from onnxq.bench import float_macs, matrix_tensors
from onnxq.bench.macs import weight_macs
from onnxq.runtime import Session


def weights(*shape):
    return np.ones(shape, np.float32)


def counted(path, feeds, rows):
    model = graph.load(path)
    wanted = matrix_tensors(model)
    seen = Session(graph.with_outputs(model, wanted)).run(feeds, wanted)
    return float_macs(model, {name: array.shape for name, array in seen.items()}, rows)


def test_convolutions(write):
    path = write(
        """g (float[N, 6, 9, 7] x) => (float[N, C, H, W] y) {
            [plain] a = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, w1)
            [grouped] b = Conv <group = 2> (a, w2)
            [depthwise] c = Conv <group = 4> (b, w3)
            [transposed] y = ConvTranspose <group = 2, strides = [3, 2]> (c, w4)
        }""",
        {
            "w1": weights(8, 6, 3, 3),
            "w2": weights(4, 4, 1, 2),
            "w3": weights(4, 1, 2, 2),
            "w4": weights(4, 5, 3, 2),
        },
    )
    for rows in (1, 3):
        found = counted(path, {"x": np.zeros((rows, 6, 9, 7), np.float32)}, rows)
        assert found == {
            "plain": (8 * 5 * 7) * (6 * 3 * 3),
            "grouped": (4 * 5 * 6) * (4 * 1 * 2),
            "depthwise": (4 * 4 * 5) * (1 * 2 * 2),
            "transposed": (4 * 4 * 5) * (5 * 3 * 2),  # every input element feeds 5 channels x 3 x 2
        }


def test_matrix_products(write):
    path = write(
        """g (float[N, 5, 6] x, float[N, 6] v)
            => (float[N, A, B] y, float[N, D] u, float[N, E] t, float[N, 5, 3] r) {
            [linear] a = MatMul(x, w1)
            [vector] s = MatMul(x, w2)
            [stack] r = MatMul(x, w6)
            b = Transpose <perm = [0, 2, 1]> (x)
            [left] c = MatMul(w3, b)
            [scores] y = MatMul(a, c)
            [gemm] u = Gemm(v, w4, bias)
            [gemm_t] t = Gemm <transB = 1> (v, w5)
        }""",
        {
            "w1": weights(6, 7),
            "w2": weights(6),
            "w3": weights(7, 6),
            "w4": weights(6, 9),
            "w5": weights(11, 6),
            "w6": weights(1, 6, 3),
            "bias": weights(9),
        },
    )
    rows = 4
    found = counted(path, {"x": np.zeros((rows, 5, 6), np.float32), "v": np.zeros((rows, 6), np.float32)}, rows)
    assert found == {
        "linear": 5 * 7 * 6,
        "vector": 5 * 6,
        "stack": 5 * 3 * 6,
        "left": 7 * 5 * 6,  # a constant times an activation
        "scores": 5 * 5 * 7,  # two activations, one product per row of the batch
        "gemm": 9 * 6,
        "gemm_t": 11 * 6,
    }


def test_only_the_shapes_that_weights_do_not_tell_are_needed(write):
    path = write(
        """g (float[N, 4, 8, 8] x) => (float[N, C, H, W] y) {
            [conv] a = Conv(x, w1)
            b = Relu(a)
            [transposed] c = ConvTranspose(b, w2)
            [self] y = MatMul(c, b)
        }""",
        {"w1": weights(3, 4, 1, 1), "w2": weights(3, 3, 1, 1)},
    )
    assert matrix_tensors(graph.load(path)) == ["a", "b", "y", "c"]


def test_an_input_of_the_model_can_be_needed(write):
    path = write(
        """g (float[N, 2, 4, 4] x) => (float[N, C, H, W] y) {
            [up] y = ConvTranspose <strides = [2, 2]> (x, w)
        }""",
        {"w": weights(2, 3, 2, 2)},
    )
    assert matrix_tensors(graph.load(path)) == ["x"]
    assert counted(path, {"x": np.zeros((2, 2, 4, 4), np.float32)}, 2) == {"up": 2 * 16 * 3 * 4}


def test_weights_are_seen_through_dequantisation_and_integer_forms_count(write):
    path = write(
        """g (float[N, 6] x) => (float[N, 10] y) {
            w = DequantizeLinear(w_q, s)
            [first] a = MatMul(x, w)
            q, q_scale, q_zero = DynamicQuantizeLinear(a)
            [second] i = MatMulInteger(q, v_q, q_zero)
            y = Cast <to = 1> (i)
        }""",
        {"w_q": np.ones((6, 8), np.int8), "s": np.float32(0.1), "v_q": np.ones((8, 10), np.int8)},
    )
    assert counted(path, {"x": np.ones((2, 6), np.float32)}, 2) == {"first": 48, "second": 80}
    assert weight_macs(graph.load(path)) == {"first": 48, "second": 80}
