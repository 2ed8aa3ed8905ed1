"""Numerical against automatic gradients, in double precision, with respect to inputs and constants alike."""

import numpy as np
import pytest
from helpers import model, weights

pytest.importorskip("torch")

import torch

from onnxq.torch_exec import extract

IMAGE = {"x": (2, 4, 5, 3)}
CASES = {
    "Conv<pads=[1,0,2,1], strides=[2,1], group=2>(x, w, b)": IMAGE | {"w": (6, 2, 3, 2), "b": (6,)},
    "ConvTranspose<pads=[1,0,0,1], strides=[2,1], output_padding=[1,0]>(x, w, b)": IMAGE
    | {"w": (4, 3, 3, 2), "b": (3,)},
    "MaxPool<kernel_shape=[2,2], pads=[1,0,0,1], strides=[2,1]>(x)": IMAGE,
    "AveragePool<kernel_shape=[2,2], pads=[1,0,0,1], strides=[2,1], ceil_mode=1>(x)": IMAGE,
    "GlobalMaxPool(x)": IMAGE,
    "BatchNormalization<epsilon=0.1>(x, w, b, w, v)": IMAGE | {"w": (4,), "b": (4,), "v": (4,)},
    "LayerNormalization<epsilon=0.1>(x, w, b)": IMAGE | {"w": (3,), "b": (3,)},
    "InstanceNormalization<epsilon=0.1>(x, w, b)": IMAGE | {"w": (4,), "b": (4,)},
    "LRN<size=3, alpha=0.3>(x)": IMAGE,
    'Resize<mode="cubic">(x, , w)': IMAGE,
    "Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b)": {"x": (3, 4), "w": (5, 4), "b": (5,)},
    "MatMul(x, w)": {"x": (2, 3, 4), "w": (4, 2)},
    'Einsum<equation="bij,jk->bki">(x, w)': {"x": (2, 3, 4), "w": (4, 2)},
    "Softmax<axis=1>(x)": {"x": (2, 3, 4)},
    "LogSoftmax(x)": {"x": (2, 3, 4)},
    'Gelu<approximate="tanh">(x)': {"x": (3, 4)},
    "Clip(x, w, b)": {"x": (3, 4), "w": (), "b": ()},
    "PRelu(x, w)": {"x": (3, 4), "w": (4,)},
    "HardSwish(x)": {"x": (3, 4)},
    "Softplus(x)": {"x": (3, 4)},
    "Erf(x)": {"x": (3, 4)},
    "Div(x, w)": {"x": (3, 4), "w": (4,)},
    "Max(x, w, b)": {"x": (3, 4), "w": (4,), "b": (3, 1)},
    "Where(c, x, w)": {"x": (3, 4), "w": (4,)},
    "ReduceMean<keepdims=0>(x, i)": {"x": (3, 4)},
    "ReduceL2<keepdims=0>(x, i)": {"x": (3, 4)},
    "ReduceLogSumExp(x, i)": {"x": (3, 4)},
    "CumSum<exclusive=1, reverse=1>(x, i)": {"x": (3, 4)},
    "Gather<axis=1>(x, i)": {"x": (3, 4)},
    "Concat<axis=0>(x, w)": {"x": (3, 4), "w": (2, 4)},
    'Pad<mode="edge">(x, p)': {"x": (3, 4)},
    "Attention(x, w, b)": {"x": (1, 2, 3, 4), "w": (1, 2, 5, 4), "b": (1, 2, 5, 2)},
    "DequantizeLinear<axis=0>(q, w)": {"x": (), "w": (3,)},
}


def slice_of(call, shapes):
    """A slice of one node; everything but x is a constant."""
    constants = {name: weights(*shape, seed=3) for name, shape in shapes.items() if name != "x"}
    if "v" in constants:
        constants["v"] = np.abs(constants["v"]) + 0.5
    if call.startswith("Clip"):
        constants |= {"w": np.float32(-0.4), "b": np.float32(0.6)}
    if call.startswith("Resize"):
        constants["w"] = np.array([1, 1, 0.6, 2], np.float32)
    numbers = {"c": weights(3, 4) > 0, "i": np.array([1]), "p": np.array([1, 0, 2, 1]), "q": np.ones((3, 2), np.int8)}
    arguments = call.rpartition("(")[2].rstrip(")").replace(" ", "").split(",")
    constants |= {name: array for name, array in numbers.items() if name in arguments}
    kinds = {"float32": "float", "bool": "bool", "int64": "int64", "int8": "int8"}
    heads = [f"{kinds[str(a.dtype)]}[{','.join(map(str, a.shape))}] {name}" for name, a in constants.items()]
    heads = [head.replace("[]", "") for head in heads]
    text = f"g ({', '.join(['float x', *heads])}) => (float y) {{ y = {call} }}"
    made = model(
        text.replace("float x", f"float[{','.join(map(str, shapes['x']))}] x").replace("[]", ""), 23, **constants
    )
    return extract(made, ["x"], ["y"]).double()


@pytest.mark.parametrize("call", CASES)
def test_gradients(call):
    shapes = CASES[call]
    made = slice_of(call, shapes)
    learned = [
        name for name, tensor in made.constants.items() if tensor.is_floating_point() and not call.startswith("Resize")
    ]

    def run(x, *tensors):
        return made({"x": x}, constants=dict(zip(learned, tensors, strict=True)))["y"]

    x = torch.from_numpy(weights(*shapes["x"], seed=1)).double()
    x = x.requires_grad_(not call.startswith("Dequantize"))
    assert torch.autograd.gradcheck(run, (x, *(made.constants[name].clone().requires_grad_() for name in learned)))


def test_a_bound_passes_the_gradient_of_what_lies_on_it():
    made = model(
        "g (float[3] x, float l, float h) => (float[3] y) { y = Clip(x, l, h) }", l=np.float32(0), h=np.float32(1)
    )
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    extract(made, ["x"], ["y"])({"x": x})["y"].sum().backward()
    assert x.grad.tolist() == [1, 1, 0]
