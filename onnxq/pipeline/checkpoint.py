"""What was learned so far, in a folder, so that an interrupted run goes on where it stopped.

    state.json        schema, key, number of blocks done, their results, the plan
    learned-7.npz     codes and biases after seven blocks

or, where every layer is learned by itself and in any order,

    state.json        schema, key, number of layers done
    layer-1f0c.json   one of them: its result, its grids; the name is a digest of the layer's
    learned-1f0c.npz  its codes and bias

The key is a digest of the prepared model, the recipe and the plan that learning starts from, which holds what the
calibration rows had to say: a state is only ever used by the run that would have made it. What the clock said about
placement is kept as well, and not measured again: it might say something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxq import graph
from onnxq.errors import EnvironmentFault, InputError, UsageError
from onnxq.plan import load_learned, plan_from_json, plan_to_json, save_learned
from onnxq.recipe import Recipe
from onnxq.types import BlockResult, Border, Interval, Placed, QuantPlan, TensorGrid, Tuned, TunedLayer, WeightGrid
from onnxq.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        done: Blocks behind it.
        tuned: What it found.
        results: Of these blocks.
    """

    done: int
    tuned: Tuned
    results: tuple[BlockResult, ...] = ()


@dataclass(frozen=True)
class Clock:
    """What the clock said before learning began.

    Attributes:
        key: Of model, data and recipe.
        placed: What measured placement changed; None where it looked for nothing.
    """

    key: str
    placed: Placed | None


def kept_clock(folder: Path, key: str) -> Clock | None:
    """What the clock said to the run whose state is in a folder; None where it is another run's or none."""
    path = folder / "state.json"
    entry = _load(path).get("clock") if path.exists() else None
    if entry is None or entry["key"] != key:
        return None
    placed = entry["placed"]
    if placed is None:
        return Clock(key, None)
    ends = {name: Interval(**placed[name]) for name in ("before", "after")}
    return Clock(key, Placed(**{**_tuples(placed), **ends}))


