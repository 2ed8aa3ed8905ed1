"""Every layer tuned on its own, from float inputs to float outputs, spread over processes or a cluster.

This is the parallel variant of Hubara et al., arXiv 2006.10518: no layer waits for another, at the price that none
makes up for the errors of those in front of it. A walk over blocks, or moments behind this, do that.

The float model runs once per group of layers and writes what goes into and comes out of them to a temporary folder; a
process reads one batch at a time from there (`onnxq.jobs` sends the files along where the worker is another machine). A
group is as large as the budget allows, and at least one layer. Layers with much work come first, so that no process is
left alone with a large one at the end. What comes out does not depend on the number of processes, nor on where they
are: each works with one thread, and each layer has its own seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from onnxq import graph
from onnxq.graph import Layer, Model
from onnxq.jobs import Backend, Task, results
from onnxq.plan import Block, room_for_bias
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.job import Job, Method
from onnxq.tune.walk import halves, tune_block
from onnxq.types import Array, BlockResult, Feeds, Log, QuantPlan, Silence, Tuned, TunedLayer

DISK_BUDGET = 1 << 32
"""Bytes of activations on disk at a time."""
TOGETHER = 8
"""Tensors that are measured in one run."""
QUIET = SessionConfig(stop_spinning=True)


class StoredFeeds(Sequence[Feeds]):
    """Feeds in files, read when asked for.

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
        files = {name: self._folder / _file(stem, batch) for name, stem in self._stems.items()}
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
    """What a worker needs to tune one layer, besides the files.

    Attributes:
        block: The layer's slice.
        model: Name of the file of its float graph.
        tuned: The whole plan; of what was learned, this layer's entry.
        method: What tunes it.
        inputs: Of the float network: tensor -> how the names of its files begin.
        targets: Outputs of the float network, likewise.
        batches: Number of batches.
        seed: Of everything random.
    """

    block: Block
    model: str
    tuned: Tuned
    method: Method
    inputs: Mapping[str, str]
    targets: Mapping[str, str]
    batches: int
    seed: int


def parallel(
    model: Model,
    tuned: Tuned,
    slices: Sequence[Block],
    method: Method,
    batches: Sequence[Feeds],
    *,
    backend: Backend,
    seed: int = 0,
    log: Log = Silence(),
    budget: int = DISK_BUDGET,
    known: Mapping[str, TunedLayer] | None = None,
    after: Callable[[TunedLayer], None] | None = None,
) -> tuple[Tuned, list[BlockResult]]:
    """Tune layers independently of each other.

    Args:
        model: The prepared float model.
        tuned: What to start from.
        slices: One layer each, see `onnxq.plan.layer_slices`; those that the plan leaves in float are skipped.
        method: Applied to each. It may change the layer's weight grid, codes and bias, and grids and borders of tensors
            that the slice makes; other changes are dropped.
        batches: Calibration rows.
        backend: Where the jobs run, see `onnxq.jobs.open_backend`.
        seed: Of everything random; each layer gets its own.
        log: Progress, and which layers stay as they are.
        budget: Bytes of activations on disk at a time.
        known: Slices that an earlier run has done, by name; they are not done again.
        after: Called with every other one as soon as it is done.

    Returns:
        What was found, and what the method did to each layer, in the order of `slices`.

    Raises:
        EnvironmentFault: The backend is gone, or the worker of one layer died every time.
    """
    seeds = {part.name: seed + index for index, part in enumerate(slices)}
    wanted = [part for part in slices if part.layers[0] in tuned.plan.weights]
    found = {part.name: known[part.name] for part in wanted if known is not None and part.name in known}
    missing = [part for part in wanted if part.name not in found]
    sizes = _sizes(model, missing, batches)
    for group in _groups(missing, sizes, _work(model, missing, sizes), budget):
        with tempfile.TemporaryDirectory(prefix="onnxq-", ignore_cleanup_errors=True) as folder:
            tasks = list(_tasks(model, tuned, group, method, batches, seeds, Path(folder)))
            for task, layer in results(backend, tune_layer, tasks):
                found[layer.block] = layer
                if after is not None:
                    after(layer)
                log.step(f"layer {len(found)} of {len(wanted)}: {task.name}")
                for note in layer.notes:
                    log.note(note)
    layers = [found[part.name] for part in wanted]
    return _merged(model, tuned, layers), [layer.result for layer in layers]


