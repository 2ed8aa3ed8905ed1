"""`onnxq benchmark` as users call it: one table, the peak, and what changed since an older run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxq.bench import peaks
from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
CNN, TRANSFORMER = (ROOT / "models" / f"digits_{kind}.onnx" for kind in ("cnn", "transformer"))
QUICK = ["--provider", "cpu", "--seconds", "0.01", "-q"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peaks, "SECONDS", 0.001)


def fresh(*arguments, cwd):
    """In a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), "benchmark", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=dict(os.environ))


def test_a_fresh_process_compares_with_a_run_that_was_kept(tmp_path):
    options = [*QUICK, "--batch", "2"]
    first = fresh(CNN, *options, "--save", "old.json", "--no-peak", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    old = json.loads((tmp_path / "old.json").read_text())
    assert [(entry["threads"], entry["batch"]) for entry in old["latencies"]] == [(1, 2)]
    assert "roofline" not in old["latencies"][0]
    old["machine"]["cores"] = 1000
    for entry in old["latencies"]:
        entry["samples_ms"] = [sample / 1e3 for sample in entry["samples_ms"]]
        entry["median_ms"] /= 1e3
    (tmp_path / "old.json").write_text(json.dumps(old))
    second = fresh(CNN, *options, "--batch", "2,4", "--compare", "old.json", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "another machine: cores was 1000, is" in second.stdout
    assert second.stdout.count("x SLOWER than then (") == 1
    assert "1 of this run's rows are not in it" in second.stdout
    assert "int8" in second.stdout
    assert "x 10^9 multiply-accumulates (MACs) per second" in second.stdout
    cached = json.loads((tmp_path / "cache" / "onnxq" / "peaks.json").read_text())
    assert sorted(entry["threads"] for entry in cached.values()) == [1]


def test_the_document_has_the_peak_the_work_and_the_comparison(tmp_path, capsys):
    kept = tmp_path / "run.json"
    assert run(["benchmark", str(CNN), *QUICK, "--save", str(kept)]) == 0
    shown = capsys.readouterr().out
    document = json.loads(kept.read_text())
    (peak,) = document["peaks"]
    assert min(peak["int8_gmacs"], peak["float_gmacs"], peak["stream_gbytes"]) > 0
    roof = document["latencies"][0]["roofline"]
    assert (roof["integer_macs"], roof["float_macs"]) == (0, 26_612_352)
    assert roof["bytes"] > CNN.stat().st_size * 0.9
    assert roof["share_of_peak"] == pytest.approx(roof["least_ms"] / roof["best_ms"])
    assert "26.61 M" in shown
    assert run(["benchmark", str(CNN), *QUICK, "--compare", str(kept), "--json", "--no-peak"]) == 0
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["old"] == str(kept)
    assert comparison["machine_differs"] == []
    assert comparison["missing"] == 0
    (change,) = comparison["changes"]
    assert change["then_ms"] == document["latencies"][0]["median_ms"]
    assert change["against_first"] is None
    assert isinstance(change["exceeds_noise"], bool)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--compare", "{tmp}/none.json"], 3, "none.json cannot be read"),
        (["--compare", "{cnn}"], 3, "digits_cnn.onnx cannot be read"),
        (["--save", "{tmp}/no/out.json"], 6, "the folder"),
        (["--save", "{cnn}"], 2, "is the input model"),
        (["--provider", "openvino"], 6, "has no openvino provider; available: "),
    ],
)
def test_refusals_come_before_the_work(options, code, words, tmp_path, capsys):
    given = [option.format(tmp=tmp_path, cnn=CNN) for option in options]
    assert run(["benchmark", str(CNN), "-q", *given]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
