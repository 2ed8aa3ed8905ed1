"""What the report shows beyond the verdict: layers, outliers, and the bits that were chosen among."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxq import calibrate, graph
from onnxq.calibrate import Preprocess
from onnxq.calibrate.observe import count_rows
from onnxq.graph import Model
from onnxq.pipeline.allocate import errors_of, sizes
from onnxq.pipeline.choice import Choice
from onnxq.pipeline.details import details, with_study
from onnxq.pipeline.flow import flow
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs
from onnxq.plan.program import front
from onnxq.types import Dataset, Feeds, Log, Observations, Silence, Tuned
from onnxq.types.details import Details
from onnxq.types.mixed import BASE, Allocation, Study
from onnxq.types.outliers import TensorOutliers

OUTLIER_ROWS = 256
"""Calibration rows that the report looks for outliers in."""
POINTS = 16


def explained(
    prepared: Prepared,
    quantized: Model,
    tuned: Tuned,
    seen: Observations,
    rows: tuple[Dataset, Dataset],
    choice: Choice | None,
    log: Log,
) -> Details:
    """Everything that the report shows of single layers and tensors.

    Args:
        prepared: The float side.
        quantized: What `emit` made of it.
        tuned: The plan and the learned codes behind it.
        seen: What calibration saw.
        rows: Calibration rows and held-out rows.
        choice: What budgets chose; None without budgets.
        log: Progress.
    """
    found = details(prepared, quantized, tuned, seen, rows[1], log=log)
    log.stage("Looking for outliers")
    some = list(_first(rows[0], OUTLIER_ROWS))
    outliers = calibrate.find_outliers(prepared.model, some, layer_inputs(prepared.model), progress=log.advance)
    found = replace(found, outliers=standing_out(outliers), outlier_rows=sum(map(count_rows, some)))
    found = replace(found, flow=flow(prepared.model))
    return found if choice is None else _with_choice(found, prepared, choice)


def _with_choice(found: Details, prepared: Prepared, choice: Choice) -> Details:
    """Sensitivities, the front of sizes that they allow, and the point that was taken."""
    known = choice.known
    if known is None:
        return found
    costs = sizes(choice.found, known)
    errors = errors_of(known)
    points = front(errors, costs, points=POINTS)
    bits = {group: choice.bits.get(layers[0], BASE) for group, layers in known.groups.items()}
    if choice.allocation is not None:
        bits = dict(choice.allocation.bits)
    lost = sum(errors[group][chosen] for group, chosen in bits.items())
    taken = Allocation(bits, lost, {"size": costs.total(bits)})
    study = Study(str(prepared.path), graph.disk_bytes(prepared.path), known, points)
    return with_study(found, study, taken)


def standing_out(found: dict[str, TensorOutliers]) -> dict[str, TensorOutliers]:
    """The tensors in which a channel or a sample stands out."""
    return {name: outliers for name, outliers in found.items() if outliers.channels or outliers.samples}


def layer_inputs(model: Model) -> dict[str, int]:
    """The channel axis of every tensor that a layer reads, by its name."""
    found = {}
    for node in graph.nodes(model, *graph.LAYER_OPS):
        layer = graph.layer_of(node)
        if not isinstance(layer, str):
            found[graph.name_of(layer.data)] = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
    return found


def outliers(
    model: str | Path,
    data: Any,
    *,
    preprocess: Preprocess | None = None,
    samples: int = 512,
    batch: int | None = None,
    log: Log = Silence(),
) -> dict[str, TensorOutliers]:
    """Channels and samples that stand out in the tensors that the layers of a float file read.

    Args:
        model: Path of the float model.
        data: Calibration rows, as for `quantize`.
        preprocess: What is done to images.
        samples: Most rows.
        batch: Rows per run.
        log: Progress.

    Returns:
        Tensor -> what stands out in it, for all tensors that were looked at, in graph order.

    Raises:
        InputError: The model or the data cannot be read or does not fit.
        UnsupportedError: The file is quantized already.
    """
    loaded = load_float(model)
    rows = calibrate.open_data(data, model_inputs(loaded), preprocess=preprocess, samples=samples, batch=batch)
    log.stage("Looking for outliers")
    return calibrate.find_outliers(loaded, rows, layer_inputs(loaded), progress=log.advance)


def _first(rows: Iterable[Feeds], count: int) -> Iterator[Feeds]:
    taken = 0
    for feeds in rows:
        yield feeds
        taken += count_rows(feeds)
        if taken >= count:
            return
