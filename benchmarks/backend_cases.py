"""The models of the ONNX backend test suites, with the inputs that their tests feed, and variants of them."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.version_converter

KINDS = ("simple", "pytorch-converted", "pytorch-operator")
OPSET_FLOOR, RAISED_OPSET = 7, 13
"""Below the first onnxq declines; such models are converted to the second for a variant of their own."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A model with the inputs that its test feeds, one dictionary per data set."""

    name: str
    model: onnx.ModelProto
    feeds: tuple[dict[str, Array], ...]

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def op(self) -> str:
        """The operator that the model is there to test: of the first node that is no constant."""
        nodes = [node.op_type for node in self.model.graph.node if node.op_type != "Constant"]
        return nodes[0] if nodes else "none"


def cases(modules: Sequence[str] | None = None, kinds: Sequence[str] = KINDS) -> Iterator[Case]:
    """All models of the suites, each followed by its variants; of the node tests only `modules`, if given."""
    for test in _node_tests(modules):
        inputs, _ = test.data_sets[0]
        yield from _variants(f"node/{test.name}", test.model, [inputs])
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for kind in kinds:
        for folder in sorted((root / kind).iterdir()):
            if (folder / "model.onnx").exists():
                model = onnx.load(folder / "model.onnx")
                sets = [_read_set(model, data) for data in sorted(folder.glob("test_data_set_*"))]
                yield from _variants(f"{kind}/{folder.name}", model, sets)


def _node_tests(modules: Sequence[str] | None) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if modules is None:
            from onnx.backend.test.loader import load_model_tests

            return sorted(load_model_tests(kind="node"), key=lambda test: test.name)
        for module in modules:
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
        from onnx.backend.test.case import node

        return sorted(node._NodeTestCases, key=lambda test: test.name)


def _read_set(model: onnx.ModelProto, folder: Path) -> list[Any]:
    """The inputs of a stored data set in their order; what is no tensor becomes None."""
    found: list[Any] = []
    for index, value in enumerate(model.graph.input):
        file = folder / f"input_{index}.pb"
        if not file.exists() or not value.type.HasField("tensor_type"):
            found.append(None)
            continue
        found.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())))
    return found


def _variants(name: str, model: onnx.ModelProto, sets: Sequence[Sequence[Any]]) -> Iterator[Case]:
    inputs = [value.name for value in model.graph.input]
    feeds = tuple(_feeds(inputs, values) for values in sets)
    yield Case(name, model, feeds)
    if Case(name, model, feeds).opset < OPSET_FLOOR:
        with contextlib.suppress(Exception):  # the converter does not know every operator
            raised = onnx.version_converter.convert_version(model, RAISED_OPSET)
            raised.ir_version = max(raised.ir_version, 7)  # what goes with that operator set
            yield Case(f"{name}/raised", raised, feeds)
    if len(feeds) == 1 and len(feeds[0]) == len(inputs) > 1:
        baked = onnx.ModelProto()
        baked.CopyFrom(model)
        baked.ir_version = max(model.ir_version, 4)  # from here on initializers need not be inputs, too
        first, *others = inputs
        del baked.graph.input[1:]
        baked.graph.initializer.extend(onnx.numpy_helper.from_array(feeds[0][other], other) for other in others)
        yield Case(f"{name}/baked", baked, ({first: feeds[0][first]},))


def _feeds(names: Sequence[str], values: Sequence[Any]) -> dict[str, Array]:
    arrays = {}
    for name, value in zip(names, values, strict=False):
        given = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
        if isinstance(given, np.ndarray | np.generic):
            arrays[name] = np.asarray(given)
    return arrays
