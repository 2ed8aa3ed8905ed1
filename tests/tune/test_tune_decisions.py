"""Whole networks compared by what decides between classes."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from onnxq.tune import DecisionSums, ErrorSums


def relative(sums, *pairs):
    made = sums()
    for wanted, given in pairs:
        made.add({"y": wanted}, {"y": given})
    return made.relative()


def scores(seed=0, shape=(40, 7)):
    return np.random.default_rng(seed).normal(0.3, 2, shape).astype(np.float32)


def test_it_is_the_noise_at_the_best_gain_without_what_classes_share():
    y, noise = scores(0), scores(1)
    q = 0.3 * y + 0.1 * noise + 5
    centred = [(x - x.mean(axis=1, keepdims=True)).astype(np.float64) for x in (y, q)]
    best = minimize_scalar(lambda g: np.square(centred[0] - g * centred[1]).sum(), bounds=(0, 20), method="bounded").fun
    found = relative(DecisionSums, (y[:15], q[:15]), (y[15:], q[15:]))
    assert found == pytest.approx(best / np.square(centred[0]).sum(), rel=1e-4)
    assert relative(ErrorSums, (y, q)) > 2 > 0.2 > found


@pytest.mark.parametrize("gain", [0.01, 1.0, 30.0])
def test_gains_and_common_shifts_change_nothing(gain):
    y = scores()
    shift = np.arange(40, dtype=np.float32)[:, None]
    assert relative(DecisionSums, (y, gain * y + shift)) == pytest.approx(0, abs=1e-5)


def test_scores_that_say_nothing_or_the_opposite_are_all_noise():
    y = scores()
    assert relative(DecisionSums, (y, -y)) == 1
    assert relative(DecisionSums, (y, np.zeros_like(y))) == 1
    assert relative(DecisionSums, (np.zeros_like(y), y)) == 1


@pytest.mark.parametrize("shape", [(40,), (40, 1), (5, 8, 7)])
def test_other_outputs_are_compared_plainly(shape):
    y, q = scores(0, shape), scores(1, shape)
    assert relative(DecisionSums, (y, q)) == relative(ErrorSums, (y, q))


def test_infinities_make_scores_others():
    y, q = scores(), 2 * scores()
    y[3, 3] = np.inf
    assert relative(DecisionSums, (y, q)) == relative(ErrorSums, (y, q)) > 0.5


def test_outputs_count_alike():
    y, q, z, v = scores(), scores(1), scores(2, (3, 4, 5)), scores(3, (3, 4, 5))
    both = DecisionSums()
    both.add({"y": y, "z": z, "n": np.arange(3)}, {"y": q, "z": v, "n": np.arange(3)})
    expected = (relative(DecisionSums, (y, q)) + relative(DecisionSums, (z, v))) / 2
    assert both.relative() == pytest.approx(expected, rel=1e-12)
    assert DecisionSums().relative() == 0
