import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import InputError
from onnxq.plan import load_learned, load_plan, plan_from_json, plan_to_json, save_learned, save_plan
from onnxq.types import LearnedLayer, QuantPlan, TensorGrid, WeightGrid

PLAN = QuantPlan(
    target="cpu",
    source="abc",
    tensors={"x": TensorGrid(0.1, 3), "/a/h": TensorGrid(1e-7, 15, 4, False, False, "mse|minmax")},
    weights={"n": WeightGrid((0.1, 0.30000000000000004), 1, 4), "m": WeightGrid((1.5,), None)},
    integer=("n", "m"),
    skipped={"s": "because"},
    guards=("x",),
    sums=("a", "b"),
    constants={"c": TensorGrid(0.5, 0, rule="constant")},
    tables=("t",),
)
SCALES = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
NAMES = st.text(max_size=8)
GRIDS = st.builds(
    TensorGrid,
    scale=SCALES,
    zero_point=st.integers(0, 3),
    bits=st.integers(2, 8),
    signed=st.just(False),
    everywhere=st.booleans(),
    rule=st.text(max_size=5),
)
PLANS = st.builds(
    QuantPlan,
    target=NAMES,
    source=NAMES,
    tensors=st.dictionaries(NAMES, GRIDS, max_size=3),
    weights=st.dictionaries(
        NAMES,
        st.builds(
            WeightGrid,
            st.lists(SCALES, min_size=1, max_size=3).map(tuple),
            st.none() | st.integers(0, 4),
            st.integers(2, 8),
        ),
        max_size=3,
    ),
    integer=st.lists(NAMES, max_size=3).map(tuple),
    skipped=st.dictionaries(NAMES, st.text(max_size=5), max_size=3),
    guards=st.lists(NAMES, max_size=2).map(tuple),
    sums=st.lists(NAMES, max_size=2).map(tuple),
    constants=st.dictionaries(NAMES, GRIDS, max_size=2),
    tables=st.lists(NAMES, max_size=2).map(tuple),
)


