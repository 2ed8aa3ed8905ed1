"""`--codebook-bits` as users call it."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import onnxq
from onnxq.cli.main import _run as run
from onnxq.plan import load_plan

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
QUANTIZE = ["quantize", str(CNN), "--data", str(ROOT / "calibration_data" / "digits"), "--mean", "0.5", "--std", "0.5"]
FEW = ["--samples", "32", "--no-timing"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The shipped CNN in codebooks of 8 by a fresh process: (path, JSON document)."""
    folder = tmp_path_factory.mktemp("codebook")
    options = [*FEW, "--codebook-bits", "3", "--json", "-o", "out.onnx", "--report", "r.html", "--save-plan", "p.json"]
    command = [sys.executable, str(ROOT / "cli.py"), *QUANTIZE, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder / "out.onnx", json.loads(done.stdout)


def test_a_fresh_process_writes_codebooks_for_integer_kernels(made):
    path, document = made
    verdict = document["verdict"]
    assert document["recipe"]["codebook_bits"] == 3
    assert verdict["integer_coverage"] == 1.0
    assert verdict["kernels"]["QLinearConv"] == 10
    assert verdict["optimized_gap_steps"] <= 1
    assert verdict["sqnr_db"]["logits"] > 12
    assert verdict["quantized_bytes"] == path.stat().st_size < 0.17 * CNN.stat().st_size
    bits = [layer["weight_bits"] for layer in document["layers"].values()]
    books = [layer["codebook"] for layer in document["layers"].values()]
    assert (bits[0], bits[-1], books[0], books[-1]) == (8, 8, False, False)
    assert all(one == (3 if book else 8) for one, book in zip(bits, books, strict=True))
    assert sum(books) >= 7
    onnx.checker.check_model(str(path), full_check=True)


def test_inspect_and_the_report_see_the_same_bits(made):
    path, document = made
    layers = {layer.name: layer for layer in onnxq.inspect(path).layers}
    for name, said in document["layers"].items():
        assert layers[name].weight_bits == said["weight_bits"]
        assert (layers[name].codebook == 8) == said["codebook"]
    assert "W3 A8" in path.with_name("r.html").read_text(encoding="utf-8")


def test_the_saved_plan_emits_the_same_file_and_one_for_another_target(made, capsys):
    path, _ = made
    plan = path.with_name("p.json")
    assert run(["emit", str(plan), "-o", str(path.with_name("again.onnx")), "-q"]) == 0
    assert path.with_name("again.onnx").read_bytes() == path.read_bytes()
    assert run(["emit", str(plan), "--target", "tensorrt", "-o", str(path.with_name("trt.onnx")), "-q"]) == 0
    capsys.readouterr()
    before, after = (onnxq.inspect(path.with_name(name)).layers for name in ("out.onnx", "trt.onnx"))
    grids = load_plan(plan).weights
    for old, new in zip(before, after, strict=True):
        assert (new.name, new.packed, new.weight_dtype) == (old.name, False, "int8")
        if grids[old.name].values:
            assert new.codes == old.codes


def test_a_dry_run_names_codebooks(capsys):
    assert run([*QUANTIZE, *FEW, "--preset", "fast", "--codebook-bits", "2", "--dry-run", "-q"]) == 0
    assert capsys.readouterr().out.count("codebook of 2 bits") >= 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--codebook-bits", "5"], "codebook-bits takes 1 to 4, or 0 for none, not 5"),
        (["--codebook-bits", "3", "--weight-bits", "4"], "take one of them"),
        (["--codebook-bits", "3", "--preset", "w4a8"], "4 weight bits are two answers"),
        (["--codebook-bits", "3", "--max-size", "0.2x"], "budgets choose between uniform grids"),
        (["--codebook-bits", "3", "--max-drop", "0.01"], "budgets choose between uniform grids"),
        (["--codebook-bits", "3", "--preset", "advanced"], "add --reconstruction none"),
        (["--codebook-bits", "3", "--weight-only"], "leave --codebook-bits out"),
        (["--codebook-bits", "3", "--target", "tensorrt"], "--target tensorrt, which reads whole codes"),
    ],
)
def test_what_contradicts_a_codebook_is_one_line_with_exit_code_2(arguments, words, tmp_path, capsys):
    assert run([*QUANTIZE, *FEW, *arguments, "-o", str(tmp_path / "out.onnx"), "-q"]) == 2
    shown, error = capsys.readouterr()
    assert (shown, len(error.splitlines())) == ("", 1)
    assert words in error
    assert not list(tmp_path.iterdir())
