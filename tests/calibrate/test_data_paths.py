"""Files and folders: which are taken, in what order, and what is said where there are none."""

import numpy as np
import pytest

from onnxq.calibrate.data import open_data
from onnxq.calibrate.data.files import natural
from onnxq.errors import DataError, EnvironmentFault
from onnxq.types import InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)


def rows(count, width=3):
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def refusal(source, inputs=X, error=DataError):
    with pytest.raises(error) as caught:
        list(open_data(source, inputs))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration").mkdir()
    assert refusal("calibraton") == "calibraton: no such file or folder: did you mean calibration?"
    assert refusal("zzz") == (
        "zzz: no such file or folder: give a folder of images, .npz or .npy files, one such file, or module:callable"
    )
    assert "(there is no folder nowhere)" in refusal("nowhere/x.npz")
    assert "the name of the data is empty" in refusal("")


def test_a_folder_without_data(tmp_path):
    name = tmp_path.name
    assert f"{name}: no data in this folder (it is empty)" in refusal(tmp_path)
    for file in ("a.gif", "b.GIF", "c.txt", "README"):
        (tmp_path / file).write_text("")
    assert refusal(tmp_path) == (
        f"{name}: no data in this folder (found only 2 .gif, 1 without extension, 1 .txt): "
        "put .jpg .jpeg .png .bmp .webp .npz .npy files there"
    )


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("")
    assert refusal(tmp_path / "a.csv").startswith("a.csv is not data that can be read here: give a folder")


def test_two_kinds_in_one_folder(tmp_path):
    (tmp_path / "a.png").write_text("")
    np.save(tmp_path / "b.npy", rows(1))
    assert refusal(tmp_path) == (f"{tmp_path.name} holds images (1) and arrays (1): keep one kind in the folder")


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    np.save(outside / "0.npy", rows(1))
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    assert [len(b["x"]) for b in open_data(inside, X)] == [1]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", denied)
    message = refusal(tmp_path, error=EnvironmentFault)
    assert message == f"{tmp_path.name}: cannot be listed (Permission denied): check its permissions"


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("0.npy", rows(1))
    assert open_data(".", X).provenance["name"] == tmp_path.name


def test_natural_order():
    names = ["10", "9", "a10b2", "a10b10", "a9", "a", "A1", "09"]
    assert sorted(names, key=lambda name: natural([name])) == [
        "09",
        "9",
        "10",
        "A1",
        "a",
        "a9",
        "a10b2",
        "a10b10",
    ]
