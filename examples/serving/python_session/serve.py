"""A classifier as a Python program serves it: one session, made once, called for every request."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort


class Classifier:
    """A model file, ready to be called from any thread."""

    def __init__(self, model: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # requests run side by side, not one request on every core
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (entry,) = self._session.get_inputs()
        self._input = entry.name
        self.row_shape: tuple[int, ...] = tuple(entry.shape[1:])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Scores of float32 rows [n, ...], as float32 [n, classes]."""
        return self._session.run(None, {self._input: rows})[0]
