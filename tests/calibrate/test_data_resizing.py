"""From pictures of any size to the size the model takes."""

import numpy as np
import pytest
from PIL import Image

from onnxq.calibrate.data import PREPROCESS, Preprocess, open_data
from onnxq.errors import DataError
from onnxq.types import InputSpec


def spec(*shape, dtype="float32"):
    return (InputSpec("x", dtype, shape),)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return pixels


def one(source, inputs, preprocess=None, **options):
    (batch,) = open_data(source, inputs, preprocess=preprocess, **options)
    return batch["x"]


def refusal(source, inputs, preprocess=None, error=DataError, **options):
    with pytest.raises(error) as caught:
        list(open_data(source, inputs, preprocess=preprocess, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def resized(pixels, height, width, filter_=Image.Resampling.BILINEAR):
    return np.asarray(Image.fromarray(pixels).resize((width, height), filter_))


def test_another_size_is_resized_whatever_its_proportions_and_noted(tmp_path):
    pixels = save(tmp_path / "a.png", noise(20, 30))
    data = open_data(tmp_path, spec("N", 8, 10, 3), preprocess=PREPROCESS["raw"])
    (batch,) = data
    assert np.array_equal(batch["x"][0], resized(pixels, 8, 10))
    note = "pictures of another size became 8x10, whatever their proportions"
    assert data.provenance["notes"] == {"resized": note}
    assert data.provenance["resizing"] == "to 8x10"


@pytest.mark.parametrize(
    ("size", "resize", "new", "corner"),
    [
        ((20, 30), 12, (12, 18), (2, 4)),
        ((30, 20), 12, (18, 12), (5, 1)),
        ((33, 20), 13, (21, 13), (6, 2)),
        ((20, 30), 8, (8, 12), (0, 1)),
        ((20, 90), 4, (8, 36), (0, 13)),
        ((90, 20), 4, (45, 10), (18, 0)),
        ((20, 30), 0.8, (10, 15), (1, 2)),
        ((20, 30), 1.0, (8, 12), (0, 1)),
        ((20, 30), (12, 14), (12, 14), (2, 2)),
        ((20, 30), (8, 14), (8, 14), (0, 2)),
    ],
)
def test_resizing_then_cropping_at_the_centre(tmp_path, size, resize, new, corner):
    pixels = save(tmp_path / "a.png", noise(*size))
    got = one(tmp_path, spec("N", 8, 10, 3), Preprocess(scale=1, resize=resize))[0]
    top, left = corner
    assert np.array_equal(got, resized(pixels, *new)[top : top + 8, left : left + 10])


@pytest.mark.parametrize(("side", "short"), [(224, 256), (299, 342), (384, 439), (32, 37)])
def test_imagenet_keeps_its_crop_at_every_size(tmp_path, side, short):
    pixels = save(tmp_path / "a.png", noise(500, 500))
    half = Preprocess(scale=1, resize=PREPROCESS["imagenet"].resize)
    got = one(tmp_path, spec("N", side, side, 3), half)[0]
    edge = round((short - side) / 2)
    assert np.array_equal(got, resized(pixels, short, short)[edge : edge + side, edge : edge + side])


@pytest.mark.parametrize("resize", [None, 12, 0.5, (12, 12)])
def test_a_picture_of_the_models_size_is_left_alone(tmp_path, resize):
    pixels = save(tmp_path / "a.png", noise(8, 10))
    got = one(tmp_path, spec("N", 8, 10, 3), Preprocess(scale=1, resize=resize))
    assert np.array_equal(got[0], pixels)


@pytest.mark.parametrize(
    ("resize", "words"),
    [
        (None, "to 8x10"),
        (12, "short side to 12, centre crop to 8x10"),
        ((9, 11), "to 9x11, centre crop to 8x10"),
        (0.5, "until 8x10 keeps 0.5 of the short side, centre crop to 8x10"),
    ],
)
def test_the_provenance_says_how(tmp_path, resize, words):
    save(tmp_path / "a.png", noise(8, 10))
    data = open_data(tmp_path, spec("N", 8, 10, 3), preprocess=Preprocess(resize=resize))
    assert data.provenance["resizing"] == words


def test_bicubic(tmp_path):
    pixels = save(tmp_path / "a.png", noise(20, 20))
    got = one(tmp_path, spec("N", 8, 8, 3), Preprocess(scale=1, resize=1.0, resample="bicubic"))
    assert np.array_equal(got[0], resized(pixels, 8, 8, Image.Resampling.BICUBIC))
    assert PREPROCESS["clip"].resample == "bicubic"


@pytest.mark.parametrize(("resize", "size"), [((6, 9), (6, 9)), (7, (7, 7)), (0.875, (224, 224)), (None, (20, 30))])
def test_a_model_of_any_size(tmp_path, resize, size):
    save(tmp_path / "a.png", noise(20, 30))
    assert one(tmp_path, spec("N", 3, "H", "W"), Preprocess(resize=resize)).shape == (1, 3, *size)


def test_a_model_with_one_fixed_side(tmp_path):
    save(tmp_path / "a.png", noise(20, 30))
    assert one(tmp_path, spec("N", 3, 20, "W")).shape == (1, 3, 20, 30)
    assert refusal(tmp_path, spec("N", 3, 8, "W")) == (
        f"{tmp_path.name}/a.png is 20x30 pixels, the model takes 8x?: give a size to resize to"
    )
    assert one(tmp_path, spec("N", 3, 8, "W"), Preprocess(resize=(9, 16))).shape == (1, 3, 8, 16)


def test_own_sizes_must_agree_within_a_batch(tmp_path):
    save(tmp_path / "1.png", noise(4, 5))
    save(tmp_path / "2.png", noise(4, 6))
    inputs = spec("N", 3, "H", "W")
    name = tmp_path.name
    assert refusal(tmp_path, inputs) == (
        f"{name}/2.png: [3, 4, 6] does not stack with [3, 4, 5] of {name}/1.png: "
        "give a size to resize to, or a batch of 1"
    )
    assert [b["x"].shape[3] for b in open_data(tmp_path, inputs, batch=1)] == [5, 6]
