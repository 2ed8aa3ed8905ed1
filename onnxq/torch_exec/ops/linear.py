"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.arithmetic import Binary


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    /,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the attribute's name
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Alpha a b + beta c for matrices, `c` broadcast."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    if alpha != 1.0:
        product = (alpha * product).to(a.dtype)
    if c is None:
        return product
    return product + (c if beta == 1.0 else (beta * c).to(a.dtype))


def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """The sum of products that `equation` writes, in numpy's notation."""
    made: Tensor = torch.einsum(equation.replace(" ", ""), *inputs)
    return made


OPS: dict[str, Handler] = {"Einsum": einsum, "Gemm": gemm, "MatMul": Binary(torch.matmul)}
