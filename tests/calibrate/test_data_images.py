"""Images: layout, size, crop, channels, normalisation, and pictures that cannot be used."""

import json
import subprocess
import sys

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
    last = [batch["x"] for batch in open_data(tmp_path, spec(4, 5, 3), preprocess=PREPROCESS["raw"])]
    assert np.array_equal(last[0], first)


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
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    got = one(tmp_path, spec("N", 2, 2, 3), PREPROCESS["raw"])[0]
    assert got[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    got = one(tmp_path, spec("N", 16, 8, 3))[0]
    assert got[:8].max() < 0.1
    assert got[8:].min() > 0.9


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


def test_pillow_is_imported_only_for_pictures():
    code = "import sys, onnxq.calibrate.data; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_single_image(tmp_path):
    save(tmp_path / "a.png", noise(2, 2))
    assert one(tmp_path / "a.png", spec("N", 3, 2, 2)).shape == (1, 3, 2, 2)


def test_provenance_tells_the_preprocessing(tmp_path):
    save(tmp_path / "a.png", noise(20, 30))
    data = open_data(tmp_path / "a.png", spec("N", 8, 8, 3), preprocess=PREPROCESS["imagenet-caffe"], samples=9)
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
