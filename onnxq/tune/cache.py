"""Activations between blocks, for every batch of calibration rows: in memory up to a budget, then on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from onnxq.types import Array, Feeds

BUDGET_BYTES = 1 << 28


class Cache:
    """Arrays by tensor name and batch number; a context manager that removes its files at the end.

    Args:
        budget: Bytes held in memory; what comes after that goes to temporary files, which are read through the page
            cache of the operating system.
    """

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self._budget = budget
        self._held = 0
        self._arrays: dict[tuple[str, int], Array] = {}
        self._files: dict[tuple[str, int], Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._made = 0

    def __enter__(self) -> Cache:
        """Nothing to open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove all files."""
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def on_disk(self) -> int:
        """Number of arrays in files."""
        return len(self._files)

    def put(self, name: str, batch: int, array: Array) -> None:
        """Keep `array`, in place of an earlier one."""
        self.drop(name, batch)
        key = (name, batch)
        if self._held + array.nbytes <= self._budget:
            self._arrays[key] = array
            self._held += array.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxq-")
        self._made += 1
        path = Path(self._folder.name) / f"{self._made}.npy"
        np.save(path, array, allow_pickle=False)
        self._files[key] = path

    def get(self, name: str, batch: int) -> Array:
        """The array kept under this name and batch."""
        key = (name, batch)
        if key in self._arrays:
            return self._arrays[key]
        loaded: Array = np.load(self._files[key], allow_pickle=False)
        return loaded

    def drop(self, name: str, batch: int) -> None:
        """Forget an array, if it is there."""
        key = (name, batch)
        if key in self._arrays:
            self._held -= self._arrays.pop(key).nbytes
        if key in self._files:
            self._files.pop(key).unlink()


class View(Sequence[Feeds]):
    """The arrays of some tensors as one feed per batch, read when asked for.

    Args:
        cache: Where they are.
        names: Name in the feed -> name in the cache.
        batches: Number of batches.
    """

    def __init__(self, cache: Cache, names: dict[str, str], batches: int) -> None:
        self._cache, self._names, self._batches = cache, names, batches

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __getitem__(self, batch: int) -> Feeds:  # type: ignore[override]
        """The feed of one batch."""
        if not 0 <= batch < self._batches:
            raise IndexError(batch)
        return {name: self._cache.get(kept, batch) for name, kept in self._names.items()}

    def __iter__(self) -> Iterator[Feeds]:
        """All feeds in order."""
        return (self[batch] for batch in range(self._batches))
