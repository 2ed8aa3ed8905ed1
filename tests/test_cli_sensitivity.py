"""`onnxq sensitivity` as users call it."""

import json
from pathlib import Path

import pytest

from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
COMMAND = [
    "sensitivity",
    str(CNN),
    "--data",
    str(ROOT / "calibration_data" / "digits"),
    "--mean",
    "0.5",
    "--std",
    "0.5",
]
QUICK = ["--rows", "16", "--points", "4", "--workers", "1"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return ["--cache", str(tmp_path_factory.mktemp("kept"))]


def test_the_document_says_what_every_layer_adds_and_what_to_choose(kept, tmp_path, capsys):
    saved = tmp_path / "found.json"
    assert run([*COMMAND, *QUICK, *kept, "--bits", "4,2", "--json", "--save", str(saved)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(saved.read_text()) == document
    assert (document["schema"], document["kind"]) == (1, "sensitivity")
    assert (document["rows"], document["float_bytes"]) == (16, CNN.stat().st_size)
    layers = [name for group in document["groups"] for name in group["layers"]]
    assert len(layers) == 11
    assert sorted(len(group["layers"]) for group in document["groups"]) == [1] * 9 + [2]
    for group in document["groups"]:
        assert list(group["added"]) == ["w8a8", "w4a8", "w2a8"]
        assert group["added"]["w8a8"]["output"] == 0.0
    sizes = [point["size_bytes"] for point in document["front"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= 3
    assert set(document["front"][-1]["bits"].values()) == {"w2a8"}
    assert document["additivity"] is None


def test_the_tables_show_the_front_and_what_was_measured(kept, capsys):
    assert run([*COMMAND, *QUICK, *kept, "--bits", "4,2", "--check", "-q"]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert "noise over signal at the outputs; everything at 8 bits:" in found.out
    assert "w4a8" in found.out
    assert "and 1 with the same input" in found.out
    assert "11 w2a8" in found.out
    assert "measured" in found.out
    assert "rank correlation of predicted and measured" in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--bits", "1"], "--bits takes bits from 2 to 8"), (["--save", str(CNN)], "is the input model"),
     (["--points", "1"], "--points"), (["--rows", "0"], "--rows")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    assert run([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err
