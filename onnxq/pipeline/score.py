"""`evaluate`: top-1 accuracy of a model, or agreement and SQNR against a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxq import bench, calibrate, graph
from onnxq.calibrate import Preprocess
from onnxq.errors import NoLabels
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Evaluation


def evaluate(
    model: str | Path,
    data: Any,
    *,
    reference: str | Path | None = None,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    batch: int | None = None,
    config: SessionConfig = SessionConfig(),
) -> Evaluation:
    """Score a model on labelled rows, or against a reference on any rows.

    Args:
        model: An ONNX file, float or quantized.
        data: Labelled rows (inputs and `label`; or a folder with one sub-folder per class). With a reference the
            labels may be missing.
        reference: A model to compare with, usually the float one.
        preprocess: What is done to images.
        samples: Most rows.
        batch: Rows per run.
        config: Provider and threads.

    Raises:
        DataError: No labels and no reference, or the rows do not fit the model.
    """
    session = Session(graph.require_readable(model), config)
    other = Session(graph.require_readable(reference), config) if reference is not None else None
    try:
        labelled = calibrate.open_labelled(data, session.inputs, preprocess=preprocess, samples=samples, batch=batch)
        rows = labelled.unlabelled()
    except NoLabels:
        if other is None:
            raise
        labelled, many = None, samples or 1_000_000
        rows = calibrate.open_data(data, session.inputs, preprocess=preprocess, samples=many, batch=batch)
    fidelity = bench.compare(other, session, rows) if other is not None else None
    score = bench.top1(session, labelled) if labelled is not None else None
    base = bench.top1(other, labelled) if labelled is not None and other is not None else None
    both = bench.paired(score.correct, base.correct) if score is not None and base is not None else None
    count = len(score.correct) if score is not None else fidelity.rows if fidelity is not None else 0
    return Evaluation(
        rows=count,
        accuracy=score.accuracy if score is not None else None,
        reference_accuracy=base.accuracy if base is not None else None,
        paired=both,
        fidelity=fidelity,
        correct=score.per_row if score is not None else None,
    )
