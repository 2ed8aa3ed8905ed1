"""Tuning inside `quantize`, on the shipped models."""

from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.pipeline import tuning
from onnxq.types import Silence

ROOT = Path(__file__).resolve().parents[2]
PREPROCESS = onnxq.Preprocess(mean=(0.5,), std=(0.5,))


class Told(Silence):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def quantized(**changes):
    model, data = ROOT / "models" / "digits_cnn.onnx", ROOT / "calibration_data" / "digits"
    return onnxq.quantize(model, data, preprocess=PREPROCESS, time_it=False, **changes)


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
    errors = iter([0.1, 0.1])
    monkeypatch.setattr(tuning, "_error", lambda *_: next(errors))
    log = Told()
    kept = quantized(weight_bits=4, log=log)
    assert not kept.learned
    assert kept.plan == plain.plan
    assert any("does not help this model" in note for note in log.notes)
