import json
import tomllib
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibrate.ranges import RULES
from onnxq.errors import InputError, UsageError
from onnxq.overrides import Override, settle
from onnxq.recipe import (
    BALANCED,
    FAST,
    PRESET_NAMES,
    PRESETS,
    TARGETS,
    UNITS,
    Recipe,
    load_recipe,
    plain,
    recipe_toml,
    resolve,
)
from onnxq.tune.methods import LEARNED

BITS = st.integers(2, 8)
KNOWN = "fast, balanced, light, advanced, accurate, repapq, aquant, repq-vit, fastest"
WIDE = BITS | st.just(16)
TAKES = {
    "weight_bits": "2 to 8",
    "activation_bits": "2 to 8 or 16",
    "first_last": "2 to 8",
    "residual_bits": "2 to 8 or 16",
}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
BITTEN = st.builds(
    Override, match=TEXT, op=st.none() | TEXT, weight_bits=st.none() | BITS, activation_bits=WIDE,
    ranges=st.none() | st.sampled_from(list(RULES)), per_channel=st.none() | st.booleans(),
)  # fmt: skip
OVERRIDES = BITTEN | st.builds(Override, match=st.none() | TEXT, op=TEXT, keep_float=st.booleans())
RECIPES = st.builds(
    Recipe,
    preset=st.sampled_from(PRESET_NAMES),
    target=st.sampled_from(TARGETS),
    ranges=st.sampled_from(["auto", *RULES]),
    weight_bits=BITS,
    activation_bits=WIDE,
    first_last=BITS,
    residual_bits=WIDE,
    per_channel=st.booleans(),
    portable=st.booleans(),
    keep_float=st.lists(TEXT, max_size=3).map(tuple),
    reconstruction=st.sampled_from(["none", *LEARNED]),
    unit=st.sampled_from(UNITS),
    iterations=st.integers(1, 10**6),
    bias_tuning=st.booleans(),
    packed=st.booleans(),
    samples=st.integers(1, 10**9),
    seed=st.integers(0, 2**40),
    layers=st.lists(OVERRIDES, max_size=3).map(tuple),
)


