"""From whatever the user has to a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxq.calibrate.data.arrays import Memory
from onnxq.calibrate.data.batching import Batching
from onnxq.calibrate.data.chunks import Source, row_axis
from onnxq.calibrate.data.dataset import LabelledDataset, Rows
from onnxq.calibrate.data.files import FORMS, DataFile, by_class, find, spread
from onnxq.calibrate.data.fit import MOST_ROWS, Fit, as_array
from onnxq.calibrate.data.notes import Notes
from onnxq.calibrate.data.pictures import plan_pictures
from onnxq.calibrate.data.preprocess import Preprocess
from onnxq.calibrate.data.program import is_reference, load_callable
from onnxq.calibrate.data.sources import ArrayFiles, InMemory, Pictures, Program
from onnxq.calibrate.data.splitting import Part
from onnxq.errors import DataError, NoLabels, UnsupportedError, UsageError
from onnxq.types import Array, Dataset, Feeds, InputSpec

STACKED = 32
"""Rows of a batch of pictures or single samples unless something else is asked for."""

Data = str | Path | Dataset | Iterable[Feeds] | Array | Mapping[str, Array] | Callable[[], Iterable[object]]
"""What rows can be read from."""


def open_data(
    source: Data | LabelledDataset,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
    samples: int = 512,
    batch: int | None = None,
) -> Dataset:
    """Open data for a model.

    Args:
        source: A folder of images or of .npz and .npy files, one such file, "module:callable", arrays by
            input name, an array, an iterable (that is no iterator) of feeds, or a function that returns one.
            A dataset that was opened here before is returned as it is.
        inputs: The model's inputs.
        preprocess: What is done to images; arrays are fed as they are.
        samples: Most rows. Of more files than this, evenly spaced ones are read.
        batch: Rows of a batch where the model's first axis is dynamic.

    Raises:
        DataError: The data cannot be read or does not fit, as far as its beginning tells. Rows behind it are
            looked at while they are iterated.
        UsageError: The preprocessing contradicts the model.
    """
    if isinstance(source, LabelledDataset):
        return source.unlabelled()
    if isinstance(source, Rows | Part):
        return source
    return _Request(_dynamic(inputs), preprocess, samples, batch, labelled=False).open(source)


def open_labelled(
    source: Data | LabelledDataset,
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
    samples: int | None = None,
    batch: int | None = None,
) -> LabelledDataset:
    """Open data with labels: integers under label, labels, y or target, or one sub-folder per class.

    Args:
        source: As for `open_data`.
        inputs: The model's inputs.
        preprocess: What is done to images.
        samples: Most rows; None takes all.
        batch: Rows of a batch where the model's first axis is dynamic.

    Raises:
        DataError: The data cannot be read, does not fit or has no labels.
        UsageError: The preprocessing contradicts the model.
    """
    if isinstance(source, LabelledDataset):
        return source
    if isinstance(source, Rows | Part):
        raise NoLabels("the dataset was opened without labels: open its source with open_labelled")
    return LabelledDataset(_Request(_dynamic(inputs), preprocess, samples, batch, labelled=True).open(source))


@dataclass(frozen=True)
class _Request:
    """What was asked for, while it is being opened."""

    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None
    samples: int | None
    batch: int | None
    labelled: bool
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("batch", self.batch)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not self.inputs:
            raise UnsupportedError("the model has no inputs, so data cannot be fed to it")

    def open(self, source: Data) -> Rows:
        """Open any form but a dataset of ours."""
        if isinstance(source, str | Path):
            rows = self._path_or_program(source)
        elif isinstance(source, np.ndarray):
            rows = self._memory({self._only_input(): source})
        elif isinstance(source, Mapping):
            rows = self._memory({name: as_array(value, f"array {name!r}") for name, value in source.items()})
        else:
            rows = self._program(source)
        rows.source.check()
        return rows

    def _path_or_program(self, source: str | Path) -> Rows:
        path = Path(source)
        if isinstance(source, str) and is_reference(source) and not path.exists():
            return self._made_by(load_callable(source), source, {"kind": "callable"})
        if not source or not str(source).strip():
            raise DataError(f"the name of the data is empty: give {FORMS}")
        files = self._labelled_files(path) if self.labelled else find(path)
        used = spread(files, self.samples)
        facts = {"files": {"found": len(files), "used": len(used)}}
        name = path.resolve().name
        if not used[0].is_image:
            return self._rows(ArrayFiles(tuple(used), self._fit()), name, facts)
        plan = plan_pictures(self.inputs, self.preprocess, name, self.notes)
        pictures = Pictures(tuple(used), plan, self.labelled, self.notes)
        return self._rows(pictures, name, facts, batched=plan.batched, one_shape=True)

    def _labelled_files(self, path: Path) -> list[DataFile]:
        inside = by_class(path, self.notes) if path.is_dir() else []
        files = inside or find(path)
        if not inside and files[0].is_image:
            raise NoLabels(
                f"{path.resolve().name}: images without labels: put them into one sub-folder per class, "
                "or compare with a reference model instead"
            )
        return files

    def _memory(self, arrays: Mapping[str, Array]) -> Rows:
        return self._rows(InMemory(Memory(arrays), self._fit()), "arrays", {})

    def _program(self, source: Dataset | Iterable[object] | Callable[[], Iterable[object]]) -> Rows:
        if isinstance(source, Iterator):
            raise DataError(
                f"a {type(source).__name__} can be read once only, and data is read several times: "
                "give a list, or the function that makes it"
            )
        if isinstance(source, Dataset):
            facts = {"kind": "dataset", "source": dict(source.provenance)}
            return self._made_by(lambda: source, type(source).__name__, facts)
        if isinstance(source, Iterable):
            return self._made_by(lambda: source, f"the {type(source).__name__}", {"kind": "iterable"})
        if callable(source):
            name = getattr(source, "__qualname__", type(source).__name__)
            return self._made_by(source, name, {"kind": "callable"})
        raise DataError(f"something of type {type(source).__name__} is no data: give {FORMS}")

    def _made_by(self, make: Callable[[], Iterable[object]], name: str, facts: Mapping[str, object]) -> Rows:
        return self._rows(Program(make, name, self._fit(), facts), name, {})

    def _fit(self) -> Fit:
        if self.preprocess is not None:
            self.notes.add("preprocess", "not applied: arrays are fed as they are")
        step = MOST_ROWS if self._exact() else min(self.batch or MOST_ROWS, MOST_ROWS)
        return Fit(self.inputs, row_axis(self.inputs), step, self.labelled, self.notes)

    def _rows(
        self,
        source: Source,
        name: str,
        facts: Mapping[str, object],
        *,
        batched: bool = True,
        one_shape: bool = False,
    ) -> Rows:
        exact = self._exact() if batched else None
        by_row = batched and exact is None and row_axis(self.inputs)
        batching = Batching(exact, self.batch or STACKED, one_shape)
        known = {
            **facts,
            "samples": self.samples,
            "batch": exact or self.batch or (STACKED if one_shape and batched else None),
            "unit": "row" if by_row else "batch",
        }
        return Rows(source, name, batching, self.samples, known, self.notes)

    def _exact(self) -> int | None:
        first = self.inputs[0].shape[0] if row_axis(self.inputs) else None
        return first if isinstance(first, int) else None

    def _only_input(self) -> str:
        if len(self.inputs) == 1:
            return self.inputs[0].name
        names = ", ".join(spec.name for spec in self.inputs)
        raise DataError(f"one array was given, but the model has the inputs {names}: give a dict of arrays by name")


def _dynamic(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """Read a size below 1 as a dynamic one: some exporters write 0 or -1."""
    shapes = [tuple(None if isinstance(dim, int) and dim < 1 else dim for dim in spec.shape) for spec in inputs]
    return tuple(replace(spec, shape=shape) for spec, shape in zip(inputs, shapes, strict=True))
