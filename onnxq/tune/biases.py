"""Bias tuning: the biases of all layers, learned together on the outputs of the whole model, after everything else.

    min over b :  KL(softmax(f(x)) || softmax(f_q(x; b)))

for outputs [rows, classes], and noise over signal for all others. Codes, steps and grids stay. What a block-wise
method cannot see, how the errors of all blocks add up at the outputs, is what this takes back. It costs a pass of the
whole model forth and back per iteration; no labels are needed.

I. Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", arXiv
2006.10518, section 3.4, here with Adam, rates relative to each layer's biases, and rows kept back that judge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.graph import Model
from onnxq.plan import Block
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.cache import BUDGET_BYTES, Cache, View
from onnxq.tune.job import Job
from onnxq.tune.learn import Rates, learn
from onnxq.tune.losses import squared
from onnxq.tune.soft_block import SoftBlock, learned_codes, require_agreement
from onnxq.tune.walk import halves
from onnxq.types import Feeds, LearnedLayer, Log, Silence, Tuned

QUIET = SessionConfig(stop_spinning=True)
MAX_CLASSES = 100_000
FLOOR = 1e-4
"""Smallest probability that a quantized softmax is taken to mean: a code of 0 is none in particular."""
AGREEMENT = 0.25
"""Noise between torch and onnxruntime, over the quantization's: 6 dB below it. Over a whole model, ties that fall
differently add up to more than in a block."""


def tune_biases(
    model: Model,
    tuned: Tuned,
    batches: Sequence[Feeds],
    *,
    iterations: int = 150,
    rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    log: Log = Silence(),
    budget: int = BUDGET_BYTES,
) -> Tuned:
    """Learn all biases on the model's outputs, and keep them if the emitted model gets nearer to the float one.

    Args:
        model: The prepared float model.
        tuned: Codes and grids, which stay, and the biases to start from.
        batches: Calibration rows; each iteration sees one batch, and the batches that `halves` keeps back judge.
        iterations: Steps.
        rate: Change of a bias per step at the start, over the mean magnitude of its layer's.
        seed: Of the order of the batches.
        device: Where torch computes.
        log: Is told why biases stay as they are.
        budget: Bytes of float outputs held in memory; the rest goes to disk.

    Returns:
        `tuned` with other biases, or itself where that does not help on the batches kept back, or where torch cannot
        run the model or computes it otherwise than onnxruntime.
    """
    train, held = halves(len(batches))
    block = _whole(model, batches[0])
    with Cache(budget) as cache:
        session = Session(model, QUIET)
        for batch, feeds in enumerate(batches):
            for name, value in session.run({name: feeds[name] for name in block.inputs}).items():
                cache.put(name, batch, value)
        targets = View(cache, {name: name for name in block.outputs}, len(batches))
        job = Job(block, model, batches, batches, targets, train, held, seed, log)
        try:
            require_agreement(job, tuned, tolerance=AGREEMENT)
        except UnsupportedError as reason:
            log.note(f"biases stay as they are: {reason}")
            return tuned
        soft = SoftBlock(job, tuned, learned_codes(tuned), learn_grids=False)
        learn(soft, job, Rates(codes=0.0, biases=rate), iterations=iterations, loss=distance, device=device)
        found = _with_biases(tuned, soft.found(tuned))
        if found is None or not _error(job, found) < _error(job, tuned):
            log.note("biases stay as they are: tuning them does not help this model")
            return tuned
        return found


def distance(found: Tensor, target: Tensor) -> Tensor:
    """How far a float output is from the float model's.

    Args:
        found: Of the quantized model.
        target: Of the float model, same shape.

    Returns:
        A scalar. The mean over the rows of KL(target || found) in nats where the output is [rows, classes]: of their
        softmax, or of themselves where each row of `target` is a distribution already (then with sum(found) -
        sum(target) added, as a rounded distribution does not add up to 1). Noise power over signal power for others.
    """
    if target.ndim != 2 or not 2 <= target.shape[1] <= MAX_CLASSES:
        return squared(found, target)
    if bool((target >= 0).all()) and bool(((target.sum(dim=1) - 1).abs() < 1e-3).all()):
        expected, given = target.clamp_min(FLOOR), found.clamp_min(FLOOR)
        return (expected * (expected.log() - given.log()) + given - expected).sum(dim=1).mean()
    return torch.nn.functional.kl_div(
        torch.log_softmax(found, dim=1), torch.log_softmax(target, dim=1), reduction="batchmean", log_target=True
    )


def _whole(model: Model, feeds: Feeds) -> Block:
    """The model as one block."""
    inputs = tuple(graph.name_of(value) for value in model.graph.inputs if value.name in feeds)
    outputs = tuple(graph.name_of(value) for value in model.graph.outputs)
    return Block("model", inputs, outputs, tuple(graph.node_names(model)), (), 0)


def _with_biases(tuned: Tuned, learned: Tuned) -> Tuned | None:
    """`tuned` with the biases of `learned`; None where one is not finite."""
    layers = dict(tuned.layers)
    for name, layer in learned.layers.items():
        if layer.bias is None:
            continue
        if not np.isfinite(layer.bias).all():
            return None
        layers[name] = LearnedLayer(layer.codes, layer.bias)
    return Tuned(tuned.plan, layers)


@torch.no_grad()
def _error(job: Job, tuned: Tuned) -> float:
    """The loss of the emitted model, in the kernels that users will run, on the batches that judge."""
    session = Session(emit(job.model, tuned.plan, learned=tuned.layers), QUIET)
    total = 0.0
    for batch in job.held:
        found = session.run({name: job.feeds[batch][name] for name in job.block.inputs})
        for name, target in job.targets[batch].items():
            if target.dtype.kind == "f":
                total += float(distance(torch.tensor(found[name]), torch.tensor(target)))
    return total / len(job.held)
