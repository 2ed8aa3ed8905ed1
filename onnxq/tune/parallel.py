"""Every layer tuned on its own, from float inputs to float outputs, spread over local processes.

This is the parallel variant of Hubara et al., arXiv 2006.10518: no layer waits for another, at the price that none
makes up for the errors of those in front of it. A walk over blocks, or moments behind this, do that.

The float model runs once per group of layers and writes what goes into and comes out of them to a temporary folder; a
process reads one batch at a time from there. A group is as large as the budget allows, and at least one layer. Layers
with much work come first, so that no process is left alone with a large one at the end. What comes out does not depend
on the number of processes: each works with one thread, and each layer has its own seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed

from onnxq import graph
from onnxq.graph import Layer, Model
from onnxq.plan import Block, room_for_bias
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.job import Job, Method
from onnxq.tune.walk import halves, tune_block
from onnxq.types import Array, BlockResult, Feeds, Log, QuantPlan, Silence, Tuned

DISK_BUDGET = 1 << 32
"""Bytes of activations on disk at a time."""
TOGETHER = 8
"""Tensors that are measured in one run."""
QUIET = SessionConfig(stop_spinning=True)


class StoredFeeds(Sequence[Feeds]):
    """Feeds in files, read when asked for; it pickles as the names of the files.

    Args:
        folder: Where they are.
        stems: Tensor -> how the names of its files begin.
        batches: Number of batches.
    """

    def __init__(self, folder: Path, stems: Mapping[str, str], batches: int) -> None:
        self._folder, self._stems, self._batches = folder, dict(stems), batches

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __getitem__(self, batch: int) -> Feeds:  # type: ignore[override]
        """The feed of one batch."""
        if not 0 <= batch < self._batches:
            raise IndexError(batch)
        files = {name: _file(self._folder, stem, batch) for name, stem in self._stems.items()}
        return {name: np.load(path, allow_pickle=False) for name, path in files.items()}


@dataclass
class Notes(Silence):
    """A log that keeps its notes, for another process."""

    kept: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep it."""
        self.kept.append(text)


@dataclass(frozen=True)
class LayerTask:
    """What a process needs to tune one layer; it pickles without the activations.

    Attributes:
        block: The layer's slice.
        model: File of its float graph.
        tuned: The whole plan; of what was learned, this layer's entry.
        method: What tunes it.
        inputs: Of the float network.
        targets: Outputs of the float network.
        seed: Of everything random.
    """

    block: Block
    model: Path
    tuned: Tuned
    method: Method
    inputs: StoredFeeds
    targets: StoredFeeds
    seed: int


def parallel(
    model: Model,
    tuned: Tuned,
    slices: Sequence[Block],
    method: Method,
    batches: Sequence[Feeds],
    *,
    workers: int,
    seed: int = 0,
    log: Log = Silence(),
    budget: int = DISK_BUDGET,
) -> tuple[Tuned, list[BlockResult]]:
    """Tune layers independently of each other.

    Args:
        model: The prepared float model.
        tuned: What to start from.
        slices: One layer each, see `onnxq.plan.layer_slices`; those that the plan leaves in float are skipped.
        method: Applied to each. It may change the layer's weight grid, codes and bias, and grids of tensors that the
            slice makes; other changes are dropped.
        batches: Calibration rows.
        workers: Number of processes; 1 works in this one.
        seed: Of everything random; each layer gets its own.
        log: Progress, and which layers stay as they are.
        budget: Bytes of activations on disk at a time.

    Returns:
        What was found, and what the method did to each layer, in the order of `slices`.
    """
    seeds = {part.name: seed + index for index, part in enumerate(slices)}
    wanted = [part for part in slices if part.layers[0] in tuned.plan.weights]
    found: dict[str, tuple[Tuned, BlockResult]] = {}
    sizes = _sizes(model, wanted, batches)
    for group in _groups(wanted, sizes, _work(model, wanted, sizes), budget):
        with tempfile.TemporaryDirectory(prefix="onnxq-", ignore_cleanup_errors=True) as folder:
            tasks = list(_tasks(model, tuned, group, method, batches, seeds, Path(folder)))
            runner = Parallel(n_jobs=workers, batch_size=1, pre_dispatch="all", max_nbytes=None, return_as="generator")
            for task, (state, result, notes) in zip(tasks, runner(delayed(tune_layer)(t) for t in tasks), strict=True):
                found[task.block.name] = state, result
                log.step(f"layer {len(found)} of {len(wanted)}: {task.block.name}")
                for note in notes:
                    log.note(note)
    states = [(part, found[part.name][0]) for part in wanted]
    return _merged(model, tuned, states), [found[part.name][1] for part in wanted]


