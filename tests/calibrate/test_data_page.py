"""The examples of docs/data.md run, and what they write can be read."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxq.calibrate.data import PREPROCESS, open_data, open_labelled
from onnxq.types import InputSpec

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
IMAGE = (InputSpec("image", "float32", ("N", 3, 32, 32)),)
TEXT = tuple(InputSpec(name, "int64", ("N", "S")) for name in ("input_ids", "attention_mask"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go to a folder with the images that the page shows."""
    monkeypatch.chdir(tmp_path)
    for name in ("dog/0001.jpg", "cat/0002.png"):
        path = tmp_path / "calibration" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    yield tmp_path
    sys.modules.pop("loader", None)


def test_examples(folder, capsys):
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        if code.startswith("# loader.py"):
            (folder / "loader.py").write_text(code)
        exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "(2, 3, 32, 32)\n"
    assert [b["input_ids"].shape for b in open_data("batch.npz", TEXT)] == [(8, 128)]
    assert [len(b["image"]) for b in open_data("images.npy", IMAGE)] == [64, 36]
    assert [len(b["image"]) for b in open_data("loader:calibration", IMAGE)] == [8] * 16
    assert [labels.tolist() for _, labels in open_labelled("labelled.npz", IMAGE)] == [list(range(10))]
    assert [labels.tolist() for _, labels in open_labelled("calibration", IMAGE)] == [[0, 1]]


def test_every_named_preprocessing_is_on_the_page():
    table = PAGE.read_text("utf-8").partition("| name |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) == set(PREPROCESS)
