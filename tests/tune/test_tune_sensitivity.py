"""The error of outputs: divergence of class scores, noise of anything else."""

import numpy as np
import pytest
from helpers import weights

from onnxq.tune.sensitivity import OutputErrors, divergence, read_arrays, write_arrays


def softmax(scores):
    exponentials = np.exp(scores.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_the_divergence_of_scores_is_that_of_their_softmax():
    wanted, found = weights(6, 5) * 2, weights(6, 5, seed=1) * 2
    p, q = softmax(wanted), softmax(found)
    np.testing.assert_allclose(divergence(wanted, found), (p * np.log(p / q)).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(divergence(wanted, found + 3.0), divergence(wanted, found), rtol=1e-5)
    np.testing.assert_allclose(divergence(wanted, wanted), 0.0, atol=1e-12)


def test_large_scores_do_not_overflow():
    wanted = np.array([[1000.0, 0.0]], np.float32)
    np.testing.assert_allclose(divergence(wanted, wanted[:, ::-1]), 1000.0)


def test_probabilities_are_taken_as_they_are():
    p, q = softmax(weights(4, 3)), softmax(weights(4, 3, seed=1))
    given = [array.astype(np.float32) for array in (p, 0.5 * q)]
    np.testing.assert_allclose(divergence(*given), (p * np.log(p / q)).sum(axis=1), rtol=1e-4)


def test_scores_are_measured_by_their_mean_divergence_over_rows_and_outputs():
    errors = OutputErrors()
    for seed, rows in ((0, 3), (1, 5)):
        wanted = {"a": weights(rows, 4, seed=seed), "b": weights(rows, 2, seed=seed)}
        errors.add(wanted, {"a": weights(rows, 4, seed=9), "b": wanted["b"]})
    rows = [divergence(weights(rows, 4, seed=seed), weights(rows, 4, seed=9)) for seed, rows in ((0, 3), (1, 5))]
    assert errors.measure == "kl"
    assert errors.error() == pytest.approx(np.concatenate(rows).mean() / 2)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4, 5), (3,)])
def test_other_outputs_are_measured_by_their_noise(shape):
    errors, wanted = OutputErrors(), weights(*shape)
    errors.add({"y": wanted, "ids": np.arange(3)}, {"y": wanted * 1.1, "ids": np.arange(3)})
    assert errors.measure == "mse"
    assert errors.error() == pytest.approx(0.01, rel=1e-4)


def test_scores_with_infinities_are_measured_by_their_noise():
    errors, wanted = OutputErrors(), weights(3, 4)
    wanted[0, 0] = np.inf
    errors.add({"y": wanted}, {"y": wanted * 1.1})
    assert errors.measure == "mse"


def test_arrays_of_any_name_come_back(tmp_path):
    arrays = {"/a:0/x.y": weights(2, 3), "file": np.arange(3), "names": np.float32(2)}
    write_arrays(tmp_path / "0.npz", arrays)
    found = read_arrays(tmp_path / "0.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
