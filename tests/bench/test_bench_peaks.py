"""Peaks of the machine: measured once, kept, and how near a model comes to them."""

import json

import numpy as np
import pytest

from onnxq import bench
from onnxq.bench import peaks, roofline
from onnxq.emit import emit
from onnxq.graph import from_text, save
from onnxq.plan import Range, make_plan, place
from onnxq.types import Latency, Peak, Roof, Work

SMALL = (peaks._Chain("Conv", 2, (1, 8, 6, 5), (8, 8, 3, 3)), peaks._Chain("MatMul", 2, (3, 16), (16, 16)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peaks, "CHAINS", SMALL)
    monkeypatch.setattr(peaks, "ROW_SIZES", ((16, 16),))
    monkeypatch.setattr(peaks, "SECONDS", 0.001)


def test_a_peak_is_measured_once_per_number_of_threads(monkeypatch):
    first = bench.peak(1)
    assert min(first.int8_gmacs, first.float_gmacs, first.stream_gbytes) > 0
    assert first.threads == 1
    assert len(json.loads(bench.peak_file().read_text())) == 1
    monkeypatch.setattr(peaks, "measure_peak", lambda threads: Peak(threads, 1.0, 2.0, 3.0))
    assert bench.peak(1) == first
    assert bench.peak(2) == Peak(2, 1.0, 2.0, 3.0)
    assert len(json.loads(bench.peak_file().read_text())) == 2


def test_a_fresh_peak_never_falls(monkeypatch):
    monkeypatch.setattr(peaks, "measure_peak", lambda threads: Peak(threads, 10.0, 2.0, 3.0))
    assert bench.peak(1) == Peak(1, 10.0, 2.0, 3.0)
    monkeypatch.setattr(peaks, "measure_peak", lambda threads: Peak(threads, 5.0, 4.0, 6.0))
    assert bench.peak(1, fresh=True) == Peak(1, 10.0, 4.0, 6.0)
    assert bench.peak(1) == Peak(1, 10.0, 4.0, 6.0)


NEGATIVE = '{"KEY": {"int8_gmacs": -1.0, "float_gmacs": 1.0, "stream_gbytes": 1.0}}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"KEY": 3}', '{"KEY": {"int8_gmacs": 1.0}}', NEGATIVE])
def test_a_spoiled_cache_is_measured_again(content, monkeypatch):
    monkeypatch.setattr(peaks, "measure_peak", lambda threads: Peak(threads, 1.0, 2.0, 3.0))
    bench.peak_file().parent.mkdir(parents=True)
    bench.peak_file().write_text(content.replace("KEY", peaks._key(1)))
    assert bench.peak(1) == Peak(1, 1.0, 2.0, 3.0)


def test_another_runtime_or_processor_has_its_own_peak(monkeypatch):
    keys = {peaks._key(1), peaks._key(2)}
    monkeypatch.setattr(peaks.runtime, "version", lambda: "0.0")
    keys.add(peaks._key(1))
    monkeypatch.setattr(peaks.runtime, "processor", lambda: "an abacus")
    keys.add(peaks._key(1))
    assert len(keys) == 4


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "measure_peak", lambda threads: Peak(threads, 1.0, 2.0, 3.0))
    (tmp_path / "cache").write_text("a file")
    assert bench.peak(1) == Peak(1, 1.0, 2.0, 3.0)


def test_chains_count_their_work_and_run_in_integers():
    assert [chain.macs for chain in SMALL] == [2 * 30 * 8 * 8 * 9, 2 * 3 * 16 * 16]
    for chain in SMALL:
        model = chain.model()
        placement = place(model)
        plan = make_plan(model, placement, {name: Range(-2.0, 2.0, "given") for name in placement.tensors})
        found = bench.kernels(emit(model, plan))
        integers = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat")
        assert sum(found.get(name, 0) for name in integers) == chain.count
        assert not {"Conv", "FusedConv", "MatMul"} & set(found)


def dense(folder, integer):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(16, 16)).astype(np.float32) for name in ("w", "v")}
    text = "g (float[n,16] x) => (float[n,16] y) { [one] h = MatMul(x, w) r = Relu(h) [two] y = MatMul(r, v) }"
    model = from_text(text, weights)
    if integer:
        placement = place(model, keep_float=["two"])
        model = emit(
            model, make_plan(model, placement, {name: Range(-4.0, 4.0, "given") for name in placement.tensors})
        )
    path = folder / f"{'integer' if integer else 'float'}.onnx"
    save(model, path)
    return path


def test_work_is_that_of_one_call(tmp_path):
    feeds = {"x": np.ones((3, 16), np.float32)}
    found = bench.work_of(dense(tmp_path, False), feeds)
    assert (found.integer_macs, found.float_macs) == (0, 2 * 3 * 16 * 16)
    assert found.bytes == 2 * 4 * 256 + 2 * 3 * 16 * 4
    mixed = bench.work_of(dense(tmp_path, True), feeds)
    assert (mixed.integer_macs, mixed.float_macs) == (3 * 16 * 16, 3 * 16 * 16)
    assert 256 + 4 * 256 + 2 * 3 * 16 * 4 < mixed.bytes < found.bytes - 256


def test_the_roof_is_the_longer_of_computing_and_moving():
    peak = Peak(1, 100.0, 10.0, 5.0)
    roof = Roof(Work(2_000_000, 1_000_000, 10_000), peak, 0.6)
    assert roof.least_ms == pytest.approx(0.02 + 0.1)
    assert roof.share == pytest.approx(0.2)
    assert Roof(Work(2_000_000, 1_000_000, 4_000_000), peak, 1.6).least_ms == pytest.approx(0.8)


def entry(path, provider="cpu", threads=1, batch=1, best=2.0):
    return Latency(str(path), provider, (provider,), threads, batch, (best, 9.0), 9.0, 9.0, None)


def test_every_row_has_its_roof_where_it_can_be_known(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(roofline, "peak", lambda threads, fresh=False: asked.append((threads, fresh)) or Peak(
        threads, 1.0, 1.0, 1.0))  # fmt: skip
    path = dense(tmp_path, False)
    rows = [entry(path), entry(path, batch=4), entry(path, "cuda"), entry(path, threads=2)]
    found = bench.roofs([path], rows)
    assert [roof and (roof.peak.threads, roof.work.float_macs) for roof in found] == [
        (1, 512), (1, 2048), None, (2, 512),
    ]  # fmt: skip
    assert all(roof.best_ms == 2.0 for roof in found if roof)
    assert asked == [(1, False), (2, False)]


def test_a_model_above_the_peak_has_the_peak_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "peak", lambda threads, fresh=False: Peak(threads, *([1e9 if fresh else 1e-9] * 3)))
    path = dense(tmp_path, False)
    first, second = bench.roofs([path], [entry(path), entry(path, batch=2)])
    assert first.peak == second.peak == Peak(1, 1e9, 1e9, 1e9)
    assert 0 < first.share < 1


def test_a_model_that_cannot_be_looked_into_has_no_roof(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "FIRST_RUN_SECONDS", 0.3)
    text = """g (float[n,16] x) => (float[n,16] y) {
        always = Constant<value = bool {1}>()
        y = Loop(, always, x) <body = b (int64 i, bool c, float[n,16] h) => (bool d, float[n,16] k) {
            d = Identity(c) k = MatMul(h, w) }>
    }"""
    path = tmp_path / "loop.onnx"
    save(from_text(text, {"w": np.eye(16, dtype=np.float32)}), path)
    assert bench.roofs([path], [entry(path)]) == (None,)