def key_of(settings: Recipe, plan: QuantPlan) -> str:
    """The digest that ties a state to its run."""
    text = json.dumps([__version__, asdict(settings)], sort_keys=True) + plan_to_json(plan)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoint:
    """A folder that holds the state of one run.

    Args:
        folder: Made when the first block is done; it must hold nothing but such a state.
        key: Of the run.
        resume: The state must be there, and must be this run's.
        clock: What was measured before learning.
    """

    def __init__(self, folder: Path, key: str, *, resume: bool = False, clock: Clock | None = None) -> None:
        self._folder, self._key, self._resume, self._clock = folder, key, resume, clock

    def read(self) -> Progress | None:
        """The state of this run; None where there is none.

        Raises:
            UsageError: It is another run's, and `resume` asks for this one's.
            InputError: It is damaged, or not there although `resume` asks for it.
        """
        path, state = self._folder / "state.json", found_state(self._folder, self._key, resume=self._resume)
        if state is None:
            return None
        try:
            plan = plan_from_json(json.dumps(state["plan"]), str(path))
            results = tuple(BlockResult(**entry) for entry in state["results"])
            layers = load_learned(self._folder / str(state["learned"]))
            return Progress(int(state["done"]), Tuned(plan, layers), results)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; remove {self._folder} to start anew.") from error

    def write(self, progress: Progress) -> None:
        """Replace the state; at any moment the old one or the new one is there, whole.

        Raises:
            EnvironmentFault: The folder cannot be written.
        """
        learned = f"learned-{progress.done}.npz"
        state = {
            "key": self._key,
            "clock": None if self._clock is None else asdict(self._clock),
            "done": progress.done,
            "learned": learned,
            "results": [asdict(result) for result in progress.results],
            "plan": json.loads(plan_to_json(progress.tuned.plan)),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_learned(progress.tuned.layers, self._folder / learned)
            _write_state(self._folder, state)
            for old in self._folder.glob("learned-*.npz"):
                if old.name != learned:
                    old.unlink()
        except OSError as error:
            raise EnvironmentFault(f"progress cannot be kept in {self._folder}: {error.strerror or error}.") from error


class KeptLayers:
    """A folder that holds the layers that one run has learned, each by itself.

    Args:
        folder: Made when the first layer is done; it must hold nothing but such a state.
        key: Of the run.
        resume: The state must be there, and must be this run's.
        clock: What was measured before learning.
    """

    def __init__(self, folder: Path, key: str, *, resume: bool = False, clock: Clock | None = None) -> None:
        self._folder, self._key, self._resume, self._clock = folder, key, resume, clock
        self._done = 0

    def read(self) -> dict[str, TunedLayer]:
        """The layers of this run by the name of their slice; layers of another run are forgotten.

        Raises:
            UsageError: The folder is another run's, and `resume` asks for this one's.
            InputError: It is damaged, or not there although `resume` asks for it.
        """
        if found_state(self._folder, self._key, resume=self._resume) is None:
            return {}
        layers = [self._layer(path) for path in sorted(self._folder.glob("layer-*.json"))]
        self._done = len(layers)
        return {layer.block: layer for layer in layers}

    def write(self, layer: TunedLayer) -> None:
        """Keep one more layer.

        Raises:
            EnvironmentFault: The folder cannot be written.
        """
        stem = hashlib.sha256(layer.block.encode()).hexdigest()[:16]
        entry = {
            "block": layer.block,
            "tensors": {name: asdict(grid) for name, grid in layer.tensors.items()},
            "weights": {name: asdict(grid) for name, grid in layer.weights.items()},
            "result": asdict(layer.result),
            "notes": layer.notes,
            "borders": {name: asdict(border) for name, border in layer.borders.items()},
        }
        try:
            if not self._done:
                forget_progress(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            save_learned(layer.learned, self._folder / f"learned-{stem}.npz")
            with graph.atomic_path(self._folder / f"layer-{stem}.json") as temporary:
                temporary.write_text(json.dumps(entry), encoding="utf-8")
            self._done += 1
            clock = None if self._clock is None else asdict(self._clock)
            _write_state(self._folder, {"key": self._key, "clock": clock, "done": self._done})
        except OSError as error:
            raise EnvironmentFault(f"progress cannot be kept in {self._folder}: {error.strerror or error}.") from error

    def _layer(self, path: Path) -> TunedLayer:
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            return TunedLayer(
                entry["block"],
                {name: TensorGrid(**grid) for name, grid in entry["tensors"].items()},
                {name: WeightGrid(**_tuples(grid)) for name, grid in entry["weights"].items()},
                load_learned(self._folder / path.name.replace("layer-", "learned-").replace(".json", ".npz")),
                BlockResult(**entry["result"]),
                tuple(entry["notes"]),
                {name: _border(border) for name, border in entry["borders"].items()},
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; remove {self._folder} to start anew.") from error


def found_state(folder: Path, key: str, *, resume: bool) -> Mapping[str, Any] | None:
    """The state in a folder if it is that of the run called `key`.

    Raises:
        UsageError: It is another run's, and `resume` asks for this one's.
        InputError: It is damaged, or not there although `resume` asks for it.
    """
    path = folder / "state.json"
    if not path.exists():
        if resume:
            raise InputError(f"{folder} holds no interrupted run: there is no state.json in it.")
        return None
    state = _load(path)
    if state["key"] == key:
        return state
    if resume:
        raise UsageError(
            f"{folder} belongs to a run with another model, data or recipe; repeat that command, or leave --resume "
            "out to start anew."
        )
    return None


def forget_progress(folder: Path) -> None:
    """Remove the state in `folder`, and the folder if nothing else is in it."""
    for path in (folder / "state.json", *folder.glob("learned-*.npz"), *folder.glob("layer-*.json")):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _border(entry: Mapping[str, Any]) -> Border:
    return Border(entry["axis"], tuple((b0, b1, b2) for b0, b1, b2 in entry["terms"]))


def _tuples(grid: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a grid as they were before JSON made lists of them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in grid.items()}


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    with graph.atomic_path(folder / "state.json") as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, **state}), encoding="utf-8")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; remove {path.parent} to start anew.") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or "key" not in state:
        raise InputError(f"{path} is not the state of a run of this version; remove {path.parent} to start anew.")
    return state
