"""Tuning inside `quantize`, on the shipped models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.errors import EnvironmentFault, InputError, UsageError
from onnxq.pipeline import stopwatch, tuning
from onnxq.pipeline.checkpoint import Checkpoint
from onnxq.pipeline.fastest import REASON, Found
from onnxq.runtime import Session
from onnxq.tune import methods
from onnxq.types import Interval, Placed, Silence

ROOT = Path(__file__).resolve().parents[2]
PREPROCESS = onnxq.Preprocess(mean=(0.5,), std=(0.5,))


class Told(Silence):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def quantized(packed=False, progress=None, resume=False, timed=False, **changes):
    model, data = ROOT / "models" / "digits_cnn.onnx", ROOT / "calibration_data" / "digits"
    place = onnxq.Workplace(progress=progress, resume=resume)
    checks = onnxq.Checks(time_it=timed)
    return onnxq.quantize(model, data, preprocess=PREPROCESS, checks=checks, place=place, packed=packed, **changes)


def stored(result, suffix):
    initializers = result.model.graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items() if name.endswith(suffix)}


@pytest.fixture(scope="module")
def plain():
    return quantized(weight_bits=4, bn_tuning=False)


def test_tuned_moments_bring_the_outputs_nearer_and_keep_the_codes(plain):
    tuned = quantized(weight_bits=4)
    assert tuned.verdict.fidelity.sqnr_db["logits"] > plain.verdict.fidelity.sqnr_db["logits"] + 3
    assert set(tuned.learned) == set(tuned.plan.weights)
    assert not plain.learned
    before, after = stored(plain, ".weight_q"), stored(tuned, ".weight_q")
    assert len(before) == len(tuned.plan.weights) == 11
    for name, codes in before.items():
        np.testing.assert_array_equal(after[name], codes)
    assert tuned.plan.weights != plain.plan.weights


def test_what_does_not_help_the_outputs_is_dropped(plain, monkeypatch):
    monkeypatch.setattr(tuning.Judge, "error", lambda *_: 0.1)
    log = Told()
    kept = quantized(weight_bits=4, log=log)
    assert not kept.learned
    assert kept.plan == plain.plan
    assert any("does not help this model" in note for note in log.notes)


def test_packed_weights_shrink_the_file_and_change_no_output(plain, tmp_path):
    packed = quantized(weight_bits=4, bn_tuning=False, packed=True)
    sizes = [result.save(tmp_path / f"{index}.onnx").stat().st_size for index, result in enumerate((packed, plain))]
    assert sizes[0] < 0.75 * sizes[1]
    assert packed.verdict.coverage.share == 1.0
    rows = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    found, wanted = (Session(result.model).run({"image": rows})["logits"] for result in (packed, plain))
    np.testing.assert_array_equal(found, wanted)


def test_sixteen_bit_activations_have_finer_steps_and_are_computed_in_float(tmp_path):
    changes = {"ranges": "minmax", "bn_tuning": False}
    wide, narrow = (quantized(activation_bits=bits, residual_bits=bits, **changes) for bits in (16, 8))
    assert wide.simulated
    assert not narrow.simulated
    finer = {name: grid.scale / wide.plan.tensors[name].scale for name, grid in narrow.plan.tensors.items()}
    counts = [sum(ratio == pytest.approx(step, rel=0.01) for ratio in finer.values()) for step in (1, 65535 / 255)]
    assert sum(counts) == len(finer)
    assert counts[0] <= 3  # the ends keep 8 bits
    assert wide.verdict.fidelity.sqnr_db["logits"] > 35
    assert wide.verdict.coverage.share < 0.1
    assert any("in float kernels" in warning for warning in wide.verdict.warnings)
    layers = onnxq.inspect(wide.save(tmp_path / "w.onnx")).layers
    assert [layer.input_dtype for layer in layers[1:-1]] == ["uint16"] * (len(layers) - 2)


LEARNING = {"weight_bits": 3, "reconstruction": "adaquant", "iterations": 8, "samples": 96, "bn_tuning": False}


@pytest.fixture(scope="module")
def learned():
    return quantized(**LEARNING)


def test_learned_weights_beat_plain_rounding_and_say_what_each_block_gained(learned):
    rounded = quantized(weight_bits=3, samples=96, bn_tuning=False)
    assert learned.verdict.fidelity.sqnr_db["logits"] > rounded.verdict.fidelity.sqnr_db["logits"] + 1
    assert {result.method for result in learned.blocks} == {"adaquant"}
    assert sum(result.kept for result in learned.blocks) >= len(learned.blocks) - 1 > 0
    assert all(result.after < result.before for result in learned.blocks if result.kept)


class Stop(BaseException):
    pass


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_stopped(learned, tmp_path, monkeypatch):
    folder = tmp_path / "partial"
    write = Checkpoint.write

    def stop_after_two(self, progress):
        write(self, progress)
        if len(progress.results) == 2:
            raise Stop

    monkeypatch.setattr(Checkpoint, "write", stop_after_two)
    with pytest.raises(Stop):
        quantized(**LEARNING, progress=folder)
    monkeypatch.setattr(Checkpoint, "write", write)
    assert {path.name for path in folder.iterdir()} == {"state.json", "learned-2.npz"}
    log = Told()
    resumed = quantized(**LEARNING, progress=folder, resume=True, log=log)
    assert any("going on behind block 2" in note for note in log.notes)
    assert onnxq_bytes(resumed) == onnxq_bytes(learned)
    assert [replace(result, seconds=0) for result in resumed.blocks] == [
        replace(result, seconds=0) for result in learned.blocks
    ]
    with pytest.raises(UsageError, match="another model, data or recipe"):
        quantized(**LEARNING | {"iterations": 21}, progress=folder, resume=True)
    onnxq.forget_progress(folder)
    assert not folder.exists()
    with pytest.raises(InputError, match="no interrupted run"):
        quantized(**LEARNING, progress=folder, resume=True)


@pytest.mark.parametrize("unit", ["block", "parallel"])
def test_a_run_that_goes_on_keeps_to_what_the_clock_said_when_it_began(unit, tmp_path, monkeypatch):
    settings = {"reconstruction": "adaquant", "iterations": 5, "samples": 64, "unit": unit, "timed": True}
    answers = []

    def once(start, again, *_, **__):
        answers.append(1)
        if len(answers) > 1:
            return Found(start)
        name = start.layers[1].name
        ratio = Interval(0.9, 0.8, 0.95)
        return Found(again({name: REASON}), Placed("cpu", 1, len(start.layers), (name,), (name,), ratio, ratio, 1))

    monkeypatch.setattr(stopwatch, "fastest", once)
    whole = quantized(progress=tmp_path / "whole", **settings)
    assert len(whole.plan.weights) == 10
    again = quantized(progress=tmp_path / "whole", resume=True, **settings)
    assert answers == [1]
    assert onnxq_bytes(again) == onnxq_bytes(whole)
    assert again.verdict.placed == whole.verdict.placed
    assert len(quantized(progress=tmp_path / "other", **settings).plan.weights) == 11


def onnxq_bytes(result):
    return {name: value.const_value.numpy().tobytes() for name, value in result.model.graph.initializers.items()}


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is not the state of a run"):
        quantized(**LEARNING, progress=tmp_path)


def test_without_torch_learning_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match=r"needs PyTorch.*pip install 'onnxq\[learn\]'"):
        onnxq.quantize("missing.onnx", "nowhere", "advanced")


@pytest.mark.parametrize(
    ("device", "kind", "text"),
    [("tpu", UsageError, "auto, cpu, cuda"), ("cuda:99", EnvironmentFault, "no device 'cuda:99'")],
)
def test_devices_that_are_not_there_are_refused(device, kind, text):
    with pytest.raises(kind, match=text):
        onnxq.quantize("missing.onnx", "nowhere", reconstruction="adaround", place=onnxq.Workplace(device))


def test_single_layers_are_learned_one_after_the_other():
    result = quantized(**LEARNING | {"iterations": 2}, unit="layer")
    assert len(result.blocks) == len(result.plan.weights)
