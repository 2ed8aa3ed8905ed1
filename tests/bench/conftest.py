"""Models from ONNX text."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper, parser

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>\n'
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Returns a function that writes the model of a graph's text and its constants, and gives the path."""

    def build(text: str, constants: Mapping[str, npt.NDArray[Any]] | None = None, name: str = "model") -> Path:
        model = parser.parse_model(HEAD + text)
        for key, array in (constants or {}).items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), key))
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        return path

    return build
