"""Scripts of `benchmarks/` that other tests do not run."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def load(monkeypatch):
    """Returns a function that imports a benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("moments", [False, True])
def test_tuned_quantizes_with_given_methods(load, tmp_path, moments):
    pytest.importorskip("torch")
    out = tmp_path / "out.onnx"
    recipe = {"weight_bits": 4, "samples": 32, "bn_tuning": moments}
    job = {"model": str(ROOT / "models" / "digits_cnn.onnx"), "data": str(ROOT / "calibration_data" / "digits"),
           "out": str(out), "recipe": recipe, "methods": [["adaquant", {"iterations": 2}]]}  # fmt: skip
    errors = load("tuned").quantize(job)
    assert list(errors) == ["adaquant"]
    assert errors["adaquant"][1] <= errors["adaquant"][0]
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(out).graph.initializer)


def test_forms_compute_the_same_product(load):
    """Blocks hold random codes, and are only timed."""
    forms = load("forms")
    found = forms.forms(64, 32, 1)
    times = forms.measured(found, 3, 64, 0.01)
    assert list(times) == ["float", "static", "pairs", "dynamic", "blocks8", "blocks4"]
    assert all(time > 0 for time in times.values())
    feeds = {"x": np.random.default_rng(2).normal(size=(1, 3, 64)).astype(np.float32)}
    wanted, static, dynamic = (found[name].run(None, feeds)[0] for name in ("float", "static", "dynamic"))
    for got in (static, dynamic):
        assert np.square(got - wanted).sum() < 1e-3 * np.square(wanted).sum()


def test_what_is_not_random_is_scored_once_on_the_original(load, tmp_path, monkeypatch):
    script = load("harden")
    monkeypatch.setattr(script, "hardened", lambda path, out, seed, args: [("harden", out / f"{seed}.onnx")])
    args = SimpleNamespace(out=tmp_path, seeds=[0, 1], methods=["rounding", "advanced"], bits=[2])
    jobs = script.jobs(tmp_path / "net.onnx", args)
    assert len(jobs) == len(set(jobs))
    methods = ["float", "rounding", "advanced", "codebook", "codebook", "rounding", "advanced", "codebook", "codebook"]
    for variant, seed, wanted in (("harden", 1, methods), (script.ORIGINAL, 0, methods)):
        assert [job.method for job in jobs if (job.variant, job.seed) == (variant, seed)] == wanted
    again = [job.method for job in jobs if (job.variant, job.seed) == (script.ORIGINAL, 1)]
    assert again == ["advanced", "advanced"]


def field_row(quantizer, **changes):
    return {
        "model": "net", "bits": "W8A8", "first_last": "8", "quantizer": quantizer,
        "score": {"agreement": 0.9, "rows": 100},
        "latency": {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.6}, **changes,
    }  # fmt: skip


def test_the_plot_shows_what_was_timed_and_scored(load):
    script = load("field_plot")
    rows = [field_row("onnxq-balanced"), field_row("other", first_last="same"), field_row("slow", bits="W4A8"),
            field_row("failed", score=None) | {"score": {}}]  # fmt: skip
    untimed = field_row("untimed")
    del untimed["latency"]
    found = script.points([*rows, untimed], "W8A8", "8")
    assert {model: [row["quantizer"] for row in rows] for model, rows in found.items()} == {
        "net": ["onnxq-balanced", "other"]
    }
    assert script.points([*rows, untimed], "W4A8", "same") == {}
    across, up = script.bars(rows[0])
    assert across == pytest.approx((0.5, 0.05, 0.1))
    assert up == pytest.approx((90.0, 90.0 - 82.56, 94.48 - 90.0), abs=0.01)  # Wilson's interval of 90 of 100


def test_the_plot_is_the_same_file_every_time(load, tmp_path):
    pytest.importorskip("matplotlib")
    script = load("field_plot")
    found = {"net": [field_row("onnxq-balanced"), field_row("other")], "other": [field_row("other")]}
    for name in ("one.svg", "two.svg"):
        script.draw(found, tmp_path / name)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert text.count("onnxq-balanced") == 1
