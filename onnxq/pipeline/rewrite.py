"""`simplify` and `reparam`: the float stages of the pipeline alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from onnxq import bench, passes
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs, prepare
from onnxq.types import Log, Silence

PROBE_BATCH = 2


def simplify(model: str | Path, *, log: Log = Silence()) -> Prepared:
    """Load a float model, simplify it and fold what can be folded; the result computes the same."""
    return prepare(model, load_float(model), None, log)


def reparam(
    model: str | Path,
    *,
    floor_db: float | None = None,
    equalize: bool = False,
    without: Collection[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    log: Log = Silence(),
) -> Prepared:
    """Load a float model and apply every function-preserving rewrite, checked on random inputs.

    Args:
        model: Path of the float model.
        floor_db: Leave parallel branches apart where their fused kernel would keep less than this signal-to-noise
            ratio at 8 bits, and take identities out of kernels that keep less, as `quantize` does; None fuses whatever
            is exact in float.
        equalize: Equalise the channels of neighbouring layers, too (for weights with one step per tensor).
        without: Names of passes to leave out.
        shapes: Sizes of dynamic inputs for the check.
        log: Progress.

    Raises:
        InputError: The model cannot be read.
        UnsupportedError: It is quantized already.
        UsageError: `shapes` does not fit the inputs, or there is no such pass.
    """
    passes.require_known(without)
    loaded = load_float(model)
    specs = model_inputs(loaded)
    batch = bench.fixed_batch(specs) or PROBE_BATCH
    return prepare(
        model,
        loaded,
        lambda: bench.make_feeds(specs, batch, shapes=shapes),
        log,
        passes.rewrites(floor_db, equalize, without),
    )
