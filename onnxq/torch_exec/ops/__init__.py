"""The operators, grouped by topic. Adding one is one function and one line in the table of its file."""

from collections.abc import Mapping

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops import (
    activation,
    arithmetic,
    attention,
    convolution,
    create,
    index,
    linear,
    logic,
    norm,
    pool,
    quantization,
    recurrent,
    reduction,
    resize,
    sampling,
    scatter,
    shape,
    unary,
)

_TABLES = (
    activation.OPS,
    arithmetic.OPS,
    attention.OPS,
    convolution.OPS,
    create.OPS,
    index.OPS,
    linear.OPS,
    logic.OPS,
    norm.OPS,
    pool.OPS,
    quantization.OPS,
    recurrent.OPS,
    reduction.OPS,
    resize.OPS,
    sampling.OPS,
    scatter.OPS,
    shape.OPS,
    unary.OPS,
)

OPS: Mapping[str, Handler] = {name: handler for table in _TABLES for name, handler in table.items()}


def supported_ops() -> tuple[str, ...]:
    """Names of the operators of the standard domain that run in torch, sorted."""
    return tuple(sorted(OPS))
