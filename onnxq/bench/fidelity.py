"""How near two models' outputs are to each other, or one's to the truth. Batches stream; none is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.bench.stats import wilson
from onnxq.errors import DataError
from onnxq.runtime import Session
from onnxq.types import Array, Feeds, Fidelity, Interval, PerRow

MAX_CLASSES = 100_000
STEPS = 255
"""Steps of an 8-bit grid over an output's range."""


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy on labelled rows.

    Attributes:
        accuracy: Share of rows whose arg-max is the label.
        correct: Per row, whether it is.
        rows: SHA-256 of the rows and their labels.
    """

    accuracy: Interval
    correct: npt.NDArray[np.bool_]
    rows: str = ""

    @property
    def per_row(self) -> PerRow:
        """The same as reports keep it."""
        return PerRow(self.rows, written(self.correct))


def written(right: npt.NDArray[np.bool_]) -> str:
    """One character per row, "1" where it is right."""
    return (right.astype(np.uint8) + ord("0")).astype(np.uint8).tobytes().decode()


class _Digest:
    """SHA-256 of rows, however they are cut into batches."""

    def __init__(self) -> None:
        self._parts: dict[str, hashlib._Hash] = {}

    def add(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            part = self._parts.setdefault(name, hashlib.sha256(f"{name} {array.dtype}".encode()))
            part.update(np.ascontiguousarray(array).tobytes())

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for name in sorted(self._parts):
            whole.update(self._parts[name].digest())
        return whole.hexdigest()


def compare(reference: Session, candidate: Session, batches: Iterable[Feeds]) -> Fidelity:
    """Signal-to-noise ratio per float output, and agreement of the arg-max where an output looks like logits.

    Args:
        reference: The float model.
        candidate: The quantized model, with the same outputs.
        batches: Rows that calibration did not see.

    Raises:
        DataError: There are no batches, the models have no float output in common, or one of another fixed shape.
    """
    theirs = _float_outputs(candidate)
    names = [name for name in _float_outputs(reference) if name in theirs]
    if not names:
        raise DataError("the two models have no float output in common.")
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    rows, seen = 0, _Digest()
    agreed: list[npt.NDArray[np.bool_]] = []
    fixed = {spec.name: spec.shape for spec in reference.outputs}
    uneven: dict[str, None] = {}
    for feeds in batches:
        seen.add(feeds)
        wanted, got = reference.run(feeds, names), candidate.run(feeds, names)
        rows += _rows(reference, feeds)
        uneven |= dict.fromkeys(name for name in names if not _even(wanted[name], got[name], fixed[name]))
        wanted = {name: array for name, array in wanted.items() if name not in uneven}
        for name in wanted:
            power, error = _powers(wanted[name], got[name])
            signal[name] = signal.get(name, 0.0) + power
            noise[name] = noise.get(name, 0.0) + error
        logits = _logits(wanted)
        if logits is not None:
            agreed.append(wanted[logits].argmax(axis=1) == got[logits].argmax(axis=1))
    if not rows:
        raise DataError("there are no rows to compare the models on.")
    same = np.concatenate(agreed) if agreed else np.zeros(0, bool)
    return Fidelity(
        rows=rows,
        sqnr_db={name: _decibels(signal[name], noise[name]) for name in signal if name not in uneven},
        agreement=wilson(int(same.sum()), len(same)) if len(same) else None,
        agreed=PerRow(seen.hexdigest(), written(same)) if len(same) else None,
        uneven=tuple(uneven),
    )


def _even(wanted: Array, got: Array, fixed: tuple[int | str | None, ...] | None) -> bool:
    """Whether two results can be compared; where they cannot, what differs must be free in the model."""
    if wanted.shape == got.shape:
        return True
    if fixed is not None and len(fixed) == wanted.ndim == got.ndim:
        free = (not isinstance(size, int) for size in fixed)
        if all(one == other or loose for one, other, loose in zip(wanted.shape, got.shape, free, strict=True)):
            return False
    raise DataError(f"an output has shape {list(wanted.shape)} in one model and {list(got.shape)} in the other.")


def _float_outputs(session: Session) -> list[str]:
    return [spec.name for spec in session.outputs if spec.dtype.startswith("float")]


def _rows(session: Session, feeds: Feeds) -> int:
    """Length of the first axis of the first input that has one."""
    arrays = (feeds[spec.name] for spec in session.inputs if spec.name in feeds)
    return next((len(array) for array in arrays if np.ndim(array)), 1)


def _powers(wanted: Array, got: Array) -> tuple[float, float]:
    """Energy of signal and error where the signal is finite; infinite error where the candidate is not."""
    finite = np.isfinite(wanted)
    clean = wanted[finite].astype(np.float64)
    error = got[finite].astype(np.float64) - clean
    lost = math.inf if not np.isfinite(error).all() else float(error @ error)
    return float(clean @ clean), lost


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def _logits(outputs: Mapping[str, Array]) -> str | None:
    """The first of the float `outputs` that can be class scores: [rows, classes]."""
    for name, array in outputs.items():
        if array.ndim == 2 and 2 <= array.shape[1] <= MAX_CLASSES:
            return name
    return None


def top1(session: Session, batches: Iterable[tuple[Feeds, Array]]) -> Score:
    """Top-1 accuracy of the first output that looks like class scores.

    Args:
        session: The model.
        batches: Inputs and the class index of every row.

    Raises:
        DataError: No output looks like class scores, or the labels do not fit it.
    """
    names = _float_outputs(session)
    correct: list[npt.NDArray[np.bool_]] = []
    seen = _Digest()
    for feeds, labels in batches:
        seen.add({**feeds, "": np.asarray(labels)})
        outputs = session.run(feeds, names) if names else {}
        name = _logits(outputs)
        if name is None:
            raise DataError("no output of the model is [rows, classes] of floats; accuracy needs class scores.")
        correct.append(outputs[name].argmax(axis=1) == _checked(labels, outputs[name]))
    if not correct:
        raise DataError("there are no labelled rows.")
    hits = np.concatenate(correct)
    return Score(wilson(int(hits.sum()), len(hits)), hits, seen.hexdigest())


def _checked(labels: Array, scores: Array) -> Array:
    flat = np.asarray(labels).reshape(-1)
    rows, classes = scores.shape
    if flat.dtype.kind not in "iu":
        raise DataError(f"labels are class indices, not {flat.dtype}.")
    if len(flat) != rows:
        raise DataError(f"there are {len(flat)} labels for {rows} rows.")
    if rows and not (flat.min() >= 0 and flat.max() < classes):
        raise DataError(f"labels run from {flat.min()} to {flat.max()}, but the model has classes 0 to {classes - 1}.")
    return flat


def gap_in_steps(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Largest difference of float outputs, in steps of an 8-bit grid over each output's range in `a`.

    Args:
        a: Outputs of one execution, by name.
        b: Outputs of another on the same rows.

    Returns:
        0.0 when all are equal; infinity where only one of two values is finite, or where they differ and that
        output of `a` is constant.
    """
    return max((_gap(a[name], b[name]) for name in a if a[name].dtype.kind == "f" and a[name].size), default=0.0)


def _gap(a: Array, b: Array) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.array_equal(x, y, equal_nan=True):
        return 0.0
    finite = np.isfinite(x)
    if not (finite == np.isfinite(y)).all() or not finite.any():
        return math.inf
    spread = float(np.ptp(x[finite]))
    widest = float(np.abs(x[finite] - y[finite]).max())
    if spread == 0:
        return math.inf if widest else 0.0
    return widest * STEPS / spread
