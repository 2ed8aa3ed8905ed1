"""Rounding with feedback: never far from the best codes there are, and nearer than rounding alone."""

import itertools

import numpy as np
import pytest
from helpers import weights

from onnxq.tune.feedback import round_with_feedback


def loss(weight, codes, steps, gram):
    gap = weight.astype(np.float64) - codes * steps
    return float(np.trace(gap.T @ gram @ gap))


def correlated(inputs, rows=200, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, inputs)) @ random.normal(size=(inputs, inputs)) + 0.5
    return x.T @ x


def test_independent_inputs_are_rounded_to_the_nearest():
    weight, steps = weights(70, 5), np.full((70, 5), 0.21, np.float32)
    found = round_with_feedback(weight, steps, np.diag(np.arange(1.0, 71.0)), 4)
    np.testing.assert_array_equal(found, np.clip(np.rint(weight / steps), -8, 7))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_the_best_of_all_codes(seed):
    """Five inputs of two bits have 1024 codes; the best is found by trying all."""
    weight, gram = weights(5, 1, seed=seed), correlated(5, seed=seed)
    steps = np.full((5, 1), 0.6, np.float32) * np.array([[1], [-1], [1], [1], [-1]], np.float32)
    best = min(
        loss(weight, np.array(codes)[:, None], steps, gram) for codes in itertools.product(range(-2, 2), repeat=5)
    )
    plain = loss(weight, np.clip(np.rint(weight / steps), -2, 1), steps, gram)
    found = loss(weight, round_with_feedback(weight, steps, gram, 2), steps, gram)
    assert best <= found <= plain
    assert found <= 2.5 * best


@pytest.mark.parametrize("inputs", [60, 64, 150])
def test_correlated_inputs_lose_far_less(inputs):
    weight, gram = weights(inputs, 9), correlated(inputs)
    steps = np.full(weight.shape, np.abs(weight).max() / 7, np.float32)
    found = round_with_feedback(weight, steps, gram, 4)
    assert found.dtype == np.int8
    assert -8 <= found.min() <= found.max() <= 7
    assert loss(weight, found, steps, gram) < 0.6 * loss(weight, np.rint(weight / steps), steps, gram)


def test_an_input_that_is_always_zero_breaks_nothing():
    weight, gram = weights(8, 3), correlated(8)
    gram[3], gram[:, 3] = 0, 0
    steps = np.full(weight.shape, 0.3, np.float32)
    found = round_with_feedback(weight, steps, gram, 4)
    np.testing.assert_array_equal(found[3], np.clip(np.rint(weight[3] / 0.3), -8, 7))
    assert (round_with_feedback(weight, steps, np.zeros((8, 8)), 4) == np.clip(np.rint(weight / 0.3), -8, 7)).all()
