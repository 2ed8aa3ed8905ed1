"""The serving examples: one job through the examples that need no environment of their own, and the judge."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import onnxq

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "examples" / "serving"


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("run_all", SERVING / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    sys.modules["run_all"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("run_all", "environments"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The shipped network and its 8-bit file, six rows, few calls."""
    folder = tmp_path_factory.mktemp("job")
    model = ROOT / "models" / "digits_cnn.onnx"
    rows = np.random.default_rng(0).uniform(-1, 1, (16, 3, 32, 32)).astype(np.float32)
    made = onnxq.quantize(model, {"image": rows}, recipe="fast", checks=onnxq.Checks(verify=False))
    made.save(folder / "int8.onnx")
    rows[:6].tofile(folder / "rows.f32")
    models = {"float": str(model), "int8": str(folder / "int8.onnx")}
    said = {**models, "shape": [6, 3, 32, 32], "slices": 3, "calls": 2}
    (folder / "job.json").write_text(json.dumps(said))
    return folder


def ran(driver, job, out, name):
    example = next(example for example in driver.EXAMPLES if example.name == name)
    said = json.loads((job / "job.json").read_text())
    place = driver.Place(out, job, said, out / name, None)
    return driver.run(example, place, driver.reference(job))


def test_a_python_session_gives_the_bits_of_this_one(driver, job, tmp_path):
    row = ran(driver, job, tmp_path, "python_session")
    assert (row.state, row.difference) == ("ok", {"float": 0.0, "int8": 0.0}), row.note
    assert all(ms > 0 for ms in row.ms.values())
    assert len(row.ratio) == 3
    assert "| python_session | ok | the same bits | the same bits |" in driver.table([row])


def test_two_files_that_are_swapped_are_noticed(driver, job, tmp_path):
    expected = driver.reference(job)
    example = next(example for example in driver.EXAMPLES if example.name == "python_session")
    said = json.loads((job / "job.json").read_text())
    place = driver.Place(tmp_path, job, said, tmp_path / "swapped", None)
    row = driver.run(example, place, {"float": expected["int8"], "int8": expected["float"]})
    assert row.state == "FAILED"
    assert "float: not the same bits" in row.note
    assert "int8: not the same bits" in row.note


def test_a_fastapi_server_gives_the_same_bits_under_load(driver, job, tmp_path):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    out = tmp_path / "fastapi_server"
    out.mkdir()
    code = (
        "import fastapi_server.exercise as e; "
        "e.CLIENTS, e.TURNS, e.TURN_S = 2, 1, 0.3; e.main()"
    )  # fmt: skip
    argv = [sys.executable, "-c", code, str(job), str(out)]
    done = subprocess.run(argv, cwd=SERVING, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = driver.reference(job)
    for side in ("float", "int8"):
        assert (out / f"{side}.f32").read_bytes() == expected[side].tobytes()
    times = json.loads((out / "times.json").read_text())
    assert all(0 < load["p50_ms"] <= load["p90_ms"] <= load["p99_ms"] for load in times["load"].values())
    assert all(load["requests_per_s"] > 0 for load in times["load"].values())


def test_another_build_is_allowed_a_little(driver):
    expected = np.float32([[1.0, 10.0, 2.0], [4.0, 3.9, 0.0]])
    near = expected + np.float32(0.15)
    assert driver.judge(expected, expected, "int8", True) == (0.0, None)
    assert driver.judge(expected, near, "int8", False) == (pytest.approx(0.15), None)
    assert "not the same bits" in driver.judge(expected, near, "int8", True)[1]
    assert "is allowed" in driver.judge(expected, near, "float", False)[1]
    assert "is allowed" in driver.judge(expected, expected * np.float32(np.nan), "int8", False)[1]
    assert "5 values instead of 6" in driver.judge(expected, near.ravel()[:5], "int8", False)[1]


def test_the_ratio_is_quantized_to_float_slice_by_slice(driver, tmp_path):
    example = driver.Example("made", False, lambda place: None)
    times = {"runtime": "none", "float_ms": [2.0, 4.0, 8.0, 8.0], "int8_ms": [1.0, 1.0, 1.0, 4.0]}
    (tmp_path / "times.json").write_text(json.dumps(times))
    for side in ("float", "int8"):
        np.float32([1, 2]).tofile(tmp_path / f"{side}.f32")
    row = driver._judged(example, tmp_path, {"float": np.float32([1, 2]), "int8": np.float32([1.01, 2])})
    assert row.state == "ok"
    assert row.ms == {"float": 6.0, "int8": 1.0}
    assert row.ratio == pytest.approx((0.15625, 0.375, 0.5))  # of 0.5, 0.25, 0.125, 0.5
    assert row.difference == {"float": 0.0, "int8": pytest.approx(0.01)}
    assert "| the same bits | 0.01 off | 6.000 | 1.000 | 0.38 (0.16-0.50) | none |" in driver.table([row])


def test_what_is_missing_is_skipped_with_its_name(driver, job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, lacks in (("node_server", "node"), ("browser_page", "chromium"), ("cpp_program", "g++")):
        row = ran(driver, job, tmp_path, name)
        assert row.state == "skipped"
        assert lacks in row.note


def test_an_exercise_that_fails_is_a_failed_row(driver, job, tmp_path):
    broken = driver.Example("broken", True, lambda place: driver_command(driver, "raise SystemExit('no luck')"))
    place = driver.Place(tmp_path, job, {}, tmp_path / "broken", None)
    assert driver.run(broken, place, {}) == driver.Row("broken", "FAILED", "no luck")
    late = "import pathlib, sys; pathlib.Path(sys.argv[2], 'times.json').write_text('{}'); raise SystemExit(3)"
    row = driver.run(driver.Example("late", True, lambda place: driver_command(driver, late)), place, {})
    assert (row.state, row.note) == ("FAILED", "exit code 3")
    silent = driver.Example("silent", True, lambda place: driver_command(driver, "pass"))
    assert driver.run(silent, place, {}).state == "FAILED"


def driver_command(driver, code):
    return sys.modules["environments"].Command([sys.executable, "-c", code], SERVING)