def tune_layer(task: LayerTask) -> tuple[Tuned, BlockResult, list[str]]:
    """Do one task with one thread; returns what was found, what was done, and notes for the log."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        notes = Notes()
        train, held = halves(len(task.inputs))
        model = graph.parse(task.model)
        job = Job(task.block, model, task.inputs, task.inputs, task.targets, train, held, task.seed, notes)
        state, results = tune_block(job, task.tuned, [task.method])
        return state, results[0], notes.kept
    finally:
        torch.set_num_threads(threads)


def _tasks(
    model: Model,
    tuned: Tuned,
    group: Sequence[Block],
    method: Method,
    batches: Sequence[Feeds],
    seeds: Mapping[str, int],
    folder: Path,
) -> Iterator[LayerTask]:
    """Write what the layers of a group need; each tensor once."""
    names = list(dict.fromkeys(name for part in group for name in (*part.inputs, *part.outputs)))
    stems = {name: f"tensor_{index}" for index, name in enumerate(names)}
    session = _session(model, names, batches[0])
    for batch, feeds in enumerate(batches):
        for name, value in _seen(session, names, feeds):
            np.save(_file(folder, stems[name], batch), value, allow_pickle=False)
    for index, part in enumerate(group):
        path = folder / f"layer_{index}.onnx"
        graph.save(graph.sub_model(model, part.inputs, part.outputs), path)
        layers = {name: tuned.layers[name] for name in part.layers if name in tuned.layers}
        inputs, targets = (
            StoredFeeds(folder, {name: stems[name] for name in side}, len(batches))
            for side in (part.inputs, part.outputs)
        )
        yield LayerTask(part, path, Tuned(tuned.plan, layers), method, inputs, targets, seeds[part.name])


def _file(folder: Path, stem: str, batch: int) -> Path:
    return folder / f"{stem}_{batch}.npy"


def _session(model: Model, names: Sequence[str], feeds: Feeds) -> Session | None:
    """For the values that are not fed; None where all are."""
    inner = [name for name in names if name not in feeds]
    return Session(graph.with_outputs(model, inner, keep=False), QUIET) if inner else None


def _seen(session: Session | None, names: Sequence[str], feeds: Feeds) -> Iterator[tuple[str, Array]]:
    """The values called `names` for one batch."""
    yield from ((name, feeds[name]) for name in names if name in feeds)
    if session is not None:
        yield from session.run({spec.name: feeds[spec.name] for spec in session.inputs}).items()


def _sizes(model: Model, slices: Sequence[Block], batches: Sequence[Feeds]) -> dict[str, int]:
    """Bytes of each tensor over all batches, from the first; few are held at a time."""
    names = list(dict.fromkeys(name for part in slices for name in (*part.inputs, *part.outputs)))
    sizes: dict[str, int] = {}
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        session = _session(model, some, batches[0])
        sizes |= {name: value.nbytes * len(batches) for name, value in _seen(session, some, batches[0])}
    return sizes


def _work(model: Model, slices: Sequence[Block], sizes: Mapping[str, int]) -> dict[str, int]:
    """About the number of multiplications of each slice."""
    nodes = graph.node_names(model)
    work: dict[str, int] = {}
    for part in slices:
        layer = graph.layer_of(nodes[part.layers[0]])
        assert isinstance(layer, Layer), layer
        outputs = max((sizes[name] for name in part.outputs), default=0)
        work[part.name] = outputs * layer.weight.size // layer.channels
    return work


def _groups(
    slices: Sequence[Block], sizes: Mapping[str, int], work: Mapping[str, int], budget: int
) -> Iterator[list[Block]]:
    """Slices in the order of their work, as many together as `budget` allows for their tensors."""
    group: list[Block] = []
    held: set[str] = set()
    for part in sorted(slices, key=lambda part: -work[part.name]):
        tensors = {*part.inputs, *part.outputs}
        if group and sum(sizes[name] for name in held | tensors) > budget:
            yield group
            group, held = [], set()
        group.append(part)
        held |= tensors
    if group:
        yield group


def _merged(model: Model, tuned: Tuned, states: Sequence[tuple[Block, Tuned]]) -> Tuned:
    """One plan of all results: every layer's weight, and the grids of the tensors that it makes."""
    nodes = graph.node_names(model)
    tensors, weights, layers = dict(tuned.plan.tensors), dict(tuned.plan.weights), dict(tuned.layers)
    for part, state in states:
        made = [graph.name_of(value) for name in part.nodes for value in nodes[name].outputs]
        tensors |= {name: state.plan.tensors[name] for name in made if name in tensors}
        weights |= {name: state.plan.weights[name] for name in part.layers}
        layers |= {name: state.layers[name] for name in part.layers if name in state.layers}
    return _roomy(nodes, Tuned(replace(tuned.plan, tensors=tensors, weights=weights), layers))


def _roomy(nodes: Mapping[str, graph.Node], tuned: Tuned) -> Tuned:
    """Weight steps that leave room for int32 biases on the input grids as other layers have left them."""
    plan: QuantPlan = tuned.plan
    weights = dict(plan.weights)
    for name, learned in tuned.layers.items():
        layer, grid = graph.layer_of(nodes[name]), weights.get(name)
        if grid is None or learned.bias is None or not isinstance(layer, Layer):
            continue
        bias = learned.bias if grid.axis is not None else np.abs(learned.bias).max(keepdims=True)
        scale = plan.tensors[graph.name_of(layer.data)].scale
        steps = room_for_bias(np.asarray(grid.scales, np.float32), bias, scale)
        weights[name] = replace(grid, scales=tuple(map(float, steps)))
    return Tuned(replace(plan, weights=weights), tuned.layers)
