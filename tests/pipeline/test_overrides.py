"""Settings of single layers, from the recipe to the file: bits, steps, ranges, float, and what matches nothing."""

import json
from pathlib import Path

import onnx
import pytest
from helpers import proto, weights

import onnxq
from onnxq.errors import UsageError
from onnxq.recipe import plain, recipe_toml, resolve

TEXT = """
g (float[N,3,8,8] x, float[6,3,3,3] w1, float[8,6,1,1] w2, float[8,8,3,3] w3, float[8,4] w4) => (float[N,4] y) {
  [stem] a = Conv(x, w1)
  b = Relu(a)
  [body_one] c = Conv(b, w2)
  d = Relu(c)
  [body_two] e = Conv<pads = [1, 1, 1, 1]>(d, w3)
  f = Relu(e)
  p = GlobalAveragePool(f)
  q = Flatten(p)
  [head] y = Gemm(q, w4)
}
"""
ROWS = {"x": weights(24, 3, 8, 8, seed=5)}


class Heard:
    """A log that keeps what it warns of."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)

    def stage(self, text):
        pass

    advance = step = note = stage


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sizes = {"w1": (6, 3, 3, 3), "w2": (8, 6, 1, 1), "w3": (8, 8, 3, 3), "w4": (8, 4)}
    found = tmp_path_factory.mktemp("overrides") / "net.onnx"
    onnx.save(proto(TEXT, **{name: weights(*shape, seed=2) for name, shape in sizes.items()}), found)
    return found


def quantize(path, *layers, log=None, **changes):
    changes = {"ranges": "minmax", "bn_tuning": False} | changes
    options = {} if log is None else {"log": log}
    return onnxq.quantize(path, ROWS, checks=onnxq.Checks(verify=False), layers=list(layers), **changes, **options)


def bits(found):
    inputs = {name: node.inputs[0].name for name, node in _nodes(found).items() if name in found.plan.weights}
    return {name: (grid.bits, found.plan.tensors[inputs[name]].bits) for name, grid in found.plan.weights.items()}


def _nodes(found):
    return {node.name: node for node in found.prepared.model.graph}


def test_every_layer_gets_its_own_bits_and_the_rest_keeps_the_recipes(path):
    found = quantize(
        path,
        {"match": "body_*", "weights": {"bits": 3}},
        {"match": "body_two", "activations": {"bits": 6}},
        {"op": "Gemm", "weights": {"bits": 5}},
        weight_bits=4,
        activation_bits=7,
        first_last=8,
    )
    assert bits(found) == {"stem": (8, 8), "body_one": (3, 7), "body_two": (3, 6), "head": (5, 8)}
    plainly = quantize(path, weight_bits=4, activation_bits=7)
    assert bits(plainly) == {"stem": (8, 8), "body_one": (4, 7), "body_two": (4, 7), "head": (8, 8)}


def test_single_layers_have_codebooks(path):
    found = quantize(path, onnxq.Override("body_one", codebook_bits=1), onnxq.Override("head", weight_bits=5))
    grids = found.plan.weights
    assert {name: (grid.bits, len(grid.values)) for name, grid in grids.items()} == {
        "stem": (8, 0), "body_one": (1, 1), "body_two": (8, 0), "head": (5, 0)
    }  # fmt: skip
    found = quantize(
        path, onnxq.Override("body_two", weight_bits=5), onnxq.Override("stem", per_channel=False), codebook_bits=3
    )
    bits = {name: (grid.bits, len(grid.values), grid.axis) for name, grid in found.plan.weights.items()}
    assert bits == {"stem": (8, 0, None), "body_one": (8, 0, 0), "body_two": (5, 0, 0), "head": (8, 0, 1)}
    found = quantize(path, onnxq.Override("head", activation_bits=6), codebook_bits=3)
    assert len(found.plan.weights["body_two"].values) == 1
    assert found.plan.weights["head"].values == ()
    with pytest.raises(UsageError, match="add --reconstruction none"):
        quantize(path, onnxq.Override("head", codebook_bits=1), reconstruction="adaquant")


def test_float_granularity_and_ranges_of_single_layers(path):
    rows = [
        {"match": "body_one", "float": True},
        {"match": "body_two", "per_channel": False, "ranges": "percentile"},
        {"match": "head", "ranges": "averaged"},
    ]
    found = quantize(path, *rows)
    assert set(found.plan.weights) == {"stem", "body_two", "head"}
    assert found.plan.skipped["body_one"] == "asked to stay in float"
    assert {name: len(grid.scales) for name, grid in found.plan.weights.items()} == {
        "stem": 6,
        "body_two": 1,
        "head": 4,
    }
    rules = {name: grid.rule for name, grid in found.plan.tensors.items()}
    nodes = _nodes(found)
    assert rules[nodes["body_two"].inputs[0].name] == "percentile"
    assert rules[nodes["stem"].inputs[0].name] == "minmax"
    chosen = quantize(path, rows[1], ranges="auto").plan.tensors[nodes["body_two"].inputs[0].name]
    assert chosen.rule == "percentile"
    grids = {rule: quantize(path, ranges=rule).plan.tensors for rule in ("minmax", "percentile")}
    name = nodes["body_two"].inputs[0].name
    assert chosen.scale == grids["percentile"][name].scale != grids["minmax"][name].scale


def test_what_matches_nothing_is_said_with_the_nearest_names(path):
    log = Heard()
    found = quantize(
        path,
        {"match": "bdy_*", "weights": {"bits": 4}},
        {"op": "Relu", "weights": {"bits": 4}},
        {"op": "LSTM", "float": True},
        log=log,
    )
    assert {grid.bits for grid in found.plan.weights.values()} == {8}
    assert log.warnings == [
        "[[layers]] match = 'bdy_*' matches no node of the simplified model. Did you mean 'body_one' or 'body_two'?",
        "[[layers]] op = 'Relu' matches no layer that runs in integers.",
        "[[layers]] op = 'LSTM' matches no node of the simplified model.",
    ]
    with pytest.raises(UsageError, match=r"keep-float pattern 'haed' matches no node .* Did you mean 'head'\?"):
        quantize(path, keep_float=("haed",))


def test_the_file_records_the_recipe_that_makes_it_again(path, tmp_path):
    found = quantize(path, {"match": "body_*", "weights": {"bits": 4}, "ranges": "mae"}, seed=3)
    first = found.save(tmp_path / "first.onnx")
    recorded = {entry.key: entry.value for entry in onnx.load(first).metadata_props}["onnxq.recipe"]
    assert json.loads(recorded) == json.loads(json.dumps(plain(found.recipe)))
    saved = tmp_path / "recipe.toml"
    saved.write_text(recipe_toml(found.recipe))
    for source in (saved, first):
        assert resolve(source) == found.recipe
        again = onnxq.quantize(path, ROWS, source, checks=onnxq.Checks(verify=False)).save(tmp_path / "again.onnx")
        assert Path(again).read_bytes() == first.read_bytes()
