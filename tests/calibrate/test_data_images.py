"""Images: layout, size, crop, channels, normalisation, and pictures that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from onnxq.calibrate.data import PREPROCESS, Preprocess, open_data
from onnxq.calibrate.data import pictures as pictures_module
from onnxq.errors import DataError, UsageError
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


def test_mean_and_std_are_per_channel_after_scaling(tmp_path):
    pixels = save(tmp_path / "a.png", noise(4, 5))
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.8])
    got = one(tmp_path, spec("N", 3, 4, 5), Preprocess((0.1, 0.2, 0.3), (0.5, 0.6, 0.8)))
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_bgr_turns_the_channels_before_the_mean(tmp_path):
    pixels = save(tmp_path / "a.png", noise(4, 5))
    got = one(tmp_path, spec("N", 3, 4, 5), PREPROCESS["imagenet-caffe"])
    expected = pixels[:, :, ::-1] - np.array([103.939, 116.779, 123.68])
    np.testing.assert_allclose(got[0].transpose(1, 2, 0), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "at_0", "at_255"),
    [
        ("unit", 0, 1),
        ("signed", -1, 1),
        ("inception", -1, 1),
        ("raw", 0, 255),
        ("imagenet", [-2.117904, -2.035714, -1.804444], [2.248908, 2.428571, 2.64]),
        ("clip", [-1.792263, -1.752097, -1.480222], [1.930336, 2.074884, 2.145897]),
        ("imagenet-caffe", [-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
    ],
)
def test_named_preprocessing_at_black_and_white(tmp_path, name, at_0, at_255):
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[1] = 255
    save(tmp_path / "a.png", pixels)
    got = one(tmp_path, spec("N", 2, 2, 3), PREPROCESS[name])[0]
    np.testing.assert_allclose(got[0, 0], np.broadcast_to(at_0, 3), rtol=0, atol=1e-4)
    np.testing.assert_allclose(got[1, 0], np.broadcast_to(at_255, 3), rtol=0, atol=1e-4)
    assert set(PREPROCESS) >= {"imagenet", "imagenet-caffe", "unit", "signed", "raw", "clip", "inception"}


def test_without_preprocessing_pixels_are_divided_by_255_and_this_is_noted(tmp_path):
    pixels = save(tmp_path / "a.png", noise(4, 5))
    data = open_data(tmp_path, spec("N", 4, 5, 3))
    assert data.provenance["notes"] == {"normalisation": "none given: pixels / 255"}
    (batch,) = data
    np.testing.assert_allclose(batch["x"][0], pixels / 255, rtol=0, atol=1e-7)


@pytest.mark.parametrize("preprocess", [None, Preprocess(mean=(0.5,), std=(0.5,))])
def test_a_uint8_model_gets_the_pixels(tmp_path, preprocess):
    pixels = save(tmp_path / "a.png", noise(4, 5))
    data = open_data(tmp_path, spec(1, 4, 5, 3, dtype="uint8"), preprocess=preprocess)
    (batch,) = data
    assert batch["x"].dtype == np.uint8
    assert np.array_equal(batch["x"][0], pixels)
    assert data.provenance["notes"] == {"normalisation": "none: the model takes uint8 pixels"}


def test_half_precision_models(tmp_path):
    save(tmp_path / "a.png", noise(4, 5))
    assert one(tmp_path, spec("N", 3, 4, 5, dtype="float16")).dtype == np.float16


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (("N", 3, 6, 6), "NCHW"),
        (("N", 6, 6, 3), "NHWC"),
        (("N", 3, 6, 3), "NCHW"),
        (("N", None, 6, 6), "NCHW"),
        (("N", 6, 6, "C"), "NHWC"),
        (("N", 3, "H", "W"), "NCHW"),
        (("N", None, None, 3), "NHWC"),
    ],
)
def test_layout_is_deduced(tmp_path, shape, layout):
    size = (6, 3) if shape == ("N", 3, 6, 3) else (6, 6)
    pixels = save(tmp_path / "a.png", noise(*size))
    data = open_data(tmp_path, spec(*shape), preprocess=PREPROCESS["raw"])
    assert data.provenance["layout"] == layout
    (batch,) = data
    expected = pixels if layout == "NHWC" else pixels.transpose(2, 0, 1)
    assert np.array_equal(batch["x"][0], expected)


def test_layout_can_be_given(tmp_path):
    pixels = save(tmp_path / "a.png", noise(3, 6))
    got = one(tmp_path, spec("N", 3, 6, 3), Preprocess(scale=1, layout="NHWC"))
    assert np.array_equal(got[0], pixels)
    assert "give the preprocessing a layout" in refusal(tmp_path, spec("N", "a", "b", "c"))
    assert one(tmp_path, spec("N", "a", "b", "c"), Preprocess(layout="NCHW")).shape == (1, 3, 3, 6)


def test_a_model_without_a_row_axis(tmp_path):
    first = save(tmp_path / "1.png", noise(4, 5, seed=1))
    save(tmp_path / "2.png", noise(4, 5, seed=2))
    data = open_data(tmp_path, spec(3, 4, 5), preprocess=PREPROCESS["raw"])
    got = [batch["x"] for batch in data]
    assert [a.shape for a in got] == [(3, 4, 5)] * 2
    assert np.array_equal(got[0], first.transpose(2, 0, 1))
    assert data.provenance["unit"] == "batch"


def test_one_channel_models_get_grey(tmp_path):
    pixels = save(tmp_path / "a.png", noise(4, 5))
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(one(tmp_path, spec("N", 1, 4, 5), PREPROCESS["raw"])[0, 0], grey)
    assert np.array_equal(one(tmp_path, spec("N", 4, 5, 1), PREPROCESS["raw"])[0, :, :, 0], grey)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "1", "I;16"])
def test_every_kind_of_png_becomes_rgb(tmp_path, mode):
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        assert image.mode == mode
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    image.save(tmp_path / "a.png")
    got = one(tmp_path, spec("N", 2, 2, 3), PREPROCESS["raw"])[0]
    assert np.array_equal(got, np.repeat(grey[:, :, None], 3, axis=2))


def test_16_bit_grey_keeps_its_high_byte(tmp_path):
    Image.fromarray(np.array([[0x12FF, 0xAB00]], np.uint16)).save(tmp_path / "a.png")
    assert one(tmp_path, spec("N", 1, 1, 2), PREPROCESS["raw"]).ravel().tolist() == [0x12, 0xAB]


def test_palette_with_transparency_needs_no_warning(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert one(tmp_path, spec("N", 1, 2, 3), PREPROCESS["raw"])[0, 0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    got = one(tmp_path, spec("N", 16, 8, 3))[0]
    assert got[:8].max() < 0.1
    assert got[8:].min() > 0.9


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


def test_bicubic(tmp_path):
    pixels = save(tmp_path / "a.png", noise(20, 20))
    got = one(tmp_path, spec("N", 8, 8, 3), Preprocess(scale=1, resize=1.0, resample="bicubic"))
    assert np.array_equal(got[0], resized(pixels, 8, 8, Image.Resampling.BICUBIC))
    assert PREPROCESS["clip"].resample == "bicubic"


@pytest.mark.parametrize(
    ("resize", "size"), [((6, 9), (6, 9)), (7, (7, 7)), (0.875, (224, 224)), (None, (20, 30))]
)
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


def test_rows_come_in_natural_order_from_all_folders_and_are_batched(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    names = ["2.png", "10.PNG", "b/1.bmp", "b/3.webp", "b/._4.png", ".hidden/0.png", "notes.txt"]
    for i, name in enumerate(names):
        path = tmp_path / name
        if path.suffix == ".txt":
            path.write_text("")
        else:
            save(path, np.full((2, 2, 3), i, np.uint8), **({"lossless": True} if "webp" in name else {}))
    data = open_data(tmp_path, spec("N", 3, 2, 2), preprocess=PREPROCESS["raw"], batch=3)
    assert [b["x"][:, 0, 0, 0].tolist() for b in data] == [[0, 1, 2], [3]]
    assert data.provenance["files"] == {"found": 4, "used": 4}


def test_batches_of_32_by_default_and_the_models_own_where_fixed(tmp_path):
    for i in range(70):
        save(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
    dynamic = open_data(tmp_path, spec("N", 1, 2, 2))
    assert [len(b["x"]) for b in dynamic] == [32, 32, 6]
    assert dynamic.provenance["batch"] == 32
    assert [len(b["x"]) for b in open_data(tmp_path, spec(25, 1, 2, 2))] == [25, 25]
    assert [len(b["x"]) for b in open_data(tmp_path, spec("N", 1, 2, 2), samples=40)] == [32, 8]


def test_a_capped_folder_is_sampled_evenly(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
    got = one(tmp_path, spec("N", 1, 2, 2), PREPROCESS["raw"], samples=5)
    assert got[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]


def test_pictures_are_decoded_when_their_batch_comes(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", noise(2, 2))
    (tmp_path / "3.png").write_bytes(b"broken")
    batches = iter(open_data(tmp_path, spec("N", 3, 2, 2), batch=2))
    assert next(batches)["x"].shape == (2, 3, 2, 2)
    with pytest.raises(DataError, match=r"3\.png is no readable JPEG, PNG, BMP or WebP image"):
        next(batches)


def test_a_single_image(tmp_path):
    save(tmp_path / "a.png", noise(2, 2))
    assert one(tmp_path / "a.png", spec("N", 3, 2, 2)).shape == (1, 3, 2, 2)


def test_provenance_tells_the_preprocessing(tmp_path):
    save(tmp_path / "a.png", noise(20, 30))
    data = open_data(
        tmp_path / "a.png", spec("N", 8, 8, 3), preprocess=PREPROCESS["imagenet-caffe"], samples=9
    )
    assert json.loads(json.dumps(data.provenance)) == {
        "kind": "images",
        "layout": "NHWC",
        "channels": "bgr",
        "size": [8, 8],
        "resizing": "until 8x8 keeps 0.875 of the short side, centre crop to 8x8",
        "preprocess": {
            "mean": [103.939, 116.779, 123.68],
            "std": None,
            "resize": 0.875,
            "scale": 1.0,
            "resample": "bilinear",
        },
        "name": "a.png",
        "files": {"found": 1, "used": 1},
        "samples": 9,
        "batch": 32,
        "unit": "row",
        "notes": {},
    }


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
        {"mean": (0.1, 0.2)},
        {"mean": (float("nan"),)},
        {"std": (0.0,)},
        {"std": (0.1, 0.2, -0.3)},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"resize": 0},
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
