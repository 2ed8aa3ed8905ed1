"""Fine-tuning by self-distillation: the model as it came teaches the one whose weights get narrower. No labels.

    loss = sum over outputs of D(output, original's) + R2

with rel(y, t) = mean (y - t)^2 / mean t^2, and D = KL(softmax t || softmax y) + rel(y, t) where an output looks like
class scores, else rel. Inputs are mixed in pairs, x = u x_i + (1 - u) x_j with u uniform in [0, 1]: the original
answers any input, so that a few hundred rows teach more than their own outputs.

Rates are small and steps many: where nothing is wrong yet, gradients are noise, and the walk of Adam's equal steps
through it costs the outputs the square of its rate, while what the range loss moves is the rate times the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxq.train.imported import Imported
from onnxq.train.r2 import Kind, R2Loss
from onnxq.types import Feeds, Log, Silence

MAX_CLASSES = 100_000
SMALLEST = 1e-12


@dataclass(frozen=True)
class Distillation:
    """How `distill` trains.

    Attributes:
        kind: The range loss, see `onnxq.train.R2Loss`.
        strength: Of the range loss.
        per_channel: One range per output channel.
        iterations: Steps; each sees one batch.
        rate: Learning rate of Adam, in units of each weight's root mean square; a cosine takes it to zero.
        mix: Mix rows in pairs where all inputs are floats.
        seed: Of everything random.
        device: Where torch computes.
    """

    kind: Kind = "margin"
    strength: float = 0.1
    per_channel: bool = True
    iterations: int = 600
    rate: float = 2e-3
    mix: bool = True
    seed: int = 0
    device: str = "cpu"


def distill(
    student: Imported, batches: Sequence[Feeds], settings: Distillation = Distillation(), log: Log = Silence()
) -> list[tuple[float, float]]:
    """Train `student` towards its own original outputs with a range loss; it ends on the CPU.

    The same seed gives the same result on the same machine, and torch's own random numbers stay where they were.

    Args:
        student: Changed in place.
        batches: Inputs.
        settings: How to train.
        log: Progress, with the losses.

    Returns:
        Per iteration, the distillation loss and the range loss.
    """
    where = torch.device(settings.device)
    student.to(where)
    range_loss = R2Loss(
        student, settings.kind, strength=settings.strength, per_channel=settings.per_channel, normalise=True
    )
    groups = [
        {"params": [value], "lr": settings.rate * max(float(value.detach().square().mean().sqrt()), 1e-6)}
        for value in student.parameters()
    ]
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        trace = _descend(student, range_loss, torch.optim.Adam(groups), batches, settings, where, log)
    student.to("cpu")
    return trace


def _descend(
    student: Imported,
    range_loss: R2Loss,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Feeds],
    settings: Distillation,
    where: torch.device,
    log: Log,
) -> list[tuple[float, float]]:
    starts = [group["lr"] for group in optimizer.param_groups]
    trace = []
    for index, batch in enumerate(_order(len(batches), settings.iterations, settings.seed)):
        decay = 0.5 * (1 + math.cos(math.pi * index / settings.iterations))
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = start * decay
        feeds = {name: torch.tensor(value, device=where) for name, value in batches[batch].items()}
        feeds = mixed(feeds) if settings.mix else feeds
        task = distance(student(feeds), student.original(feeds))
        narrow = range_loss()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(task + narrow)
        optimizer.step()
        trace.append((float(task.detach()), float(narrow.detach())))
        log.step(f"{index + 1} of {settings.iterations}, loss {trace[-1][0]:.4f} + {trace[-1][1]:.4f}")
    return trace


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """The sum of D over the float outputs, a scalar; see the module's docstring."""
    parts = [_output_distance(found[name], value) for name, value in wanted.items() if value.is_floating_point()]
    return torch.stack(parts).sum()


def _output_distance(found: Tensor, wanted: Tensor) -> Tensor:
    near = _relative(found, wanted)
    if wanted.ndim != 2 or not 2 <= wanted.shape[1] <= MAX_CLASSES:
        return near
    if _are_shares(wanted):
        theirs, ours = wanted.clamp_min(SMALLEST).log(), found.clamp_min(SMALLEST).log()
    else:
        theirs, ours = torch.log_softmax(wanted, 1), torch.log_softmax(found, 1)
    return near + torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _are_shares(values: Tensor) -> bool:
    """Whether rows are probabilities already."""
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-3).all())


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    relative: Tensor = torch.mean((found - wanted) ** 2) / torch.mean(wanted**2).clamp_min(SMALLEST)
    return relative


def mixed(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every row mixed with another of its batch in a random proportion; as it is where an input is no float."""
    values = list(feeds.values())
    rows = values[0].shape[0] if values and values[0].ndim else 0
    if rows < 2 or any(not value.is_floating_point() or value.shape[:1] != (rows,) for value in values):
        return dict(feeds)
    device = values[0].device
    partner, share = torch.randperm(rows, device=device), torch.rand(rows, device=device)
    return {name: torch.lerp(value, value[partner], _along(share, value)) for name, value in feeds.items()}


def _along(share: Tensor, value: Tensor) -> Tensor:
    return share.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))


def _order(count: int, iterations: int, seed: int) -> Iterator[int]:
    """`iterations` numbers below `count` in random order, none twice before all were there."""
    rng = np.random.default_rng(seed)
    for start in range(0, iterations, count):
        yield from (int(index) for index in rng.permutation(count)[: iterations - start])
