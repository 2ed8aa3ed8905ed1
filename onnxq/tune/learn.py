"""Gradient descent on one block: the loop that the learned methods share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.errors import UnsupportedError
from onnxq.torch_exec import Slice, extract
from onnxq.tune.job import Job, Rest
from onnxq.tune.losses import Loss, losses_of, squared
from onnxq.tune.soft_block import SoftBlock, as_tensors
from onnxq.types import Tuned

SHIFT_FACTOR = 100
SMALLEST_BIAS = 1e-3


@dataclass(frozen=True)
class Rates:
    """Learning rates at the start; a cosine takes them to zero, but for codes whose quantizer is `steady`.

    The optimizer is Adam, so that a rate is about the largest change per iteration.

    Attributes:
        codes: Of what decides the codes: rounding logits (AdaRound), or changes of weights in steps (AdaQuant).
        steps: Of the logarithm of weight steps.
        grids: Of the logarithm of activation steps; zero points move a hundred times as fast, in codes.
        biases: Of biases, in units of the mean magnitude of their layer's at the start (0.001 where that is less).
        borders: Of the terms of rounding borders.
    """

    codes: float
    steps: float = 1e-3
    grids: float = 1e-3
    biases: float = 1e-3
    borders: float = 5e-3


class Ahead:
    """The float network behind a block, up to the end of its stage: the errors that arrive there count, too.

        total = loss(block) + weight * loss(rest of the stage)

    Nothing in it is learned; what else it reads comes from the float network. Across-block calibration, "RepAPQ", arXiv
    2402.16121.

    Args:
        rest: The blocks behind.
        weight: How much their outputs count; above 0.
        losses: Of each of them.

    Raises:
        UnsupportedError: An operator cannot run in torch.
    """

    def __init__(self, rest: Rest, weight: float, losses: Mapping[str, Loss]) -> None:
        self._rest, self._weight, self._losses = rest, weight, losses
        self._slice: Slice = extract(rest.model, rest.inputs, rest.outputs)

    def to(self, where: torch.device) -> None:
        """Move it."""
        self._slice.to(where)

    def loss(self, batch: int, found: Mapping[str, Tensor], where: torch.device) -> Tensor:
        """Of one batch, for which the block gave `found`; a scalar."""
        feeds = as_tensors(self._rest.floats[batch], where) | dict(found)
        reached = self._slice(feeds)
        return self._weight * _total(reached, as_tensors(self._rest.targets[batch], where), self._losses)


def look_ahead(job: Job, tuned: Tuned, loss: str, *, weight: float, reach: int) -> Ahead | None:
    """What is behind a block in its stage, or None; the log says why where torch cannot run it.

    Args:
        job: The block.
        tuned: Its grids.
        loss: One of `onnxq.tune.losses.LOSSES`.
        weight: How much the errors there count; with 0 nothing is looked at.
        reach: Most blocks behind it.
    """
    rest = job.rest(reach) if weight else None
    if rest is None or not any(value.dtype.kind == "f" for value in rest.targets[job.train[0]].values()):
        return None
    try:
        return Ahead(rest, weight, losses_of(loss, rest.targets[job.train[0]], tuned))
    except UnsupportedError as reason:
        job.log.note(f"block {job.block.name}: the rest of its stage is not looked at: {reason}")
        return None


def learn(
    block: SoftBlock,
    job: Job,
    rates: Rates,
    *,
    iterations: int,
    mix: float = 0.0,
    loss: Loss | Mapping[str, Loss] = squared,
    ahead: Ahead | None = None,
    device: str = "cpu",
) -> None:
    """Fit the block's outputs to the float network's; the loss is the sum over its float outputs.

    The same seed gives the same result on the same machine, and torch's own random numbers stay where they were.

    Args:
        block: Changed in place.
        job: Its data; only training batches are read.
        rates: Learning rates.
        iterations: Steps; each sees one batch.
        mix: Chance that an element of the input comes from the float network (QDrop).
        loss: Of any output, or of each by its name.
        ahead: The network behind the block, whose error counts, too.
        device: Where torch computes.
    """
    where = torch.device(device)
    block.to(where)
    if ahead is not None:
        ahead.to(where)
    losses = loss if isinstance(loss, Mapping) else dict.fromkeys(job.block.outputs, loss)
    groups = _groups(block, rates)
    if not groups or not any(target.dtype.kind == "f" for target in job.targets[job.train[0]].values()):
        return
    block.train()
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(job.seed)
        _descend(block, job, torch.optim.Adam(groups), iterations, mix, losses, ahead, where)
    block.eval()


def _descend(
    block: SoftBlock,
    job: Job,
    optimizer: torch.optim.Optimizer,
    iterations: int,
    mix: float,
    losses: Mapping[str, Loss],
    ahead: Ahead | None,
    where: torch.device,
) -> None:
    starts = [group["lr"] for group in optimizer.param_groups]
    error = Falling()
    for index, batch in enumerate(_order(job.train, iterations, job.seed)):
        progress = index / iterations
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            if not group["steady"]:
                group["lr"] = start * 0.5 * (1 + math.cos(math.pi * progress))
        feeds = as_tensors(job.feeds[batch], where)
        if mix:
            feeds = _mixed(feeds, as_tensors(job.floats[batch], where), mix)
        found = block(feeds)
        total = _total(found, as_tensors(job.targets[batch], where), losses)
        if ahead is not None:
            total = total + ahead.loss(batch, found, where)
        job.log.step(f"{index} of {iterations}, error {error.after(float(total.detach())):.4f}")
        for quantizer in block.quantizers():
            extra = quantizer.penalty(progress)
            total = total if extra is None else total + extra
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        optimizer.step()
        for grid in block.activations():
            grid.limit()


class Falling:
    """The mean of the last values, a few dozen of them."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def after(self, value: float) -> float:
        """The mean with one more value."""
        self._mean = value if self._mean is None else 0.95 * self._mean + 0.05 * value
        return self._mean


