"""Codebooks: the best few values."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import UsageError
from onnxq.tune.codebook import codebook


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def least_error(row, count):
    """By trying every split of the sorted weights; values are integers of the int8 grid."""
    step = np.abs(row).max() / 127
    units = np.sort(row.astype(np.float64) / step)
    best = np.inf
    for size in range(1, count + 1):
        for cuts in itertools.combinations(range(1, len(units)), size - 1):
            parts = np.split(units, cuts)
            best = min(best, sum(((part - np.rint(part.mean())) ** 2).sum() for part in parts))
    return best * step**2


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_nothing_is_better_than_what_is_found(seed, size, bits):
    row = normal(size, seed=seed)
    found = codebook(row, bits)
    assert len(np.unique(found.codes)) <= 2**bits
    error = np.square(found.values().astype(np.float64) - row).sum()
    assert error <= least_error(row, 2**bits) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_channel_has_its_own_few_values(bits, axis):
    weight = normal(6, 5, 4, 3) * np.linspace(0.1, 3, 6, dtype=np.float32)[:, None, None, None]
    weight[:, 2] *= 5
    found = codebook(weight, bits, axis)
    assert found.codes.shape == weight.shape
    assert found.codes.dtype == np.int8
    assert found.grid.axis == axis
    assert found.grid.bits == 8
    assert len(found.grid.scales) == (1 if axis is None else weight.shape[axis])
    rows = [found.codes] if axis is None else np.moveaxis(found.codes, axis, 0)
    assert all(len(np.unique(row)) == 2**bits for row in rows)
    channels = [weight] if axis is None else np.moveaxis(weight, axis, 0)
    made = [found.values()] if axis is None else np.moveaxis(found.values(), axis, 0)
    for channel, given_back in zip(channels, made, strict=True):
        alone = codebook(channel, bits).values()
        np.testing.assert_allclose(given_back, alone, rtol=1e-6)
    assert found.learned().codes is found.codes
    assert found.learned(np.ones(6, np.float32)).bias.sum() == 6


def test_the_error_of_a_normal_weight_is_lloyds():
    """Lloyd-Max quantizers of a normal variable have distortions 0.3634, 0.1175, 0.03454 and 0.009497."""
    weight = normal(200_000)
    for bits, distortion in zip((1, 2, 3, 4), (0.3634, 0.1175, 0.03454, 0.009497), strict=True):
        error = np.square(codebook(weight, bits).values() - weight).mean()
        assert error == pytest.approx(distortion, rel=0.02)


def test_more_channels_and_bits_never_hurt():
    weight = normal(8, 30) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None]
    errors = [
        [np.square(codebook(weight, bits, axis).values() - weight).sum() for bits in (1, 2, 3, 4)] for axis in (None, 0)
    ]
    assert all(np.diff(row).max() < 0 for row in errors)
    assert (np.asarray(errors[1]) < errors[0]).all()


def test_few_different_weights_stay_what_they_are():
    weight = np.float32([[0.5, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for axis in (0, None):
        np.testing.assert_allclose(codebook(weight, 2, axis).values(), weight, atol=0.004)
    np.testing.assert_array_equal(codebook(weight, 2, 0).codes[1], 0)
    same = codebook(weight, 2).codes
    np.testing.assert_array_equal(codebook(weight, 2).codes, same)


@pytest.mark.parametrize("bits", [0, 5])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="1 to 4 bits"):
        codebook(normal(3), bits)
