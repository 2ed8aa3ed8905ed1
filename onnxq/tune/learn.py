"""Gradient descent on one block: the loop that the learned methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.tune.job import Job
from onnxq.tune.soft_block import SoftBlock, as_tensors

Loss = Callable[[Tensor, Tensor], Tensor]

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
    """

    codes: float
    steps: float = 1e-3
    grids: float = 1e-3
    biases: float = 1e-3


def squared(found: Tensor, target: Tensor) -> Tensor:
    """Noise power over signal power."""
    return torch.mean((found - target) ** 2) / torch.mean(target**2).clamp_min(1e-12)


def learn(
    block: SoftBlock,
    job: Job,
    rates: Rates,
    *,
    iterations: int,
    mix: float = 0.0,
    loss: Loss = squared,
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
        loss: Of one output.
        device: Where torch computes.
    """
    where = torch.device(device)
    block.to(where)
    groups = _groups(block, rates)
    if not groups or not any(target.dtype.kind == "f" for target in job.targets[job.train[0]].values()):
        return
    block.train()
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(job.seed)
        _descend(block, job, torch.optim.Adam(groups), iterations, mix, loss, where)
    block.eval()


def _descend(
    block: SoftBlock,
    job: Job,
    optimizer: torch.optim.Optimizer,
    iterations: int,
    mix: float,
    loss: Loss,
    where: torch.device,
) -> None:
    starts = [group["lr"] for group in optimizer.param_groups]
    for index, batch in enumerate(_order(job.train, iterations, job.seed)):
        progress = index / iterations
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            if not group["steady"]:
                group["lr"] = start * 0.5 * (1 + math.cos(math.pi * progress))
        feeds = as_tensors(job.feeds[batch], where)
        if mix:
            feeds = _mixed(feeds, as_tensors(job.floats[batch], where), mix)
        total = _total(block(feeds), as_tensors(job.targets[batch], where), loss)
        for quantizer in block.quantizers():
            extra = quantizer.penalty(progress)
            total = total if extra is None else total + extra
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        optimizer.step()
        for grid in block.activations():
            grid.limit()


def _total(found: Mapping[str, Tensor], targets: Mapping[str, Tensor], loss: Loss) -> Tensor:
    losses = [loss(found[name], target) for name, target in targets.items() if target.is_floating_point()]
    return torch.stack(losses).sum()


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
    steps: list[Tensor] = []
    for quantizer in block.quantizers():
        for name, parameter in quantizer.named_parameters():
            if parameter.requires_grad:
                (steps if name == "log_steps" else codes).append(parameter)
    grids = [grid.log_step for grid in block.activations() if grid.log_step.requires_grad]
    shifts = [grid.shift for grid in block.activations() if grid.shift.requires_grad]
    steady = any(quantizer.steady for quantizer in block.quantizers())
    groups: list[dict[str, object]] = [
        {"params": codes, "lr": rates.codes, "steady": steady},
        {"params": steps, "lr": rates.steps},
        {"params": grids, "lr": rates.grids},
        {"params": shifts, "lr": rates.grids * SHIFT_FACTOR},
    ]
    for bias in block.biases.values():
        size = max(float(bias.detach().abs().mean()), SMALLEST_BIAS)
        groups.append({"params": [bias], "lr": rates.biases * size})
    return [{"steady": False, **group} for group in groups if group["params"]]