def _total(found: Mapping[str, Tensor], targets: Mapping[str, Tensor], losses: Mapping[str, Loss]) -> Tensor:
    parts = [losses[name](found[name], target) for name, target in targets.items() if target.is_floating_point()]
    return torch.stack(parts).sum()


def _mixed(feeds: dict[str, Tensor], floats: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {
        name: torch.where(torch.rand_like(value) < share, floats[name], value) if value.is_floating_point() else value
        for name, value in feeds.items()
    }


def _order(batches: Sequence[int], count: int, seed: int) -> Iterator[int]:
    """`count` batches, in random order, none twice before all were seen."""
    rng = np.random.default_rng(seed)
    left = count
    while left > 0:
        for batch in rng.permutation(np.asarray(batches))[:left]:
            yield int(batch)
        left -= len(batches)


def _groups(block: SoftBlock, rates: Rates) -> list[dict[str, object]]:
    codes: list[Tensor] = []
    steps = [weight.log_steps for weight in block.quantizers() if weight.log_steps.requires_grad]
    for quantizer in block.quantizers():
        named = quantizer.named_parameters()
        codes += [one for name, one in named if one.requires_grad and name != "log_steps"]
    grids = [grid.log_step for grid in block.activations() if grid.log_step.requires_grad]
    shifts = [grid.shift for grid in block.activations() if grid.shift.requires_grad]
    borders = [grid.border.terms for grid in block.activations() if grid.border is not None]
    steady = any(quantizer.steady for quantizer in block.quantizers())
    groups: list[dict[str, object]] = [
        {"params": codes, "lr": rates.codes, "steady": steady},
        {"params": steps, "lr": rates.steps},
        {"params": grids, "lr": rates.grids},
        {"params": shifts, "lr": rates.grids * SHIFT_FACTOR},
        {"params": [terms for terms in borders if terms.requires_grad], "lr": rates.borders},
    ]
    for bias in block.biases.values():
        size = max(float(bias.detach().abs().mean()), SMALLEST_BIAS)
        groups.append({"params": [bias], "lr": rates.biases * size})
    return [{"steady": False, **group} for group in groups if group["params"]]
