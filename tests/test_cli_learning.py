"""Learning and budgets as users call them: results, interruption, exit code 5."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
CNN = ROOT / "models" / "digits_cnn.onnx"
QUANTIZE = ["quantize", str(CNN), "--data", str(ROOT / "calibration_data" / "digits"), "--mean", "0.5", "--std", "0.5"]
FEW = ["--samples", "32", "--no-timing", "--weight-bits", "3"]
ADVANCED = [*FEW, "--preset", "advanced", "--no-bias-tuning", "--iterations", "3"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What an uninterrupted run of a fresh process writes: (path, JSON document, report)."""
    folder = tmp_path_factory.mktemp("learned")
    options = [*ADVANCED, "--json", "--report", "r.html", "-o", "out.onnx"]
    command = [sys.executable, str(ROOT / "cli.py"), *QUANTIZE, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder / "out.onnx", json.loads(done.stdout), (folder / "r.html").read_text(encoding="utf-8")


def test_the_advanced_preset_learns_packs_and_cleans_up(learned):
    path, document, _ = learned
    assert document["recipe"]["reconstruction"] == "adaquant"
    assert {entry["method"] for entry in document["learning"]} == {"adaquant"}
    assert document["verdict"]["integer_coverage"] == 1.0
    assert path.stat().st_size < 0.2 * CNN.stat().st_size
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["out.onnx", "r.html"]


def test_the_report_stands_alone_and_says_how_to_repeat_the_run(learned):
    page = learned[2]
    assert page.lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "--preset advanced --no-bias-tuning --iterations 3" in page


def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(learned, tmp_path):
    out = tmp_path / "out.onnx"
    options = [*ADVANCED, "-o", str(out)]
    command = [sys.executable, str(ROOT / "cli.py"), *QUANTIZE, *options]
    state = tmp_path / "out.onnx.partial" / "state.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not state.exists() and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1]
    assert child.returncode == 130
    assert "what was learned is kept in" in said
    assert "Traceback" not in said
    assert not out.exists()
    subprocess.run([*command, "-q", "--resume", str(state.parent)], check=True, capture_output=True)
    assert out.read_bytes() == learned[0].read_bytes()
    assert not state.parent.exists()


def test_layers_learned_apart_are_kept_too(tmp_path):
    """Two processes are interrupted; one goes on; and one that nobody interrupted writes the same bytes."""
    learn = [*FEW, "--reconstruction", "adaquant", "--unit", "parallel", "--iterations", "3"]
    command = [sys.executable, str(ROOT / "cli.py"), *QUANTIZE, *learn]
    state = tmp_path / "out.onnx.partial" / "state.json"
    with subprocess.Popen(
        [*command, "-o", "out.onnx", "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as child:
        while not state.exists() and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1]
    assert child.returncode == 130
    assert "what was learned is kept in" in said
    assert "Traceback" not in said
    done = len(list(state.parent.glob("layer-*.json")))
    counted = json.loads(state.read_text())["done"]
    assert 1 <= counted <= done <= counted + 1  # a layer is written before it is counted
    go_on = [*command, "-o", "out.onnx", "--workers", "1", "--resume", "out.onnx.partial"]
    again = subprocess.run(go_on, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert f"going on behind {done} layers" in again.stderr
    assert not state.parent.exists()
    subprocess.run([*command, "-o", "whole.onnx", "--workers", "1"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_size_that_cannot_be_met_is_refused_unless_the_nearest_will_do(tmp_path, capsys):
    out = tmp_path / "out.onnx"
    command = [*QUANTIZE, "-o", str(out), "--samples", "16", "--no-timing", "-q", "--max-size", "0.01x"]
    assert run(command) == 5
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "size" in complaint
    assert not out.exists()
    assert run([*command, "--keep"]) == 5
    assert out.stat().st_size < 0.15 * CNN.stat().st_size


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max-size", "big"], "--max-size takes a share of the float file's size"),
        (["--avg-bits", "9"], "--avg-bits takes 2 to 8 bits"),
        (["--max-drop", "50"], "--max-drop takes a fraction"),
        (["--max-bops", "3"], "--max-bops takes a share"),
        (["--max-cost", "table.csv"], "--max-cost takes a table of costs and a limit"),
        (["--max-size", "0.2x", "--weight-bits", "4"], "leave --weight-bits out"),
        (["--reconstruction", "adaqant"], "Did you mean 'adaquant'?"),
        (["--backend", "dask://127.0.0.1:1"], "this run has no work for other machines"),
        (["--backend", "there", "--max-size", "0.2x"], "--backend takes local, dask://host:port or ray://host:port"),
        (["--reconstruction", "adaround", "--device", "tpu"], "device takes auto, cpu, cuda or cuda:N"),
    ],
)
def test_contradictions_are_said_in_one_line(options, text, capsys, tmp_path):
    assert run([*QUANTIZE, "-o", str(tmp_path / "out.onnx"), *options]) == 2
    complaint = capsys.readouterr().err
    assert text in complaint
    assert complaint.count("\n") == 1


def test_the_progress_of_other_runs_is_left_alone(tmp_path, capsys):
    out, partial = tmp_path / "out.onnx", tmp_path / "out.onnx.partial"
    partial.mkdir()
    (partial / "state.json").write_text("another run's")
    quick = [*QUANTIZE, "-o", str(out), "--samples", "16", "--no-timing", "-q", "--preset", "fast"]
    assert run(quick) == 0
    assert (partial / "state.json").read_text() == "another run's"
    assert run([*quick, "--resume", str(partial)]) == 2
    complaint = capsys.readouterr().err
    assert "nothing to resume" in complaint
    assert complaint.count("\n") == 1
    assert (partial / "state.json").exists()


def test_a_folder_without_a_state_is_refused(tmp_path, capsys):
    options = [*FEW, "--reconstruction", "adaround", "--iterations", "1", "-q", "-o", str(tmp_path / "out.onnx")]
    assert run([*QUANTIZE, *options, "--resume", str(tmp_path)]) == 3
    assert "holds no interrupted run" in capsys.readouterr().err
