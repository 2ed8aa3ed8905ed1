"""Pictures, models and preprocessing that do not go together."""

import numpy as np
import pytest
from PIL import Image

from onnxq.calibrate.data import PREPROCESS, Preprocess, open_data
from onnxq.calibrate.data import pictures as pictures_module
from onnxq.errors import DataError, EnvironmentFault, UsageError
from onnxq.types import InputSpec


def spec(*shape, dtype="float32"):
    return (InputSpec("x", dtype, shape),)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return pixels


def refusal(source, inputs, preprocess=None, error=DataError, **options):
    with pytest.raises(error) as caught:
        list(open_data(source, inputs, preprocess=preprocess, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_other_formats_are_not_tried(tmp_path):
    Image.fromarray(noise(2, 2)).save(tmp_path / "a.png", format="GIF")
    assert "a.png is no readable JPEG" in refusal(tmp_path, spec("N", 3, 2, 2))


def test_a_truncated_picture(tmp_path):
    save(tmp_path / "a.jpg", noise(64, 64))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    assert "a.jpg is no readable JPEG" in refusal(tmp_path / "a.jpg", spec("N", 3, 64, 64))


@pytest.mark.parametrize("limit_of", ["onnxq", "pillow warns", "pillow raises"])
def test_decompression_bombs(tmp_path, monkeypatch, limit_of):
    save(tmp_path / "a.png", noise(30, 30))
    if limit_of == "onnxq":
        monkeypatch.setattr(pictures_module, "MAX_PIXELS", 899)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 899 if limit_of == "pillow warns" else 400)
    message = refusal(tmp_path / "a.png", spec("N", 3, 30, 30))
    assert message.startswith("a.png has more than")


@pytest.mark.parametrize(("error", "lack"), [(PermissionError, "permission"), (MemoryError, "memory")])
def test_the_machine_refuses(tmp_path, monkeypatch, error, lack):
    save(tmp_path / "a.png", noise(2, 2))

    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    message = refusal(tmp_path, spec("N", 3, 2, 2), error=EnvironmentFault)
    assert message == f"{tmp_path.name}/a.png: not enough {lack} to read it"


def test_a_sliver_is_not_blown_up(tmp_path):
    save(tmp_path / "a.png", noise(1, 4000))
    message = refusal(tmp_path / "a.png", spec("N", 3, 224, 224), PREPROCESS["imagenet"])
    assert message == "a.png is 1x4000 pixels, too long and narrow to be cropped: remove it"


@pytest.mark.parametrize(
    "inputs",
    [
        (InputSpec("ids", "int64", ("N", "S")),),
        (InputSpec("x", "float32", ("N", 3)),),
        (InputSpec("x", "int64", ("N", 3, 2, 2)),),
        (InputSpec("x", "float32", ("N", 3, 2, 2)), InputSpec("size", "int64", ("N", 2))),
    ],
)
def test_models_that_do_not_take_pictures(tmp_path, inputs):
    save(tmp_path / "a.png", noise(2, 2))
    message = refusal(tmp_path, inputs)
    assert "holds images, but the model takes" in message
    assert f"np.savez('calibration/000.npz', {inputs[0].name}=" in message


def test_channels_that_do_not_fit(tmp_path):
    save(tmp_path / "a.png", noise(2, 2))
    assert "give the preprocessing a layout" in refusal(tmp_path, spec("N", 4, 2, 2))
    four = refusal(tmp_path, spec("N", 4, 2, 2), Preprocess(layout="NCHW"))
    assert "images have 1 or 3 channels" in four
    for count, channels in ((3, "gray"), (1, "rgb"), (1, "bgr")):
        message = refusal(tmp_path, spec("N", count, 2, 2), Preprocess(channels=channels), UsageError)
        assert f"channels '{channels}' contradicts" in message
    message = refusal(tmp_path, spec("N", 1, 2, 2), PREPROCESS["imagenet"], UsageError)
    assert message == "preprocess: mean has 3 numbers, the model's input 1 channel"


def test_a_resize_below_the_models_size(tmp_path):
    save(tmp_path / "a.png", noise(2, 2))
    message = refusal(tmp_path, spec("N", 3, 8, 8), Preprocess(resize=(9, 7)), UsageError)
    assert message == "preprocess: resize (9, 7) is smaller than the model's (8, 8): give at least that"


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": (1.0,)},
        {"mean": (255.0,), "scale": 1.0},
        {"resize": 1},
        {"resize": 1.0},
        {"resize": (1, 1)},
    ],
)
def test_preprocessing_at_the_edge_of_sense(fields):
    assert Preprocess(**fields) is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": (0.1, 0.2)},
        {"mean": (float("nan"),)},
        {"mean": (0.5, 0.5, 1.01)},
        {"mean": (123.675, 116.28, 103.53)},
        {"std": (0.0,)},
        {"std": (0.1, 0.2, -0.3)},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"resize": 0},
        {"resize": 0.0},
        {"resize": 1.5},
        {"resize": (0, 4)},
        {"resize": (4,)},
        {"channels": "hsv"},
        {"layout": "CHW"},
        {"resample": "nearest"},
    ],
)
def test_preprocessing_that_makes_no_sense(fields):
    (name,) = fields
    with pytest.raises(UsageError, match=rf"preprocess: {name} .* not "):
        Preprocess(**fields)
