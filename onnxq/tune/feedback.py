"""Rounding with feedback: the error of a weight is made good by those of the same output that are not rounded yet.

For the rows x of a product x W, the error of the rounded weight Q is

    |x (W - Q)|^2 summed over rows = trace((W - Q)^T G (W - Q))        G = sum of x^T x  [inputs, inputs]

Inputs are rounded one after the other. With the codes up to input i fixed, the later weights with the least error are

    W[i + 1:] <- W[i + 1:] - U[i, i + 1:]^T (W[i] - Q[i]) / U[i, i]    U upper triangular, U^T U = inverse of G

(B. Hassibi, D. Stork, "Second order derivatives for network pruning", 1992; for rounding in a fixed order: E. Frantar
et al., "GPTQ", arXiv 2210.17323, section 3.) Inputs of larger power come first, as they have the most to correct.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import linalg

DAMPING = 0.01
"""Share of the mean power that is added to the power of every input."""
GROUP = 64
"""Inputs whose corrections reach the rest in one product."""
Floats = npt.NDArray[np.float64]


def round_with_feedback(
    weight: npt.NDArray[np.float32], steps: npt.NDArray[np.float32], gram: Floats, bits: int
) -> npt.NDArray[np.int8]:
    """Codes of a weight whose product with the rows behind `gram` is nearest to the float one.

    Args:
        weight: float32 [inputs, outputs].
        steps: float32 [inputs, outputs]: of every weight; may be negative.
        gram: float64 [inputs, inputs]: sum over rows of the products of two inputs.
        bits: Codes reach from -2 ** (bits - 1) to 2 ** (bits - 1) - 1.

    Returns:
        int8 [inputs, outputs].
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _factor(gram[np.ix_(order, order)])
    left, size = weight[order].astype(np.float64), steps[order].astype(np.float64)
    codes = np.empty(weight.shape, np.int8)
    half = 2 ** (bits - 1)
    for start in range(0, len(left), GROUP):
        end = min(start + GROUP, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for at in range(start, end):
            found = np.clip(np.rint(left[at] / size[at]), -half, half - 1)
            codes[order[at]] = found
            errors[at - start] = (left[at] - found * size[at]) / factor[at, at]
            left[at + 1 : end] -= np.outer(factor[at, at + 1 : end], errors[at - start])
        left[end:] -= factor[start:end, end:].T @ errors
    return codes


def _factor(gram: Floats) -> Floats:
    """Upper triangular U with U^T U = inverse of the damped matrix."""
    power = np.diag(gram)
    damped = gram + (DAMPING * power.mean() or 1.0) * np.eye(len(gram))
    inverse = linalg.cho_solve(linalg.cho_factor(damped), np.eye(len(gram)))
    found: Floats = linalg.cholesky((inverse + inverse.T) / 2)
    return found
