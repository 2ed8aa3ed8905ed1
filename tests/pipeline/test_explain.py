"""What a report knows beyond the verdict: outliers, stages of tuning, and the bits that were chosen among."""

import json

import numpy as np
import onnx
import pytest
from helpers import proto, weights

import onnxq
from onnxq.errors import UnsupportedError, UsageError
from onnxq.pipeline import budgeting, explain
from onnxq.report import read_run

TEXT = """g (float[N,3,8,8] x, float[6,3,3,3] w, float[8,6,3,3] v, float[8,5] u) => (float[N,5] y) {
    [a] h = Conv(x, w) i = Relu(h) [b] j = Conv(i, v) k = Relu(j) p = GlobalAveragePool(k) q = Flatten(p)
    [c] y = Gemm(q, u)
}"""
LOUD, SAMPLE = 4, 13


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("explain") / "net.onnx"
    w = weights(6, 3, 3, 3)
    w[LOUD] *= 30
    onnx.save(proto(TEXT, w=w, v=weights(8, 6, 3, 3), u=weights(8, 5)), found)
    return found


@pytest.fixture(scope="module")
def rows():
    values = weights(48, 3, 8, 8, seed=3)
    values[SAMPLE] *= 20
    return {"x": values}


@pytest.fixture(scope="module")
def result(path, rows):
    changes = {"avg_bits": "4", "samples": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeting, "OPTIONS", ((8, 8), (4, 8), (2, 8)))
        checks = onnxq.Checks(time_it=False, explain=True)
        return onnxq.quantize(path, rows, checks=checks, place=onnxq.Workplace(workers=1), **changes)


def test_channels_and_samples_that_stand_out_are_found(path, rows):
    found = explain.outliers(path, rows)
    assert list(found) == ["x", "i", "q"]
    assert [one.index for one in found["i"].channels] == [LOUD]
    assert [one.index for one in found["x"].samples] == [SAMPLE]
    assert found["x"].channels == ()
    assert found["i"].count == 6
    assert list(explain.standing_out(found)) == [name for name in found if found[name].channels or found[name].samples]
    few = explain.outliers(path, rows, samples=SAMPLE)
    assert few["x"].samples == ()


def test_a_quantized_file_has_none(path, rows, tmp_path, result):
    with pytest.raises(UnsupportedError, match="already quantized"):
        explain.outliers(result.save(tmp_path / "q.onnx"), rows)


def test_the_details_hold_outliers_and_the_study_behind_the_bits(result):
    found = result.details
    assert found.outlier_rows == result.rows
    assert LOUD in [one.index for one in next(iter(found.outliers.values())).channels] or "x" in found.outliers
    assert set(found.sensitivity) == set(result.plan.weights)
    bits = {name: grid.bits for name, grid in result.plan.weights.items()}
    assert found.chosen[1] == pytest.approx(sum(found.sensitivity[name][f"w{count}a8"] for name, count in bits.items()))
    sizes, errors = zip(*sorted(found.front), strict=True)
    assert list(errors) == sorted(errors, reverse=True)
    assert sizes[0] < found.chosen[0] < sizes[-1]


def test_stages_of_tuning_are_kept(result, path, rows):
    (step,) = result.steps
    assert step.name == "means and spreads"
    assert step.kept == (step.after < step.before)
    assert result.summary().steps == result.steps


def test_a_run_writes_its_own_report(result, tmp_path):
    written = result.save_report(tmp_path / "r.html", tmp_path / "q.onnx")
    document = read_run(written)
    assert document["output"] == str(tmp_path / "q.onnx")
    assert document["recipe"] == json.loads(json.dumps(result.summary().recipe))
    assert document["tuning"][0]["before"] == result.steps[0].before
    assert len(document["verdict"]["agreed"]["right"]) == document["verdict"]["held_out_rows"]
    text = written.read_text(encoding="utf-8")
    for heading in ("Sensitivity", "Size against error", "Outliers", "Tuning"):
        assert f">{heading}</h2>" in text


def test_without_details_there_is_no_report(result, tmp_path):
    from dataclasses import replace

    with pytest.raises(UsageError, match=r"checks=Checks\(explain=True\)"):
        replace(result, details=None).save_report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
    assert np.isfinite(result.steps[0].after)
