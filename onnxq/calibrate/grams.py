"""Second moments of what layers read: sums over rows of the products of two inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds

LIMIT = 1 << 29
"""Bytes of matrices that one pass over the rows fills."""
Grams = dict[str, npt.NDArray[np.float64]]


def grams(
    model: Model, rows: Sequence[Feeds], widths: dict[str, int], config: SessionConfig = SessionConfig()
) -> Iterator[Grams]:
    """x^T x, float64 [width, width], of tensors [..., width] over all rows; not finite where a tensor is not.

    Args:
        model: The prepared float model.
        rows: Batches; gone through once for every part of the tensors.
        widths: Last axis of each tensor, by its name.
        config: How to run.

    Yields:
        Parts of the tensors that fit into memory together, in the order of `widths`.
    """
    for names in _parts(widths):
        yield _summed(model, rows, {name: widths[name] for name in names}, config)


def _parts(widths: dict[str, int]) -> Iterator[list[str]]:
    part: list[str] = []
    for name in widths:
        if part and 8 * sum(widths[other] ** 2 for other in (*part, name)) > LIMIT:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def _summed(model: Model, rows: Iterable[Feeds], widths: dict[str, int], config: SessionConfig) -> Grams:
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in widths if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False), config) if inner else None
    found = {name: np.zeros((width, width)) for name, width in widths.items()}
    for feeds in rows:
        values = session.run({spec.name: feeds[spec.name] for spec in session.inputs}, inner) if session else {}
        for name, gram in found.items():
            x = np.asarray(values[name] if name in values else feeds[name], np.float64).reshape(-1, widths[name])
            with np.errstate(invalid="ignore", over="ignore"):
                gram += x.T @ x
    return found
