"""How much error a group of layers adds at some bits, with everything else as the base has it.

Only the part of the network that changes runs: from the first block whose tensors or weights differ, fed with what the
base makes there, to the model's outputs. Before it is measured the group gets its moments back (`onnxq.tune.moments`),
as it will in the final network. The error is how far the model's outputs are from the base's, as noise power over
signal power, mean over the outputs: never below 0, and nearly a sum over groups, as errors that know nothing of each
other add up in power. The divergence of class scores, or the distance to the float network, predict worse: the first
hangs on the few rows between two classes, the second on how the error happens to lie to the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from onnxq import graph
from onnxq.emit import emit
from onnxq.graph import Model
from onnxq.plan import Block
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.job import DecisionSums, ErrorSums, Job, block_error, restrict
from onnxq.tune.moments import TuneMoments
from onnxq.types import Array, Feeds, QuantPlan, Tuned
from onnxq.types.mixed import BASE, Added, Bits

ONE_THREAD = SessionConfig(threads=1, stop_spinning=True)
"""Results do not depend on how many workers share the machine."""


@dataclass(frozen=True)
class Trial:
    """One group of layers at several bits; plain data that other processes can receive. Files are named as a job's are.

    Attributes:
        model: File of the prepared float model.
        cut: Folder with the activations at the cut: `float_<batch>.npz`, `quantized_<batch>.npz`.
        wanted: Folder with the outputs of the base, `quantized_<batch>.npz`.
        batches: Number of batches.
        inputs: Values that the part from the cut on reads.
        middle: Values behind the last block that holds one of the layers.
        outputs: The model's outputs that depend on them; the others are the base's.
        group: Name of the group.
        layers: Its layers.
        plans: Bits -> the plan with these bits for the group, and the base's for the rest.
        tuned: Match the moments of the group before measuring.
    """

    model: str
    cut: str
    wanted: str
    batches: int
    inputs: tuple[str, ...]
    middle: tuple[str, ...]
    outputs: tuple[str, ...]
    group: str
    layers: tuple[str, ...]
    plans: Mapping[Bits, QuantPlan]
    tuned: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that it reads."""
        stems = f"{self.cut}/float_", f"{self.cut}/quantized_", f"{self.wanted}/quantized_"
        return (self.model, *(f"{stem}{batch}.npz" for stem in stems for batch in range(self.batches)))


def output_error(
    model: Model,
    batches: Sequence[Feeds],
    wanted: Sequence[Mapping[str, Array]],
    *,
    simulate: bool = False,
    decisions: bool = False,
) -> float:
    """Noise power over signal power of a quantized model's outputs, mean over the outputs.

    Args:
        model: The quantized model.
        batches: Rows.
        wanted: What it should give for each batch.
        simulate: Run it as written, in float kernels.
        decisions: Compare class scores by what decides, see `DecisionSums`.
    """
    session = Session(model, replace(ONE_THREAD, simulate=simulate))
    errors = DecisionSums() if decisions else ErrorSums()
    for feeds, outputs in zip(batches, wanted, strict=True):
        errors.add(outputs, session.run(feeds))
    return errors.relative()


def measure(trial: Trial, folder: Path) -> dict[Bits, Added]:
    """Errors of a trial at all its bits; at 8 bits none is added, and only the block is looked at.

    Args:
        trial: What is tried.
        folder: Holds its files.
    """
    model = _loaded(folder / trial.model)
    front = graph.sub_model(model, trial.inputs, trial.middle)
    rear = graph.sub_model(model, trial.inputs, trial.outputs)
    floats = _Files(folder / trial.cut, "float_", trial.batches)
    feeds = _Files(folder / trial.cut, "quantized_", trial.batches)
    base = _Files(folder / trial.wanted, "quantized_", trial.batches)
    session = Session(front, ONE_THREAD)
    targets = [session.run(given) for given in floats]
    every = tuple(range(trial.batches))
    block = Block(trial.group, trial.inputs, trial.middle, (), trial.layers, 0)
    job = Job(block, front, feeds, floats, targets, every, every)
    found = {}
    for bits, plan in trial.plans.items():
        tuned = TuneMoments()(job, Tuned(plan)) if trial.tuned else Tuned(plan)
        output = _output_error(rear, tuned, base, feeds) if bits != BASE else 0.0
        found[bits] = Added(output, block_error(job, tuned))
    return found


def _output_error(rear: Model, tuned: Tuned, base: Sequence[Feeds], feeds: Sequence[Feeds]) -> float:
    session = Session(_quantized(rear, tuned), ONE_THREAD)
    errors = ErrorSums()
    for wanted, given in zip(base, feeds, strict=True):
        errors.add(wanted, wanted | session.run(given))
    return errors.relative()


def _quantized(model: Model, tuned: Tuned) -> Model:
    part = restrict(tuned.plan, model)
    return emit(model, part, learned={name: layer for name, layer in tuned.layers.items() if name in part.weights})


@lru_cache(maxsize=2)
def _loaded(path: Path) -> Model:
    return graph.load(path)


class _Files(Sequence[Feeds]):
    """Batches in .npz files."""

    def __init__(self, folder: Path, prefix: str, count: int) -> None:
        self._folder, self._prefix, self._count = folder, prefix, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, batch: int) -> Feeds:  # type: ignore[override]
        if not 0 <= batch < self._count:
            raise IndexError(batch)
        return read_arrays(self._folder / f"{self._prefix}{batch}.npz")


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Arrays by any name, as .npz."""
    named = {f"array_{index}": array for index, array in enumerate(arrays.values())}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, names=np.array(list(arrays), np.str_), **named)


def read_arrays(path: Path) -> Feeds:
    """What `write_arrays` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {str(name): stored[f"array_{index}"] for index, name in enumerate(stored["names"])}