def refusal(document):
    """The one line with which a document is refused."""
    with pytest.raises(InputError) as caught:
        plan_from_json(document if isinstance(document, str) else json.dumps(document), "p.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("p.json")
    return str(caught.value)


def edited(*path, value):
    """The document of PLAN with one value replaced."""
    document = json.loads(plan_to_json(PLAN))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def test_a_plan_comes_back_as_it_was():
    assert plan_from_json(plan_to_json(PLAN)) == PLAN


@settings(max_examples=100, deadline=None)
@given(plan=PLANS)
def test_any_plan_comes_back_as_it_was(plan):
    assert plan_from_json(plan_to_json(plan)) == plan


def test_a_plan_is_written_one_line_per_entry(tmp_path):
    save_plan(PLAN, tmp_path / "p.json")
    lines = (tmp_path / "p.json").read_text().splitlines()
    assert sum('"scale"' in line for line in lines) == 3
    assert '    "m": {"scales": [1.5], "axis": null, "bits": 8, "lowest": [], "values": []}' in lines
    assert load_plan(tmp_path / "p.json") == PLAN


def test_optional_parts_may_be_absent():
    document = json.loads(plan_to_json(PLAN))
    for key in ("guards", "sums", "constants", "tables"):
        del document[key]
    expected = replace(PLAN, guards=(), sums=(), constants={}, tables=())
    assert plan_from_json(json.dumps(document)) == expected


@pytest.mark.parametrize("key", ["target", "source", "tensors", "weights", "integer", "skipped"])
def test_a_missing_part_is_named(key):
    document = json.loads(plan_to_json(PLAN))
    del document[key]
    assert f"lacks the key '{key}'" in refusal(document)


@pytest.mark.parametrize("key", ["scales", "axis", "bits"])
def test_a_missing_entry_is_named(key):
    document = json.loads(plan_to_json(PLAN))
    del document["weights"]["n"][key]
    assert key in refusal(document)


def test_unknown_keys_are_refused_with_a_suggestion():
    assert "unknown key 'tensor'. Did you mean 'tensors'?" in refusal(edited("tensor", value={}))
    text = refusal(edited("tensors", "x", "zeropoint", value=3))
    assert "tensor x: unknown key 'zeropoint'. Did you mean 'zero_point'?" in text
    assert "weight n: unknown key 'scale'. Did you mean 'scales'?" in refusal(edited("weights", "n", "scale", value=3))
    assert "Did you mean" not in refusal(edited("qqqqq", value=3))


BAD = [
    (("tensors", "x", "scale"), 0.0, "tensor x: the scale must be a positive number"),
    (("tensors", "x", "scale"), -1.0, "positive"),
    (("tensors", "x", "scale"), float("nan"), "positive"),
    (("tensors", "x", "scale"), float("inf"), "positive"),
    (("tensors", "x", "scale"), "0.1", "wrong kind"),
    (("tensors", "x", "zero_point"), 256, "tensor x: the zero point must be one of 0 to 255, not 256"),
    (("tensors", "x", "zero_point"), -1, "zero point"),
    (("tensors", "x", "zero_point"), 1.5, "zero point"),
    (("tensors", "/a/h", "zero_point"), 16, "must be one of 0 to 15"),
    (("tensors", "x", "bits"), 9, "tensor x: bits must be one of 2 to 8, or 16, not 9"),
    (("tensors", "x", "bits"), "8", "bits"),
    (("tensors", "x", "everywhere"), "no", "everywhere must be true or false, not 'no'"),
    (("tensors", "x", "signed"), 1, "signed"),
    (("tensors", "x"), 5, "wrong kind"),
    (("tensors", "x"), [], "wrong kind"),
    (("tensors",), [], "wrong kind"),
    (("constants", "c", "scale"), 0, "constant c"),
    (("weights", "n", "scales"), [], "weight n: scales must be positive numbers"),
    (("weights", "n"), {"scales": [1.0, 2.0], "axis": 0, "bits": 4, "lowest": [-3]}, "as many as scales"),
    (("weights", "n"), {"scales": [1.0], "axis": None, "bits": 8, "lowest": [-3]}, "for up to 7 bits"),
    (("weights", "n"), {"scales": [1.0], "axis": None, "bits": 4, "lowest": [1]}, "integers from -15 to 0"),
    (("weights", "n"), {"scales": [1.0], "axis": None, "bits": 4, "lowest": [-16]}, "integers from -15 to 0"),
    (("weights", "n"), {"scales": [1.0], "axis": None, "bits": 4, "lowest": [-2.5]}, "integers from -15 to 0"),
    (("weights", "n", "scales"), [0.1, 0], "positive"),
    (("weights", "n", "scales"), [0.1, float("nan")], "positive"),
    (("weights", "n", "scales"), 0.1, "wrong kind"),
    (("weights", "n", "scales"), "x", "wrong kind"),
    (("weights", "n", "axis"), "0", "weight n: the axis must be an integer or null, not '0'"),
    (("weights", "n", "bits"), 1, "weight n: bits"),
    (("integer",), "conv", "integer must be a list of names"),
    (("integer",), [1], "integer must be a list of names"),
    (("guards",), {"x": 1}, "guards must be a list of names"),
    (("sums",), None, "sums must be a list of names"),
    (("skipped",), ["a"], "wrong kind"),
]


@pytest.mark.parametrize(("path", "value", "text"), BAD)
def test_bad_values_are_refused(path, value, text):
    assert text in refusal(edited(*path, value=value))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"schema": 2}', '{"schema": "1"}'])
def test_other_documents_are_refused(text):
    refusal(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_plan(tmp_path / "p.json")


def test_learned_layers_come_back_exactly(tmp_path):
    layers = {
        "/a/Conv": LearnedLayer(np.array([[-127, 3]], np.int8), np.array([0.1, -2.5], np.float32)),
        "b": LearnedLayer(np.zeros((2, 1, 3), np.int8)),
    }
    save_learned(layers, tmp_path / "plan.npz")
    back = load_learned(tmp_path / "plan.npz")
    assert list(back) == ["/a/Conv", "b"]
    for name, layer in layers.items():
        np.testing.assert_array_equal(back[name].codes, layer.codes, strict=True)
    np.testing.assert_array_equal(back["/a/Conv"].bias, layers["/a/Conv"].bias, strict=True)
    assert back["b"].bias is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_a_file_that_holds_no_learned_layers_is_refused(content, tmp_path):
    path = tmp_path / "plan.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no learned layers"):
        load_learned(path)
