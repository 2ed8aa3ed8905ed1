"""Whole models, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from onnxq import graph
from onnxq.torch_exec import check, extract

FOLDER = os.environ.get("ONNXQ_ASSETS")
MODELS = sorted(Path(FOLDER).rglob("*.onnx")) if FOLDER else []


@pytest.mark.assets
@pytest.mark.skipif(not MODELS, reason="ONNXQ_ASSETS names no folder with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_whole_models(path):
    model = graph.load(path)
    generator = np.random.default_rng(0)
    feeds = {}
    for name, dtype, shape in graph.input_specs(model):
        sizes = [size if isinstance(size, int) else (2 if axis == 0 else 24) for axis, size in enumerate(shape)]
        drawn = generator.normal(size=sizes) if dtype.startswith("float") else generator.integers(0, 2, sizes)
        feeds[name] = drawn.astype(dtype)
    whole = extract(model, list(feeds), [graph.name_of(output) for output in model.graph.outputs])
    assert check(whole, model, feeds) < 2e-6
