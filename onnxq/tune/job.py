"""One block to be tuned: its float graph, what goes in, and what should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit import emit
from onnxq.graph import Model
from onnxq.plan import Block
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Array, Feeds, Log, QuantPlan, Silence, Tuned


@dataclass(frozen=True)
class Rest:
    """The float network behind a block, up to the end of the block's stage.

    Attributes:
        model: Its graph.
        inputs: What it reads: outputs of the block, and what blocks in front of that make.
        outputs: Of its last block.
        floats: All of `inputs` as the float network makes them.
        targets: The same of `outputs`.
    """

    model: Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    floats: Sequence[Feeds]
    targets: Sequence[Feeds]


def nothing(reach: int) -> Rest | None:
    """No blocks behind are known, however far one wants to look."""
    return None


@dataclass(frozen=True)
class Job:
    """One block to be tuned.

    Attributes:
        block: Its names.
        model: Its float graph: the block's inputs in, its outputs out.
        feeds: Inputs as the quantized network makes them, one feed per batch.
        floats: Inputs as the float network makes them.
        targets: Outputs of the float network.
        train: Batches to learn from.
        held: Batches that judge.
        seed: Of everything random.
        log: Progress.
        rest: Gives what is behind the block in its stage, at most so many blocks; None where nothing there reads what
            the block makes. Computed when asked for.
    """

    block: Block
    model: Model
    feeds: Sequence[Feeds]
    floats: Sequence[Feeds]
    targets: Sequence[Feeds]
    train: tuple[int, ...]
    held: tuple[int, ...]
    seed: int = 0
    log: Log = Silence()
    rest: Callable[[int], Rest | None] = nothing


class Method(Protocol):
    """Finds better grids, codes or biases for a block. Implementations are frozen dataclasses of hyper-parameters."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    @property
    def judged(self) -> bool:
        """Whether the result is dropped where it makes the block's outputs worse on the held batches."""
        ...

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with the entries of the block's layers and tensors replaced.

        Raises:
            UnsupportedError: The method cannot work on this block.
        """
        ...


def restrict(plan: QuantPlan, model: Model) -> QuantPlan:
    """The part of a plan that concerns a sub-model."""
    nodes, values = graph.node_names(model), graph.value_map(model)
    inputs = {graph.name_of(value) for value in model.graph.inputs}
    return replace(
        plan,
        tensors={name: grid for name, grid in plan.tensors.items() if name in values},
        weights={name: grid for name, grid in plan.weights.items() if name in nodes},
        integer=tuple(name for name in plan.integer if name in nodes),
        skipped={},
        guards=tuple(name for name in plan.guards if name in values and name not in inputs),
        sums=tuple(name for name in plan.sums if name in nodes),
        constants={name: grid for name, grid in plan.constants.items() if name in values},
        tables=tuple(name for name in plan.tables if name in nodes),
        borders={name: border for name, border in plan.borders.items() if name in values and name not in inputs},
        log_softmax={name: grid for name, grid in plan.log_softmax.items() if name in nodes},
        blocks={name: grid for name, grid in plan.blocks.items() if name in nodes},
        half=tuple(name for name in plan.half if name in nodes),
        dynamic=tuple(name for name in plan.dynamic if name in values),
    )


def quantized(job: Job, tuned: Tuned) -> Model:
    """The block's QDQ graph."""
    part = restrict(tuned.plan, job.model)
    layers = {name: layer for name, layer in tuned.layers.items() if name in part.weights}
    return emit(job.model, part, learned=layers)


def block_error(job: Job, tuned: Tuned, batches: Sequence[int] | None = None) -> float:
    """Error of the quantized block's outputs: noise power over signal power, mean over the outputs.

    The block gets the inputs of the quantized network, and runs in the kernels that users will run.

    Args:
        job: The block.
        tuned: What to judge.
        batches: Which batches; the held ones by default.
    """
    session = Session(quantized(job, tuned), SessionConfig(stop_spinning=True))
    sums = ErrorSums()
    for batch in batches if batches is not None else job.held:
        sums.add(job.targets[batch], session.run(job.feeds[batch]))
    return sums.relative()


class ErrorSums:
    """Running sums of noise and signal power, per output."""

    def __init__(self) -> None:
        self._noise: dict[str, float] = {}
        self._power: dict[str, float] = {}

    def add(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Count one batch of outputs; what is infinite or NaN in `expected` is left out, what became so is lost."""
        for name, target in expected.items():
            if target.dtype.kind != "f" or target.shape != found[name].shape:  # what a detector finds
                continue
            usable = np.isfinite(target)
            wanted, given = target[usable].astype(np.float64), found[name][usable].astype(np.float64)
            noise = np.square(np.where(np.isfinite(given), given, 0.0) - wanted).sum()
            self._noise[name] = self._noise.get(name, 0.0) + float(noise)
            self._power[name] = self._power.get(name, 0.0) + float(np.square(wanted).sum())

    def relative(self) -> float:
        """Noise over signal, mean over the outputs."""
        shares = [self._noise[name] / max(power, 1e-30) for name, power in self._power.items()]
        return float(np.mean(shares)) if shares else 0.0


class DecisionSums(ErrorSums):
    """The same for whole networks, whose class scores are compared by what decides.

    Of an output [rows, classes], what all classes of a row share is taken off, and noise is what is left at the gain
    that fits best: with the sums over all rows of the centred scores y of the float network and q of the other one,

        noise = min over g of |y - g q|^2 = |y|^2 - (y q)^2 / |q|^2

    With few bits scores shrink, all alike; that changes no order, but can be most of the plain noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scores: dict[str, npt.NDArray[np.float64]] = {}

    def add(self, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Count one batch of outputs."""
        others = {}
        for name, target in expected.items():
            if (
                target.ndim == 2
                and target.shape[1] > 1
                and target.shape == found[name].shape
                and np.isfinite(target).all()
                and np.isfinite(found[name]).all()
            ):
                y, q = (x - x.mean(axis=1, keepdims=True) for x in (target.astype(np.float64), found[name]))
                products = np.array([np.vdot(y, y), np.vdot(y, q), np.vdot(q, q)])
                self._scores[name] = self._scores.get(name, 0.0) + products
            else:
                others[name] = target
        super().add(others, found)

    def relative(self) -> float:
        """Noise over signal, mean over the outputs."""
        shares = [1 - max(yq, 0.0) ** 2 / max(yy * qq, 1e-300) for yy, yq, qq in self._scores.values()]
        plain = [super().relative()] * len(self._power)
        return float(np.mean([*shares, *plain])) if shares or plain else 0.0
