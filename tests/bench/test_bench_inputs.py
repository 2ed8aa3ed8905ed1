import numpy as np
import pytest

from onnxq.bench import make_feeds, parse_shapes
from onnxq.bench.inputs import fixed_batch, merge_specs
from onnxq.errors import DataError, UsageError
from onnxq.types import InputSpec


def test_shapes_are_parsed_and_names_may_hold_colons():
    found = parse_shapes(["input:1,3,224,224", "serving/ids:0:1, 64"])
    assert found == {"input": (1, 3, 224, 224), "serving/ids:0": (1, 64)}


@pytest.mark.parametrize("text", ["1,3,224,224", "input:", "input:1,x", "input:1,-3", "input:0,3", ":1,3", "input"])
def test_a_malformed_shape_is_a_usage_error_that_shows_the_form(text):
    with pytest.raises(UsageError, match=r"is not a shape.*input:1,3,224,224"):
        parse_shapes([text])


def test_a_shape_given_twice_is_a_usage_error():
    with pytest.raises(UsageError, match=r"'x' is given twice"):
        parse_shapes(["x:1,2", "x:1,3"])


IMAGE = InputSpec("image", "float32", ("N", 3, "H", "W"))
IDS = InputSpec("input_ids", "int64", ("batch", "sequence"))
MASK = InputSpec("attention_mask", "int64", ("batch", "sequence"))
TYPES = InputSpec("token_type_ids", "int64", ("batch", "sequence"))


def test_random_inputs_have_plausible_sizes_and_values():
    feeds = make_feeds([IMAGE, IDS, MASK, TYPES], 2)
    assert feeds["image"].shape == (2, 3, 224, 224)
    assert feeds["image"].dtype == np.float32
    assert abs(feeds["image"].mean()) < 0.02
    assert feeds["image"].std() == pytest.approx(1.0, abs=0.02)
    assert feeds["input_ids"].shape == (2, 128)
    assert (feeds["input_ids"].min(), feeds["input_ids"].max()) == (0, 9)
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    assert all(feeds[name].dtype == np.int64 for name in ("input_ids", "attention_mask", "token_type_ids"))


def test_random_inputs_depend_on_the_seed_only():
    first, again, other = (make_feeds([IDS], 4, seed=seed)["input_ids"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_other_types_of_input():
    feeds = make_feeds([InputSpec("flag", "bool", (3,)), InputSpec("half", "float16", (1, 5))], 1)
    assert feeds["flag"].dtype == bool
    assert feeds["flag"].all()
    assert feeds["half"].dtype == np.float16
    with pytest.raises(UsageError, match=r"words.*give data"):
        make_feeds([InputSpec("words", "object", (1,))], 1)


def test_channels_last_images_get_spatial_axes_too():
    feeds = make_feeds([InputSpec("image", "float32", (None, "h", "w", 3))], 1)
    assert feeds["image"].shape == (1, 224, 224, 3)


def test_an_unknown_size_is_a_usage_error_that_names_the_input_and_the_option():
    with pytest.raises(UsageError, match=r"axis 1 of input signal: float32\[N,samples\].*--shape signal:4,128"):
        make_feeds([InputSpec("signal", "float32", ("N", "samples"))], 4)


def test_given_shapes_fix_free_axes_and_the_batch_stays_free():
    feeds = make_feeds([IDS, MASK], 3, shapes={"input_ids": (1, 20)})
    # The mask's axis has the same name, so it gets the same size.
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (3, 20)


@pytest.mark.parametrize("sizes", [(1, 4, 8, 8), (1, 3, 8)])
def test_a_shape_that_does_not_fit_is_a_usage_error(sizes):
    with pytest.raises(UsageError, match=r"does not fit input image: float32\[N,3,H,W\]"):
        make_feeds([IMAGE], 1, shapes={"image": sizes})


def test_a_shape_of_an_unknown_input_is_a_usage_error():
    with pytest.raises(UsageError, match=r"no input 'imgae'; the inputs are 'image'"):
        make_feeds([IMAGE], 1, shapes={"imgae": (1, 3, 8, 8)})


def test_the_first_axis_of_given_shapes_may_differ():
    feeds = make_feeds([IDS, MASK], 3, shapes={"input_ids": (1, 20), "attention_mask": (7, 20)})
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (3, 20)


def test_shapes_that_contradict_each_other_are_a_usage_error():
    with pytest.raises(UsageError, match=r"'sequence' both 20 and 30"):
        make_feeds([IDS, MASK], 1, shapes={"input_ids": (1, 20), "attention_mask": (1, 30)})


def test_real_rows_are_repeated_or_cut_to_the_batch():
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    spec = InputSpec("x", "float32", ("N", 2))
    assert make_feeds([spec], 2, feeds={"x": rows})["x"].tolist() == [[0, 1], [2, 3]]
    assert make_feeds([spec], 5, feeds={"x": rows})["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    fixed = InputSpec("x", "float32", (1, 2))
    assert make_feeds([fixed], 5, feeds={"x": rows})["x"].tolist() == [[0, 1]]


def test_missing_or_empty_rows_are_data_errors():
    spec = InputSpec("x", "float32", ("N", 2))
    with pytest.raises(DataError, match=r"no input 'x'; it has 'y'"):
        make_feeds([spec], 1, feeds={"y": np.zeros((1, 2), np.float32)})
    with pytest.raises(DataError, match=r"no rows for input 'x'"):
        make_feeds([spec], 1, feeds={"x": np.zeros((0, 2), np.float32)})


def test_merged_inputs_are_fixed_where_any_model_fixes_them():
    free, fixed = InputSpec("x", "float32", ("N", "C")), InputSpec("x", "float32", (1, "C"))
    merged = merge_specs({"a": [free], "b": [fixed]})
    assert merged == (fixed,)
    assert fixed_batch(merged) == 1
    assert fixed_batch([free]) is None


@pytest.mark.parametrize(
    "other",
    [
        InputSpec("y", "float32", ("N", 3)),
        InputSpec("x", "uint8", ("N", 3)),
        InputSpec("x", "float32", ("N", 4)),
        InputSpec("x", "float32", ("N", 3, 1)),
    ],
)
def test_models_with_other_inputs_cannot_be_compared(other):
    with pytest.raises(UsageError, match="a and b cannot be compared"):
        merge_specs({"a": [InputSpec("x", "float32", ("N", 3))], "b": [other]})