def tune_layer(task: LayerTask, folder: Path) -> TunedLayer:
    """Do one task with one thread, from files in `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        notes = Notes()
        train, held = halves(task.batches)
        model = graph.parse(folder / task.model)
        inputs, targets = (StoredFeeds(folder, stems, task.batches) for stems in (task.inputs, task.targets))
        job = Job(task.block, model, inputs, inputs, targets, train, held, task.seed, notes)
        state, (result, *_) = tune_block(job, task.tuned, [task.method])
        return _changes(task.block, model, state, result, notes.kept)
    finally:
        torch.set_num_threads(threads)


def _changes(part: Block, model: Model, state: Tuned, result: BlockResult, notes: Sequence[str]) -> TunedLayer:
    """What a layer may change: its weight, and the grids and rounding borders of the tensors that its slice makes."""
    made = [graph.name_of(value) for node in model.graph for value in node.outputs]
    return TunedLayer(
        part.name,
        {name: state.plan.tensors[name] for name in made if name in state.plan.tensors},
        {name: state.plan.weights[name] for name in part.layers},
        {name: state.layers[name] for name in part.layers if name in state.layers},
        result,
        tuple(notes),
        {name: state.plan.borders[name] for name in made if name in state.plan.borders},
    )


def _tasks(
    model: Model,
    tuned: Tuned,
    group: Sequence[Block],
    method: Method,
    batches: Sequence[Feeds],
    seeds: Mapping[str, int],
    folder: Path,
) -> Iterator[Task[LayerTask]]:
    """Write what the layers of a group need; each tensor once."""
    names = list(dict.fromkeys(name for part in group for name in (*part.inputs, *part.outputs)))
    stems = {name: f"tensor_{index}" for index, name in enumerate(names)}
    session = _session(model, names, batches[0])
    for batch, feeds in enumerate(batches):
        for name, value in _seen(session, names, feeds):
            np.save(folder / _file(stems[name], batch), value, allow_pickle=False)
    for index, part in enumerate(group):
        path = f"layer_{index}.onnx"
        graph.save(graph.sub_model(model, part.inputs, part.outputs), folder / path)
        layers = {name: tuned.layers[name] for name in part.layers if name in tuned.layers}
        inputs, targets = ({name: stems[name] for name in side} for side in (part.inputs, part.outputs))
        argument = LayerTask(
            part, path, Tuned(tuned.plan, layers), method, inputs, targets, len(batches), seeds[part.name]
        )
        used = dict.fromkeys((*inputs.values(), *targets.values()))
        files = [path, *(_file(stem, batch) for stem in used for batch in range(len(batches)))]
        yield Task(part.name, argument, folder, tuple(files))


def _file(stem: str, batch: int) -> str:
    return f"{stem}_{batch}.npy"


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


def _merged(model: Model, tuned: Tuned, found: Sequence[TunedLayer]) -> Tuned:
    """One plan of all results."""
    tensors, weights, layers = dict(tuned.plan.tensors), dict(tuned.plan.weights), dict(tuned.layers)
    borders = dict(tuned.plan.borders)
    for layer in found:
        tensors |= layer.tensors
        weights |= layer.weights
        layers |= layer.learned
        borders |= layer.borders
    plan = replace(tuned.plan, tensors=tensors, weights=weights, borders=borders)
    return _roomy(graph.node_names(model), Tuned(plan, layers))


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
