"""What the tests of fused branches share."""

from helpers import assert_same_outputs, ops, run, weights

from onnxq.passes.base import apply
from onnxq.passes.fuse_branches import FuseBranches

NORM = "BatchNormalization<epsilon = 0.1>"


def statistics(channels):
    return {
        "gamma": weights(channels, seed=1),
        "beta": weights(channels, seed=2),
        "mean": weights(channels, seed=3),
        "var": weights(channels, seed=4, low=0.5, high=2.0),
    }


def check(m, feeds, expected=("Conv",), count=None):
    before = run(m, feeds)
    applied = apply(m, [FuseBranches()], feeds)[0]
    assert ops(m) == list(expected)
    if count is not None:
        assert applied.count == count
    assert_same_outputs(before, run(m, feeds), rtol=1e-4, atol=1e-4)
    assert FuseBranches()(m) == 0
