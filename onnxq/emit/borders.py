"""Rounding borders as ordinary operators in front of QuantizeLinear.

    round(x / s + 1/2 - B) = round(x' / s)   x' = x + s / 2 - s B(t)   t = clip((x / s + z - qmin) / (n - 1), 0, 1)

with n codes from qmin on: Mul, Add, Clip for t; Mul, Add, Mul, Add, Sigmoid, Clip for B; Mul, Sum for x'. All of them
run in float, so a grid with borders is a simulation: it costs time and saves none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model, Value
from onnxq.grid import Grid
from onnxq.types import Border, TensorGrid
from onnxq.types.flow import BORDER_LIMITS


def shifted(
    model: Model,
    name: str,
    source: Value,
    grid: TensorGrid,
    border: Border,
    behind: Callable[[str, list[Value], str], Value],
) -> Value:
    """The values x' in place of the values x in `source`.

    Args:
        model: Edited in place.
        name: The tensor.
        source: x.
        grid: Of the tensor.
        border: Of the tensor.
        behind: Appends an operator with given inputs and a suffix for its name, and returns its result.
    """
    codes = Grid(grid.bits, grid.signed, symmetric=False)
    last = codes.qmax - codes.qmin
    terms = 4.0 * np.asarray(border.terms).T.reshape(3, -1, *[1] * (-1 - border.axis))

    def constant(suffix: str, array: npt.NDArray[np.float64] | float) -> Value:
        return graph.add_constant(model, f"{name}_border_{suffix}", np.asarray(array, np.float32))

    def clipped(value: Value, limits: Sequence[float], suffix: str) -> Value:
        ends = [constant(f"{suffix}_{end}", limit) for end, limit in zip(("low", "high"), limits, strict=True)]
        return behind("Clip", [value, *ends], f"border_{suffix}")

    place = behind("Mul", [source, constant("width", 1.0 / (grid.scale * last))], "border_scaled")
    place = behind("Add", [place, constant("zero", (grid.zero_point - codes.qmin) / last)], "border_moved")
    place = clipped(place, (0.0, 1.0), "place")
    curve = behind("Mul", [place, constant("square", terms[2])], "border_square")
    curve = behind("Add", [curve, constant("slope", terms[1])], "border_slope")
    curve = behind("Mul", [curve, place], "border_line")
    curve = behind("Add", [curve, constant("level", terms[0])], "border_level")
    level = clipped(behind("Sigmoid", [curve], "border_sigmoid"), BORDER_LIMITS, "limited")
    lowered = behind("Mul", [level, constant("step", -grid.scale)], "border_lowered")
    return behind("Sum", [source, lowered, constant("half", grid.scale / 2)], "border")