@pytest.fixture
def write(tmp_path):
    def make(text, name="recipe.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


def refusal(error, call, *args, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(max_examples=100, deadline=None)
@given(recipe=RECIPES)
def test_toml_round_trip(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "r.toml"
    path.write_text(recipe_toml(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe
    assert resolve(str(path)) == resolve(path) == recipe
    assert resolve(**json.loads(json.dumps(plain(recipe)))) == recipe


@pytest.mark.parametrize(
    "pattern", ['quo"te', "back\\slash", "tab\t", "line\nbreak", "\x00\x1f\x7f\x80", "雪 😀", "/a/*[0-9]"]
)
def test_patterns_survive_toml(pattern, write):
    recipe = replace(FAST, keep_float=(pattern, "last"))
    assert load_recipe(write(recipe_toml(recipe))) == recipe


def test_the_file_lists_every_field_in_order():
    text = recipe_toml(replace(BALANCED, keep_float=("head", "Conv_*"), per_channel=False))
    assert list(tomllib.loads(text)) == [field.name for field in fields(Recipe)]
    lines = text.splitlines()
    assert 'keep_float = ["head", "Conv_*"]' in lines
    assert "per_channel = false" in lines
    assert "weight_bits = 8" in lines


def test_presets():
    assert BALANCED == Recipe() == resolve() == resolve("balanced")
    assert (BALANCED.preset, BALANCED.ranges, BALANCED.weight_bits, BALANCED.samples) == ("balanced", "auto", 8, 512)
    assert FAST == resolve("fast") == Recipe(preset="fast", ranges="minmax", bn_tuning=False, migrate_norms=False)
    assert tuple(PRESETS) == PRESET_NAMES
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert resolve(preset) is not None


def test_changes_then_file_then_preset(write):
    path = write('preset = "fast"\nsamples = 64\nweight_bits = 4\n')
    found = resolve(path, weight_bits=6, seed=3)
    assert found == replace(FAST, samples=64, weight_bits=6, seed=3)
    assert resolve("fast", ranges="mse").ranges == "mse"
    assert resolve(found, samples=1) == replace(found, samples=1)
    assert resolve(path) == load_recipe(path) == replace(FAST, samples=64, weight_bits=4)
    assert load_recipe(write("seed = 5")) == replace(BALANCED, seed=5)
    assert load_recipe(write("")) == BALANCED


def test_none_leaves_a_field_as_it_is():
    assert resolve("fast", ranges=None, samples=None) == FAST
    assert resolve("fast", per_channel=False, seed=0) == replace(FAST, per_channel=False)


def test_a_list_of_patterns_will_do():
    assert resolve(keep_float=["a", "b"]).keep_float == ("a", "b")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("balancd", "Did you mean 'balanced'?"), ("FAST", ""), ("", ""), ("recipe.tml", ""), ("w4a", ""), ("xw4a8", "")],
)
def test_unknown_presets(name, suggestion):
    message = refusal(UsageError, resolve, name)
    assert message.startswith(f"there is no preset {name!r}; presets: {KNOWN}; or bits: w4a8.")
    assert message.endswith(suggestion)


@pytest.mark.parametrize(
    ("key", "near"), [("sampels", "samples"), ("weight-bits", "weight_bits"), ("range", "ranges"), ("zzz", None)]
)
def test_unknown_keys(key, near, write):
    path = write(f"{key} = 3\n")
    suggestion = f" Did you mean {near!r}?" if near else ""
    assert refusal(InputError, load_recipe, path) == f"recipe {path}: unknown key {key!r}.{suggestion}"
    assert refusal(UsageError, resolve, "fast", **{key: 3}) == f"a recipe has no field {key!r}.{suggestion}"


WRONG = [
    ("samples", "5.0", 5.0, "samples takes a whole number, not 5.0."),
    ("samples", "true", True, "samples takes a whole number, not True."),
    ("samples", "0", 0, "samples takes 1 or more, not 0."),
    ("seed", "-1", -1, "seed takes 0 or more, not -1."),
    ("weight_bits", '"4"', "4", "weight-bits takes a whole number, not '4'."),
    ("per_channel", "1", 1, "per-channel takes true or false, not 1."),
    ("ranges", "3", 3, "ranges takes a string, not 3."),
    ("target", '["cpu"]', ["cpu"], "target takes a string, not"),
    ("keep_float", '"head"', "head", "keep-float takes a list of strings, not 'head'."),
    ("keep_float", "[1, 2]", [1, 2], "keep-float takes a list of strings, not (1, 2)."),
    (
        "preset",
        '"fats"',
        "fats",
        f"preset takes {KNOWN}, not 'fats'. Did you mean 'fast'?",
    ),
    ("preset", "7", 7, "preset takes a string, not 7."),
    (
        "preset",
        '"recipe.toml"',
        "recipe.toml",
        f"preset takes {KNOWN}, not 'recipe.toml'.",
    ),
    (
        "target",
        '"cup"',
        "cup",
        "target takes auto, cpu, tensorrt, cuda, openvino, qnn, web, not 'cup'. Did you mean 'cpu'?",
    ),
    ("ranges", '"mes"', "mes", "ranges takes auto, minmax, averaged, percentile, entropy, mse, mae, not 'mes'."),
    ("ranges", '"min-max"', "min-max", "Did you mean 'minmax'?"),
    *(
        ("codebook_bits", str(bits), bits, f"codebook-bits takes 1 to 4, or 0 for none, not {bits}.")
        for bits in (-1, 5, 8)
    ),
    *(
        (f"{name}", str(bits), bits, f"{name.replace('_', '-')} takes {TAKES[name]}, not {bits}.")
        for name in ("weight_bits", "activation_bits", "first_last", "residual_bits")
        for bits in (1, 9, -8)
    ),
]


@pytest.mark.parametrize(("key", "text", "value", "message"), WRONG)
def test_wrong_values_are_refused_wherever_they_come_from(key, text, value, message, write):
    assert message in refusal(UsageError, resolve, None, **{key: value})
    path = write(f"{key} = {text}\n")
    found = refusal(InputError, load_recipe, path)
    assert found.startswith(f"recipe {path}: ")
    assert message in found
    assert refusal(InputError, resolve, path) == found
    if not isinstance(value, list):
        assert message in refusal(UsageError, Recipe, **{key: value})


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "first_last", "residual_bits"])
def test_bits_from_2_to_8(name):
    assert [getattr(resolve(**{name: bits}), name) for bits in range(2, 9)] == list(range(2, 9))


@pytest.mark.parametrize("ranges", ["auto", *RULES])
def test_every_rule_is_a_value_of_ranges(ranges):
    assert resolve(ranges=ranges).ranges == ranges


def test_files_that_cannot_be_read(tmp_path, write):
    missing = tmp_path / "none.toml"
    assert refusal(InputError, resolve, missing).startswith(f"recipe {missing} cannot be read: ")
    assert "is not TOML" in refusal(InputError, load_recipe, write("samples = = 3"))
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(InputError, load_recipe, broken)
    assert "cannot be read" in refusal(InputError, load_recipe, tmp_path)


def test_a_recipe_is_plain_data():
    assert all(isinstance(value, str | int | bool | tuple) for value in asdict(BALANCED).values())


def test_rewrites_to_leave_out_must_exist():
    assert resolve(without=["FuseBranches"]).without == ("FuseBranches",)
    with pytest.raises(UsageError, match=r"no rewrite 'Fuse'; rewrites: FoldConstants, .*Equalize"):
        resolve(without=["Fuse"])


@pytest.mark.parametrize(("text", "bits"), [("w4a8", (4, 8)), ("w3", (3, 8)), ("w8a16", (8, 16)), ("w2a4", (2, 4))])
def test_bits_alone_are_balanced_with_them(text, bits):
    assert resolve(text) == replace(BALANCED, weight_bits=bits[0], activation_bits=bits[1])
    assert resolve(text, seed=3, weight_bits=6).weight_bits == 6


def test_bits_outside_the_range_are_refused_as_such():
    assert refusal(UsageError, resolve, "w4a12") == "activation-bits takes 2 to 8 or 16, not 12."


LAYERS = """
weight_bits = 4
[[layers]]
match = "*/attn/*"
op = "MatMul"
weights.bits = 8
activations.bits = 16
[[layers]]
op = "Conv"
float = true
[[layers]]
match = "head"
weights = { bits = 6 }
ranges = "mae"
per_channel = false
"""


def test_layers_have_tables_of_their_own(write):
    recipe = load_recipe(write(LAYERS))
    assert recipe.layers == (
        Override("*/attn/*", "MatMul", 8, 16),
        Override(op="Conv", keep_float=True),
        Override("head", weight_bits=6, ranges="mae", per_channel=False),
    )
    assert recipe.weight_bits == 4
    assert tomllib.loads(recipe_toml(recipe))["layers"] == tomllib.loads(LAYERS)["layers"]
    assert "weights.bits = 8" in recipe_toml(recipe).splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mach = "a"', "[[layers]] has no key 'mach'. Did you mean 'match'?"),
        ('match = "a"\nweights.bit = 4', "[[layers]] has no key 'weights.bit'. Did you mean 'weights.bits'?"),
        ('match = "a"\nweight_bits = 4', "[[layers]] has no key 'weight_bits'. Did you mean 'weights.bits'?"),
        ('match = "a"\nweights = 4', "[[layers]] has no key 'weights'. Did you mean 'weights.bits'?"),
        ('match = "a"\nweights.bits = 9', "[[layers]] match = 'a' takes 2 to 8 for weights.bits, not 9."),
        ('match = "a"\nweights.bits = 16', "[[layers]] match = 'a' takes 2 to 8 for weights.bits, not 16."),
        ('op = "b"\nactivations.bits = 12', "op = 'b' takes 2 to 8 or 16 for activations.bits, not 12."),
        ('match = "a"\nweights.bits = "4"', "takes a whole number for weights.bits, not '4'."),
        ('match = "a"\nweights.bits = true', "takes a whole number for weights.bits, not True."),
        ('match = "a"\nfloat = 1', "takes true or false for float, not 1."),
        ("match = 3\nfloat = true", "takes a string for match, not 3."),
        ('match = "a"\nranges = "mea"', "for ranges, not 'mea'. Did you mean"),
        ('match = "a"\nweights.codebook = 5', "takes 1 to 4 for weights.codebook, not 5."),
        ('match = "a"\nweights.codebook = 0', "takes 1 to 4 for weights.codebook, not 0."),
        ('match = "a"\nweights.codebook = 2\nweights.bits = 4', "gives weights.bits and weights.codebook"),
        ('match = "a"\nfloat = true\nweights.codebook = 4', "asks for float and for bits"),
        ('match = "a"', "[[layers]] match = 'a' says nothing about its layers"),
        ("weights.bits = 4", "[[layers]] chooses no layer: give match"),
        ('match = "a"\nfloat = true\nweights.bits = 4', "asks for float and for bits"),
    ],
)
def test_tables_that_make_no_sense_are_refused(text, message, write):
    path = write(f"[[layers]]\n{text}\n")
    found = refusal(InputError, load_recipe, path)
    assert found.startswith(f"recipe {path}: ")
    assert message in found


