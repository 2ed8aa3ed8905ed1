"""`onnxq emit` as users call it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "calibration_data" / "digits"
NORMALISE = ["--mean", "0.5", "--std", "0.5"]


def process(*arguments, folder):
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The shipped CNN quantized for the CPU by a fresh process, with its plan."""
    folder = tmp_path_factory.mktemp("emit")
    options = ["-o", "cpu.onnx", "--save-plan", "plan.json", "--target", "cpu", "--no-timing", "-q", "--samples", "64"]
    done = process("quantize", CNN, "--data", DATA, *NORMALISE, *options, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_fresh_process_emits_the_same_bytes(kept):
    done = process("emit", "plan.json", "-o", "again.onnx", folder=kept)
    assert done.returncode == 0, done.stderr
    assert (kept / "again.onnx").read_bytes() == (kept / "cpu.onnx").read_bytes()
    assert done.stdout.splitlines()[-1] == "wrote again.onnx"


def test_another_target_says_what_changed(kept, capsys):
    assert run(["emit", str(kept / "plan.json"), "--target", "tensorrt", "-o", str(kept / "trt.onnx"), "-q"]) == 0
    shown, error = capsys.readouterr()
    assert error == ""
    assert "target tensorrt: 11 layers in integers" in shown
    assert "from uint8 to int8, around zero" in shown
    made = onnx.load(kept / "trt.onnx")
    zeros = {entry.name: onnx.numpy_helper.to_array(entry) for entry in made.graph.initializer}
    points = [zeros[node.input[2]] for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert points
    assert all(point.dtype == np.int8 and point == 0 for point in points)


def test_cuda_says_that_it_has_no_integers(kept, capsys):
    assert run(["emit", str(kept / "plan.json"), "--target", "cuda", "-o", str(kept / "half.onnx"), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "nodes in float16" in shown
    assert "no integer kernels" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{plan}", "--target", "tpu", "-o", "{out}"], 2, ["there is no target 'tpu'"]),
        (["{plan}"], 2, ["--output"]),
        (["{plan}", "-o", "{plan}"], 2, ["is the input model"]),
        (["{plan}", "-o", "{model}"], 2, ["is the input model"]),
        (["{gone}", "-o", "{out}"], 3, ["gone.json", "cannot be read"]),
        (["{model}", "-o", "{out}"], 3, ["cannot be read"]),
        (["{plan}", "-o", "{out}", "--model", "{cpu}"], 3, ["its SHA-256 is another"]),
        (["{plan}", "-o", "{out}", "--model", "{gone}"], 3, ["gone.json"]),
        (["{plan}", "-o", "{nowhere}"], 6, ["does not exist"]),
    ],
)
def test_what_cannot_be_done_is_one_line(kept, capsys, arguments, code, words):
    places = {
        "plan": kept / "plan.json", "out": kept / "out.onnx", "gone": kept / "gone.json", "model": CNN,
        "cpu": kept / "cpu.onnx", "nowhere": kept / "no" / "out.onnx",
    }  # fmt: skip
    before = CNN.read_bytes(), (kept / "plan.json").read_bytes()
    assert run(["emit", *(part.format(**places) for part in arguments), "-q"]) == code
    error = capsys.readouterr().err
    assert error.startswith("onnxq: error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (kept / "out.onnx").exists()
    assert (CNN.read_bytes(), (kept / "plan.json").read_bytes()) == before


def test_quantize_says_what_was_not_measured(tmp_path, capsys):
    common = ["quantize", str(CNN), "--data", str(DATA), *NORMALISE, "--samples", "32", "--preset", "fast"]
    command = [*common, "--target", "tensorrt", "-o", str(tmp_path / "trt.onnx")]
    assert run([*command, "--json", "--report", str(tmp_path / "page.html")]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["integer_coverage_planned"] is True
    assert verdict["optimized_gap_steps"] is None
    assert verdict["latency_ratio"] is None
    assert verdict["notes"][0].startswith("not timed")
    assert "TensorrtExecutionProvider is not here" in (tmp_path / "page.html").read_text()
    command = [*common, "--target", "cuda", "-o", str(tmp_path / "half.onnx"), "--report", str(tmp_path / "half.html")]
    assert run(command) == 0
    shown, error = capsys.readouterr()
    assert "CUDA provider has no integer kernels" in error
    assert "integer coverage, planned" in shown
    assert "note: not timed: the provider CUDAExecutionProvider is not here" in shown
    assert "latency" not in shown


def test_portable_says_what_saturation_would_cost(tmp_path, capsys):
    common = ["quantize", str(CNN), "--data", str(DATA), *NORMALISE, "--samples", "32", "--preset", "fast"]
    assert run([*common, "--portable", "--no-timing", "-o", str(tmp_path / "out.onnx")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "on x86 without VNNI" in shown
    assert "ARM and x86 with VNNI do not saturate" in shown
