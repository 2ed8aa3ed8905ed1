"""The walk behind `sensitivities`: both networks from cut to cut, and at every cut what is to be tried there.

The activations at a cut go to files, which other processes read; they are removed as soon as the last trial of the cut
is done.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxq import graph
from onnxq.emit import emit
from onnxq.graph import Model
from onnxq.jobs import Task
from onnxq.pipeline.calibrated import Calibrated
from onnxq.plan import Block, find_blocks
from onnxq.runtime import Session, SessionConfig
from onnxq.tune.cache import Cache, View
from onnxq.tune.job import ErrorSums, restrict
from onnxq.tune.sensitivity import Trial, write_arrays
from onnxq.types import Feeds, QuantPlan
from onnxq.types.mixed import Bits

QUIET = SessionConfig(stop_spinning=True)
KINDS = ("float", "quantized")
MODEL = "model.onnx"


@dataclass(frozen=True)
class Span:
    """The blocks from the first where a group changes anything to the last that holds one of its layers."""

    group: str
    start: int
    end: int
    plans: Mapping[Bits, QuantPlan]


class Walk:
    """Hands out the trials of all groups.

    Args:
        found: The calibrated model.
        wanted: Group -> bits -> plan.
        batches: Calibration rows.
        folder: For files; an empty one.
        tuned: Match the moments of each group before it is measured.

    Attributes:
        base_error: Error at the outputs with all layers at 8 bits.
    """

    def __init__(
        self,
        found: Calibrated,
        wanted: Mapping[str, Mapping[Bits, QuantPlan]],
        batches: Sequence[Feeds],
        folder: Path,
        *,
        tuned: bool,
    ) -> None:
        self._found, self._batches, self._tuned, self._folder = found, batches, tuned, folder
        shaped = found.model.clone()
        graph.infer_shapes(shaped)
        self._blocks = find_blocks(shaped)
        self._outputs = [graph.name_of(value) for value in found.model.graph.outputs]
        graph.save(found.model, folder / MODEL)
        self.base_error = self._write_outputs()
        self._spans = sorted(
            (self._span(group, plans) for group, plans in wanted.items() if plans), key=lambda pair: pair[0]
        )
        self._left = Counter(span.start for _, span in self._spans)

    def _write_outputs(self) -> float:
        base = emit(self._found.model, self._found.base)
        sessions = Session(self._found.model, QUIET), Session(base, QUIET)
        self._cut(None).mkdir()
        errors = ErrorSums()
        for batch, feeds in enumerate(self._batches):
            wanted, found = (session.run(feeds) for session in sessions)
            write_arrays(self._cut(None) / f"quantized_{batch}.npz", found)
            errors.add(wanted, found)
        return errors.relative()

    def _span(self, group: str, plans: Mapping[Bits, QuantPlan]) -> tuple[int, Span]:
        home = {node: index for index, block in enumerate(self._blocks) for node in block.nodes}
        values, base = graph.value_map(self._found.model), self._found.base.tensors
        layers = [home[layer] for layer in self._found.groups[group]]
        changed = {name for plan in plans.values() for name, grid in plan.tensors.items() if grid != base[name]}
        makers = [values[name].producer() for name in changed]
        starts = [home[str(maker.name)] for maker in makers if maker is not None]
        span = Span(group, min(layers + starts), max(layers), plans)
        return span.start, span

    def trials(self) -> Iterator[Task[Trial]]:
        """All trials, cut after cut; the files of a cut are written when its first trial is asked for.

        The first ones have most of the network behind them, so they are the longest.
        """
        last = {name: index for index, block in enumerate(self._blocks) for name in block.inputs}
        at = 0
        with Cache() as cache:
            for batch, feeds in enumerate(self._batches):
                for name in feeds.keys() & last.keys():
                    for kind in KINDS:
                        cache.put(f"{kind}:{name}", batch, feeds[name])
            for start, span in self._spans:
                while at < start:
                    self._advance(cache, self._blocks[at])
                    self._forget(cache, last, at)
                    at += 1
                if not self._cut(start).exists():
                    self._write_cut(cache, start)
                trial = self._trial(span)
                yield Task(trial.group, trial, self._folder, trial.files)

    def release(self, trial: Trial) -> None:
        """A trial is done: remove the files of its cut if it was the last one there."""
        start = int(trial.cut.removeprefix("cut_"))
        self._left[start] -= 1
        if not self._left[start]:
            shutil.rmtree(self._cut(start))

    def _trial(self, span: Span) -> Trial:
        inside, behind = self._blocks[span.start : span.end + 1], self._blocks[span.end + 1 :]
        later = {name for block in behind for name in block.inputs}.union(self._outputs)
        changing = {name for block in (*inside, *behind) for name in block.outputs}
        return Trial(
            model=MODEL,
            cut=self._cut(span.start).name,
            wanted=self._cut(None).name,
            batches=len(self._batches),
            inputs=self._inputs(span.start),
            middle=tuple(name for block in inside for name in block.outputs if name in later),
            outputs=tuple(name for name in self._outputs if name in changing),
            group=span.group,
            layers=self._found.groups[span.group],
            plans=span.plans,
            tuned=self._tuned,
        )

    def _cut(self, start: int | None) -> Path:
        """Folder of the activations in front of a block; of the model's outputs for None."""
        return self._folder / ("outputs" if start is None else f"cut_{start}")

    def _inputs(self, start: int) -> tuple[str, ...]:
        """Values that the blocks from here on read and do not make."""
        made = {name for block in self._blocks[start:] for name in block.outputs}
        read = dict.fromkeys(name for block in self._blocks[start:] for name in block.inputs)
        return tuple(name for name in read if name not in made)

    def _view(self, cache: Cache, kind: str, names: Sequence[str]) -> View:
        return View(cache, {name: f"{kind}:{name}" for name in names}, len(self._batches))

    def _write_cut(self, cache: Cache, start: int) -> None:
        self._cut(start).mkdir()
        for kind in KINDS:
            for batch, arrays in enumerate(self._view(cache, kind, self._inputs(start))):
                write_arrays(self._cut(start) / f"{kind}_{batch}.npz", arrays)

    def _advance(self, cache: Cache, block: Block) -> None:
        part = graph.sub_model(self._found.model, block.inputs, block.outputs)
        models: Mapping[str, Model] = {"float": part, "quantized": emit(part, restrict(self._found.base, part))}
        for kind, model in models.items():
            session = Session(model, QUIET)
            for batch, feeds in enumerate(self._view(cache, kind, block.inputs)):
                for name, value in session.run(feeds).items():
                    cache.put(f"{kind}:{name}", batch, value)

    def _forget(self, cache: Cache, last: Mapping[str, int], index: int) -> None:
        for name in (*self._blocks[index].inputs, *self._blocks[index].outputs):
            if last.get(name, -1) <= index:
                for kind in KINDS:
                    for batch in range(len(self._batches)):
                        cache.drop(f"{kind}:{name}", batch)