@pytest.mark.parametrize("text", ['layers = "a"', "layers = [3]", "[layers]\nmatch = 3"])
def test_layers_must_be_tables(text, write):
    assert "layers takes a list of tables, not" in refusal(InputError, load_recipe, write(text))


def test_budgets_decide_bits_but_leave_layers_in_float():
    kept = Override("a", keep_float=True)
    assert resolve(max_size="0.2x", layers=[kept]).layers == (kept,)
    message = refusal(UsageError, resolve, max_size="0.2x", layers=[{"match": "a", "activations": {"bits": 8}}])
    assert message.startswith("budgets decide the bits of every layer")


NODES = {"/a/conv": "Conv", "/a/attn/MatMul": "MatMul", "/B/attn/Gemm": "Gemm", "/a/attn/Softmax": "Softmax"}


def test_later_tables_hold_before_earlier_ones_key_by_key():
    found = settle(
        [
            Override("/a/*", weight_bits=4, activation_bits=6, per_channel=False),
            Override("*/attn/*", weight_bits=5),
            Override(op="Softmax", keep_float=True),
            Override("/?/attn/*", "Softmax", ranges="mae"),
        ],
        NODES,
    )
    assert list(found) == ["/a/conv", "/a/attn/MatMul", "/a/attn/Softmax", "/B/attn/Gemm"]
    values = {
        name: (entry.weight_bits, entry.activation_bits, entry.keep_float, entry.ranges, entry.per_channel)
        for name, entry in found.items()
    }
    assert values["/a/conv"] == (4, 6, False, None, False)
    assert values["/a/attn/MatMul"] == (5, 6, False, None, False)
    assert values["/B/attn/Gemm"] == (5, None, False, None, None)
    assert values["/a/attn/Softmax"] == (None, None, True, "mae", False)


