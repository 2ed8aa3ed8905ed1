"""Learned roundings, steps, grids and biases of whole blocks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tuning import FOUR, IMAGE, ROWS, TWO, made, mlp, residual

torch = pytest.importorskip("torch")

from onnxq.errors import UnsupportedError  # noqa: E402
from onnxq.tune import adaquant, adaround, block_error  # noqa: E402
from onnxq.tune.adaquant import AdaQuant, FreeWeight  # noqa: E402
from onnxq.tune.adaround import AdaRound  # noqa: E402
from onnxq.tune.learn import Rates, learn  # noqa: E402
from onnxq.tune.losses import squared  # noqa: E402
from onnxq.tune.soft_block import SoftBlock  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

METHODS = {
    "adaround": AdaRound(iterations=400, drop=0.0),
    "adaround, roundings only": AdaRound(iterations=400, drop=0.0, learn_steps=False, learn_grids=False),
    "adaquant": AdaQuant(iterations=80),
}


class Watched(Sequence):
    """Feeds that note which of them are read."""

    def __init__(self, feeds):
        self.feeds, self.read = feeds, set()

    def __len__(self):
        return len(self.feeds)

    def __getitem__(self, index):
        self.read.add(index)
        return self.feeds[index]


def free(layer, grid):
    return FreeWeight(layer.weight, grid, learn_steps=True)


def same(one, other):
    if one.plan != other.plan or set(one.layers) != set(other.layers):
        return False
    pairs = [(layer, other.layers[name]) for name, layer in one.layers.items()]
    return all(
        np.array_equal(a.codes, b.codes)
        and (a.bias is None) == (b.bias is None)
        and (a.bias is None or np.array_equal(a.bias, b.bias))
        for a, b in pairs
    )


@pytest.mark.parametrize("method", METHODS)
def test_learning_helps_repeats_and_reads_training_batches_only(method):
    job, tuned = made(residual(), IMAGE, TWO, batches=5, alike=True)
    watched = [Watched(side) for side in (job.feeds, job.floats, job.targets)]
    job = replace(job, feeds=watched[0], floats=watched[1], targets=watched[2])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = METHODS[method](job, tuned)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(side.read <= set(job.train) for side in watched)
    assert watched[0].read == set(job.train)
    assert block_error(job, found, job.train) < 0.9 * block_error(job, tuned, job.train)
    torch.manual_seed(6)
    assert same(METHODS[method](job, tuned), found)
    if method != "adaround, roundings only":
        assert not same(METHODS[method](replace(job, seed=1), tuned), found)
    assert set(found.layers) == {"a", "b", "s"}
    assert np.abs(found.layers["s"].bias).max() > 0.001  # it has none in the float model
    changed = {name for name, grid in found.plan.tensors.items() if grid != tuned.plan.tensors[name]}
    if method == "adaround, roundings only":
        assert found.plan.weights == tuned.plan.weights
        assert not changed
    else:
        assert changed
        assert "x" not in changed


def test_no_iterations_are_plain_rounding():
    job, tuned = made(residual(), IMAGE, FOUR)
    found = AdaQuant(iterations=0)(job, tuned)
    assert found.plan == tuned.plan
    assert block_error(job, found) == pytest.approx(block_error(job, tuned), rel=1e-6)


@pytest.mark.parametrize("module", [adaround, adaquant])
def test_what_torch_computes_otherwise_is_refused(monkeypatch, module):
    job, tuned = made(mlp(), ROWS)

    def refuse(*_):
        raise UnsupportedError("another result")

    monkeypatch.setattr(module, "require_agreement", refuse)
    method = AdaRound(iterations=1) if module is adaround else AdaQuant(iterations=1)
    with pytest.raises(UnsupportedError, match="another result"):
        method(job, tuned)


def test_the_loss_falls_and_every_output_counts():
    job, tuned = made(mlp(), ROWS, TWO, alike=True)
    seen = []

    def loss(found, target):
        seen.append((tuple(target.shape), float(squared(found, target).detach())))
        return squared(found, target)

    block = SoftBlock(job, tuned, free)
    learn(block, job, Rates(codes=2e-2), iterations=80, loss=loss)
    assert not block.training
    assert {shape for shape, _ in seen} == {(8, 5, 6), (8, 5, 12)}
    totals = np.asarray([value for _, value in seen]).reshape(80, 2).sum(axis=1)
    assert totals[-10:].mean() < 0.8 * totals[:10].mean()


def test_the_loss_by_hand():
    assert squared(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])).item() == pytest.approx(5 / 20)
    assert squared(torch.tensor([1.0]), torch.tensor([0.0])).item() == pytest.approx(1e12)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_inputs_are_mixed_with_the_float_networks(share):
    job, tuned = made(residual(), IMAGE)
    feeds = [{"x": np.zeros_like(feeds["x"])} for feeds in job.feeds]
    floats = [{"x": np.ones_like(feeds["x"])} for feeds in job.feeds]
    block = SoftBlock(job, tuned, free)
    seen = []
    block.register_forward_pre_hook(lambda _, given: seen.append(float(given[0]["x"].mean())))
    learn(block, replace(job, feeds=feeds, floats=floats), Rates(codes=1e-3), iterations=4, mix=share)
    assert len(seen) == 4
    assert seen == pytest.approx([share] * 4, abs=0.04)


def test_rates_are_what_moves_per_step():
    """The first step of Adam is its rate, whatever the gradient."""
    job, tuned = made(residual(), IMAGE, FOUR, shrink=0.5)
    block = SoftBlock(job, tuned, free)
    biases = {name: bias.detach().clone() for name, bias in block.biases.items()}
    rates = Rates(codes=0.01, steps=0.002, grids=0.003, biases=0.04)
    learn(block, job, rates, iterations=1)
    for quantizer in block.quantizers():
        moved = quantizer.moved.detach().abs()
        near = np.isclose(moved[moved > 0], 0.01, rtol=0.05)
        assert near.mean() > 0.99  # a gradient as small as Adam's epsilon moves less
        assert moved.max() < 0.0101
        np.testing.assert_allclose(quantizer.log_steps.detach().abs(), 0.002, rtol=0.02)
    for grid in block.activations():
        if grid.shift.requires_grad:
            assert abs(grid.shift.item()) == pytest.approx(0.3, rel=0.02)
            assert abs(grid.log_step.item()) == pytest.approx(0.003, rel=0.02)
    for name, bias in block.biases.items():
        wanted = 0.04 * biases[name].abs().mean()
        np.testing.assert_allclose((bias.detach() - biases[name]).abs(), np.full(len(bias), wanted), rtol=0.02)


def test_every_batch_is_seen_before_one_comes_again():
    job, tuned = made(residual(), IMAGE, batches=6)
    job = replace(job, feeds=Watched(job.feeds))
    order = []
    block = SoftBlock(job, tuned, free)
    firsts = {float(feeds["x"][0, 0, 0, 0]): index for index, feeds in enumerate(job.feeds.feeds)}
    block.register_forward_pre_hook(lambda _, given: order.append(firsts[float(given[0]["x"][0, 0, 0, 0])]))
    learn(block, job, Rates(codes=1e-3), iterations=12)
    assert len(order) == 12
    assert set(order[:5]) == set(order[5:10]) == {0, 1, 2, 3, 4}
    assert len(set(order[10:])) == 2


def test_a_block_with_nothing_to_learn_stays():
    job, tuned = made(residual(), IMAGE)
    plan = replace(tuned.plan, weights={}, integer=(), tensors={}, constants={})
    bare = replace(tuned, plan=plan)
    for method in (AdaQuant(iterations=2), AdaRound(iterations=2)):
        assert same(method(job, bare), bare)
