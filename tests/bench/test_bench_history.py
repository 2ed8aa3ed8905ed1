"""Two runs of `benchmark`."""

import dataclasses
import json

import numpy as np
import pytest

from onnxq import bench
from onnxq.errors import InputError
from onnxq.report import benchmark_document, to_json
from onnxq.types import Change, Interval, Latency

RNG = np.random.default_rng(3)
LOAD = 1 + RNG.gamma(1.0, 0.4, 200)
"""How much slower the machine is in each round."""


def latency(model, base, load=LOAD, first=None, **setting):
    samples = tuple((base * load * (1 + 0.01 * RNG.standard_normal(len(load)))).tolist())
    ratio = bench.ratio_interval(samples, first.samples_ms) if first else None
    where = {"provider": "cpu", "threads": 1, "batch": 1} | setting
    return Latency(model, where["provider"], ("cpu",), where["threads"], where["batch"], samples,
                   float(np.median(samples)), max(samples), ratio)  # fmt: skip


def run(second, load=LOAD, names=("a.onnx", "b.onnx"), **setting):
    first = latency(names[0], 1.0, load, **setting)
    return [first, latency(names[1], second, load, first, **setting)]


def test_load_cancels_and_a_real_change_does_not():
    busy = 2.0 * LOAD[::-1]
    same, slower = bench.changes(run(0.5, busy), run(0.5)), bench.changes(run(0.6, busy), run(0.5))
    assert same[1].times.value == pytest.approx(2.0, rel=0.2)
    assert same[1].against_first.value == pytest.approx(1.0, abs=0.01)
    assert not same[1].exceeds
    assert same[1].words.startswith("within the noise (0.9") or same[1].words.startswith("within the noise (1.0")
    assert slower[1].exceeds
    assert slower[1].against_first.value == pytest.approx(1.2, abs=0.02)
    assert slower[1].against_first.low < 1.2 < slower[1].against_first.high
    assert slower[1].words.startswith("1.20x SLOWER than then (1.")
    assert same[0].against_first is None
    assert same[0].words.endswith(", or the machine is")


def test_medians_are_compared_each_with_its_own_noise():
    found = bench.change_interval(np.full(50, 3.0), np.full(80, 2.0))
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)
    noisy = bench.change_interval(3.0 * LOAD, 2.0 * LOAD)
    assert noisy.low < 1.5 < noisy.high
    assert noisy.value == pytest.approx(1.5)
    assert noisy.high - noisy.low > (bench.ratio_interval(3.0 * LOAD, 2.0 * LOAD).high - 1.5) + 0.02
    assert bench.change_interval(LOAD, LOAD + 0.1, seed=1) == bench.change_interval(LOAD, LOAD + 0.1, seed=1)


def test_models_are_matched_by_path_then_by_name_and_settings_must_agree():
    then = [*run(0.5, names=("x/a.onnx", "x/b.onnx")), *run(0.5, threads=2), *run(0.4, provider="cuda")]
    found = bench.changes([*run(0.5), *run(0.5, threads=4)], then)
    assert [(change.model, change.threads) for change in found] == [("a.onnx", 1), ("b.onnx", 1)]
    assert found[1].then_ms == then[1].median_ms
    twice = [*run(0.9, names=("old/a.onnx", "old/b.onnx")), *run(0.5)]
    assert bench.changes(run(0.5), twice)[1].then_ms == twice[3].median_ms


def test_another_first_model_is_no_common_reference():
    found = bench.changes(run(0.5), run(0.5, names=("c.onnx", "b.onnx")))
    assert [change.model for change in found] == ["b.onnx"]
    assert found[0].against_first is None


def test_what_is_beyond_the_noise_is_clear_and_large_enough():
    def change(*interval):
        return Change("m", "cpu", 1, 1, 1.0, 1.0, Interval(9.0, 8.0, 10.0), Interval(*interval))

    assert [change(*case).exceeds for case in ((1.2, 0.9, 1.3), (1.03, 1.02, 1.04), (1.06, 1.02, 1.1))] == [
        False, False, True,
    ]  # fmt: skip
    assert change(0.8, 0.7, 0.9).exceeds
    assert change(0.8, 0.7, 0.9).words == "1.25x faster than then (0.70-0.90)"


def test_a_saved_run_comes_back(tmp_path):
    latencies = [*run(0.5), *run(0.25, threads=2, batch=8)]
    path = tmp_path / "run.json"
    path.write_text(to_json(benchmark_document(latencies, {"cores": 2, "features": ["avx2"]})))
    found = bench.read_history(path)
    assert list(found.latencies) == latencies
    now = found.compare([*latencies, *run(0.5, threads=9)], {"cores": 4, "features": ["avx2"]})
    assert (now.old, now.machine_differs, now.missing) == (str(path), ("cores was 2, is 4",), 2)
    assert now.changes == bench.changes(latencies, latencies)
    assert found.compare(latencies, {"cores": 2}).machine_differs == ()
    document = json.loads(to_json(benchmark_document(latencies, {}, comparison=now)))["comparison"]
    assert [entry["exceeds_noise"] for entry in document["changes"]] == [False] * 4
    assert all(change.times.value == 1.0 for change in bench.changes(found.latencies, latencies))


def spoiled(document, **changes):
    first, *others = document["latencies"]
    return {**document, "latencies": [{**first, **changes}, *others]}


def test_other_files_are_refused(tmp_path):
    document = json.loads(to_json(benchmark_document(run(0.5), {})))
    path = tmp_path / "run.json"
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        bench.read_history(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        bench.read_history(path)
    for wrong in (
        [],
        {},
        {**document, "schema": 2},
        {**document, "kind": "inspect"},
        {**document, "latencies": [3]},
        {key: value for key, value in document.items() if key != "machine"},
        spoiled(document, samples_ms=[]),
        spoiled(document, samples_ms=[1.0, 0.0]),
        spoiled(document, samples_ms=[1.0, None]),
        spoiled(document, ratio={"value": 1}),
        spoiled(document, threads="many"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="is not what `onnxq benchmark --save` writes"):
            bench.read_history(path)


def test_rounds_that_cannot_be_paired_leave_the_times():
    first, second = run(0.5)
    short = dataclasses.replace(second, samples_ms=second.samples_ms[:10])
    assert bench.changes([first, short], run(0.5))[1].against_first is None