def test_of_bits_and_codebooks_the_later_one_holds():
    tables = [
        Override("/a/*", weight_bits=4, activation_bits=6),
        Override("/a/attn/*", codebook_bits=3),
        Override("/B/*", codebook_bits=2),
        Override("*/Gemm", weight_bits=5),
    ]
    found = {name: (entry.weight_bits, entry.codebook_bits) for name, entry in settle(tables, NODES).items()}
    assert found["/a/conv"] == (4, None)
    assert found["/a/attn/MatMul"] == (None, 3)
    assert found["/B/attn/Gemm"] == (5, None)
    kept = settle([Override("/a/conv", codebook_bits=3), Override("/a/conv", keep_float=True)], NODES)["/a/conv"]
    assert (kept.keep_float, kept.codebook_bits) == (True, None)
    back = settle([Override("/a/conv", keep_float=True), Override("/a/conv", codebook_bits=3)], NODES)["/a/conv"]
    assert (back.keep_float, back.codebook_bits) == (False, 3)


def test_bits_bring_back_what_was_left_in_float():
    rows = [Override("*", keep_float=True), Override("/a/conv", activation_bits=8)]
    found = settle(rows, NODES)
    assert {name for name, entry in found.items() if entry.keep_float} == set(NODES) - {"/a/conv"}
    assert settle(rows[::-1], NODES)["/a/conv"].keep_float
    assert settle([*rows, Override(op="Gemm", keep_float=False)], NODES)["/B/attn/Gemm"].keep_float is False


def test_names_are_told_apart_by_upper_and_lower_case():
    assert set(settle([Override("/b/*", weight_bits=4)], NODES)) == set()
    assert set(settle([Override("/[B]/*", weight_bits=4)], NODES)) == {"/B/attn/Gemm"}
