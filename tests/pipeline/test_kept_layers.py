"""Layers learned apart, in a folder: what is written comes back, and nobody else's does."""

import json

import numpy as np
import pytest

from onnxq.errors import InputError, UsageError
from onnxq.pipeline.checkpoint import KeptLayers, forget_progress
from onnxq.types import BlockResult, Border, LearnedLayer, TensorGrid, TunedLayer, WeightGrid


def layer(block, seed=0):
    codes = np.random.default_rng(seed).integers(-7, 8, (3, 2)).astype(np.int8)
    bias = np.float32([0.1, -0.2, 0.3]) if seed else None
    return TunedLayer(
        block,
        {"t": TensorGrid(0.1 + seed, 7, 4, True, False, "mse")},
        {block: WeightGrid((0.1, 1 / 3, 2.5), 0, 4, (-8, -3, 1))},
        {block: LearnedLayer(codes, bias)},
        BlockResult(block, "adaquant", 0.1, 1 / 3, True, 1.5),
        ("a note",),
        {"t": Border(-3, ((0.5, -1 / 3, 0.1), (0.0, 0.2, 1.0)))} if seed else {},
    )


def same(one, other):
    bare = [(each.block, each.tensors, each.weights, each.result, each.notes, each.borders) for each in (one, other)]
    assert bare[0] == bare[1]
    assert one.learned.keys() == other.learned.keys()
    for name, learned in one.learned.items():
        np.testing.assert_array_equal(learned.codes, other.learned[name].codes)
        np.testing.assert_array_equal(learned.bias, other.learned[name].bias)


def test_what_is_kept_comes_back_in_another_run(tmp_path):
    folder = tmp_path / "kept"
    first = KeptLayers(folder, "k")
    assert first.read() == {}
    assert not folder.exists()
    layers = {name: layer(name, seed) for seed, name in enumerate(("/a/b", "c"))}
    for each in layers.values():
        first.write(each)
    second = KeptLayers(folder, "k", resume=True)
    found = second.read()
    assert set(found) == set(layers)
    for name, each in layers.items():
        same(found[name], each)
    second.write(layer("d", 3))
    assert set(KeptLayers(folder, "k").read()) == {"/a/b", "c", "d"}
    assert json.loads((folder / "state.json").read_text())["done"] == 3
    forget_progress(folder)
    assert not folder.exists()


def test_another_run_is_neither_read_nor_mixed(tmp_path):
    KeptLayers(tmp_path, "k").write(layer("a"))
    with pytest.raises(UsageError, match="belongs to a run with another model"):
        KeptLayers(tmp_path, "other", resume=True).read()
    other = KeptLayers(tmp_path, "other")
    assert other.read() == {}
    other.write(layer("b"))
    assert set(KeptLayers(tmp_path, "other").read()) == {"b"}


def test_what_is_damaged_or_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no interrupted run"):
        KeptLayers(tmp_path, "k", resume=True).read()
    KeptLayers(tmp_path, "k").write(layer("a"))
    (path,) = tmp_path.glob("layer-*.json")
    path.write_text(path.read_text().replace('"scales"', '"steps"'))
    with pytest.raises(InputError, match=r"is damaged: .*steps.*; remove"):
        KeptLayers(tmp_path, "k").read()
