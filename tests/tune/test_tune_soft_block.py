"""A block in torch against the same block, emitted, in onnxruntime."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, run, weights
from tuning import CASES, EIGHT, FOUR, IMAGE, MIXED, ROWS, handed_on, made, mlp, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.errors import UnsupportedError  # noqa: E402
from onnxq.runtime import Session, SessionConfig  # noqa: E402
from onnxq.torch_exec import extract  # noqa: E402
from onnxq.tune import TuneMoments, soft_block  # noqa: E402
from onnxq.tune.adaquant import FreeWeight  # noqa: E402
from onnxq.tune.adaround import Rounding  # noqa: E402
from onnxq.tune.job import quantized  # noqa: E402
from onnxq.tune.soft_block import SoftBlock, as_tensors, learned_codes, require_agreement  # noqa: E402
from onnxq.types import LearnedLayer, Tuned  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

SIMULATE = SessionConfig(simulate=True)
PRECISIONS = {"8": EIGHT, "4": FOUR, "4 and 8": MIXED}


def free(layer, grid):
    return FreeWeight(layer.weight, grid, learn_steps=True)


def gaps(job, tuned, block, batch=0):
    """Output -> (share of values off, largest difference), in steps of its grid or, for float outputs, of its range."""
    with torch.no_grad():
        found = block.eval()(as_tensors(job.feeds[batch], torch.device("cpu")))
    expected = Session(quantized(job, tuned), SIMULATE).run(job.feeds[batch])
    result = {}
    for name, wanted in expected.items():
        grid = tuned.plan.tensors.get(name)
        unit = grid.scale if grid is not None else np.ptp(wanted)
        difference = np.abs(found[name].numpy() - wanted) / unit
        result[name] = float(np.mean(difference > 1e-3)), float(difference.max())
    return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_a_soft_block_computes_what_is_emitted(case, precision):
    build, shape = CASES[case]
    job, tuned = made(build(), shape, PRECISIONS[precision], shrink=0.8)
    assert tuned.plan.weights
    block = SoftBlock(job, tuned, free)
    assert set(block.layers) == set(tuned.plan.weights)
    for share, largest in gaps(job, tuned, block).values():
        assert share < 0.01
        assert largest <= 1.01
    require_agreement(job, tuned)
    if case in ("residual", "concat", "clip", "output"):  # where all is in integers, ties apart nothing differs
        assert all(share < 0.005 for share, _ in gaps(job, tuned, block).values())


@pytest.mark.parametrize("make", ["free", "rounding"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_moved_block_found_is_emitted(case, make):
    build, shape = CASES[case]
    job, tuned = made(build(), shape, MIXED)
    kinds = {"free": free, "rounding": lambda layer, grid: Rounding(layer.weight, grid, learn_steps=True)}
    block = SoftBlock(job, tuned, kinds[make])
    torch.manual_seed(1)
    with torch.no_grad():
        for quantizer in block.quantizers():
            quantizer.log_steps.add_(0.2 * torch.randn_like(quantizer.log_steps))
            learned = quantizer.moved if make == "free" else quantizer.alpha
            learned.add_(2 * torch.randn_like(learned))
            if make == "rounding":
                learned.copy_(20 * torch.sign(learned))  # every weight up or down
        for bias in block.biases.values():
            bias.add_(0.3 * torch.randn_like(bias))
        for grid in block.activations():
            if grid.log_step.requires_grad:
                grid.log_step.sub_(0.1)
            if grid.shift.requires_grad:
                grid.shift.add_(1.7)
    after = block.found(tuned)
    assert after.plan != tuned.plan
    for share, largest in gaps(job, after, block).values():
        assert share < 0.01
        assert largest <= 1.01
    require_agreement(job, after)
    for name, layer in after.layers.items():
        assert layer.codes.dtype == np.int8
        grid = tuned.plan.weights[name]
        low, high = (grid.along(ends, layer.codes.ndim) for ends in grid.ends())
        assert ((layer.codes >= low) & (layer.codes <= high)).all()


def test_found_without_a_change_is_plain_rounding():
    job, tuned = made(residual(), IMAGE, FOUR)
    after = SoftBlock(job, tuned, free).found(tuned)
    assert after.plan == tuned.plan
    assert graph.to_bytes(quantized(job, after)) == graph.to_bytes(quantized(job, tuned))


def test_grids_of_inputs_and_shared_grids_stay():
    m = model(
        """g (float[n,4,6,6] x, float[6,4,3,3] w, float[3,6,1,1] v) => (float[n,3,2,2] y) {
            [a] h = Conv(x, w) i = Sigmoid(h) j = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(i) [b] y = Conv(j, v)
        }""",
        w=weights(6, 4, 3, 3),
        v=weights(3, 6, 1, 1),
    )
    job, tuned = made(m, IMAGE)
    block = SoftBlock(job, tuned, free)
    learns = {name: block.grids[key].log_step.requires_grad for name, key in block._grid_key.items()}
    scale = tuned.plan.tensors["j"].scale
    twins = {name for name, grid in tuned.plan.tensors.items() if grid.scale == scale}
    assert twins == {"i", "j"}
    assert learns == {name: name not in {"i", "j", "x"} for name in learns}
    assert learns["y"]
    assert not any(g.log_step.requires_grad for g in SoftBlock(job, tuned, free, learn_grids=False).activations())


def test_grids_behind_activations_neither_grow_nor_shift():
    build, shape = CASES["clip"]
    job, tuned = made(build(), shape)
    block = SoftBlock(job, tuned, free)
    grids = {name: block.grids[key] for name, key in block._grid_key.items()}
    assert 0 < tuned.plan.tensors["k"].zero_point < 255
    with torch.no_grad():
        for grid in grids.values():
            grid.log_step.add_(0.5)
            grid.limit()
    assert not grids["k"].shift.requires_grad
    assert grids["k"].log_step.item() == 0
    assert grids["i"].log_step.item() == 0
    assert grids["l"].log_step.item() == 0.5


def test_a_steeper_bias_widens_the_steps():
    """A bias must fit int32 with its scale, as `room_for_bias` says."""
    job, tuned = made(bias_of_a_dead_channel(), IMAGE)
    tiny = replace(tuned.plan.weights["a"], scales=(1e-9, *tuned.plan.weights["a"].scales[1:]))
    plan = replace(tuned.plan, weights={**tuned.plan.weights, "a": tiny})
    block = SoftBlock(job, Tuned(plan), free)
    with torch.no_grad():
        block.biases[block._key["a"]][0] = 100.0
    after = block.found(Tuned(plan))
    steps = after.plan.weights["a"].scales
    assert steps[0] == pytest.approx(100 / (plan.tensors["x"].scale * 2**30), rel=1e-5)
    assert steps[1:] == tiny.scales[1:]


def bias_of_a_dead_channel():
    w = weights(6, 4, 3, 3)
    w[0] = 0
    text = "g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b) => (float[n,6,4,4] y) { [a] y = Conv(x, w, b) }"
    return model(text, w=w, b=weights(6))


def test_agreement_counts_learned_codes_and_biases():
    job, tuned = made(residual(), IMAGE, FOUR)
    tuned = TuneMoments()(job, tuned)
    require_agreement(job, tuned)
    flipped = {name: LearnedLayer(-layer.codes, layer.bias) for name, layer in tuned.layers.items()}
    require_agreement(job, Tuned(tuned.plan, flipped))


@pytest.mark.parametrize("case", ["residual", "mlp", "output"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_block_that_torch_computes_otherwise_does_not_agree(monkeypatch, case, precision):
    build, shape = CASES[case]
    job, tuned = made(build(), shape, PRECISIONS[precision])

    class Wrong(SoftBlock):
        def forward(self, feeds):
            return {name: value * 1.3 for name, value in super().forward(feeds).items()}

    monkeypatch.setattr(soft_block, "SoftBlock", Wrong)
    with pytest.raises(UnsupportedError, match=r"torch computes another \w than onnxruntime"):
        require_agreement(job, tuned)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("extract", UnsupportedError("no such operator")),
        ("extract", RuntimeError("no such\n  operator")),
        ("extract", IndexError("no such operator")),
        ("soften", ValueError("no such operator")),
    ],
)
def test_a_block_that_torch_cannot_run_does_not_agree(monkeypatch, where, error):
    job, tuned = made(mlp(), (8, 5, 8))

    def refuse(*_):
        raise error

    monkeypatch.setattr(soft_block if where == "extract" else graph, where, refuse)
    with pytest.raises(UnsupportedError, match="no such operator"):
        require_agreement(job, tuned)


def test_a_block_that_fails_when_it_runs_does_not_agree():
    m = model(
        """g (float[n,8] x, int64[2] shape, float[6,5] w) => (float[m,5] y) {
            h = Reshape(x, shape) [a] y = MatMul(h, w)
        }""",
        shape=np.asarray([-1, 6]),
        w=weights(6, 5),
    )
    job, tuned = made(m, (6, 8))
    require_agreement(job, tuned)
    odd = replace(job, feeds=[{"x": weights(5, 8)}])
    with pytest.raises(UnsupportedError, match=r"torch cannot run it: shape '\[-1, 6\]' is invalid"):
        require_agreement(odd, tuned)


def far(share):
    """A block whose outputs are off by noise of `share` times its quantization noise."""

    class Noisy(SoftBlock):
        def __init__(self, job, tuned, *given, **named):
            super().__init__(job, tuned, *given, **named)
            emitted = Session(quantized(job, tuned)).run(job.feeds[0])
            self.off = {name: np.sqrt(share) * (emitted[name] - job.targets[0][name]) for name in emitted}

        def forward(self, feeds):
            return {name: value + torch.tensor(self.off[name]) for name, value in super().forward(feeds).items()}

    return Noisy


def test_the_tolerance_is_a_share_of_the_quantization_noise(monkeypatch):
    job, tuned = made(mlp(), ROWS, FOUR, shrink=0.6)
    for share, tolerance, fine in ((0.02, 10**-1.5, True), (0.1, 10**-1.5, False), (0.1, 0.25, True), (1, 0.25, False)):
        monkeypatch.setattr(soft_block, "SoftBlock", far(share))
        if fine:
            require_agreement(job, tuned, tolerance=tolerance)
        else:
            with pytest.raises(UnsupportedError):
                require_agreement(job, tuned, tolerance=tolerance)


def test_a_conv_without_a_bias_learns_one():
    job, tuned = made(residual(), IMAGE, FOUR)
    block = SoftBlock(job, tuned, free)
    grid, data = tuned.plan.weights["s"], tuned.plan.tensors["x"]
    size = data.scale * max(data.zero_point, 15 - data.zero_point) * np.mean(grid.scales) * np.mean(grid.ends()[1])
    np.testing.assert_allclose(block.biases[block._key["s"]].detach(), size, rtol=1e-6)
    assert block.found(tuned).layers["s"].bias is None
    moved = weights(6, seed=3)
    with torch.no_grad():
        block.biases[block._key["s"]].add_(torch.tensor(moved))
    after = block.found(tuned)
    np.testing.assert_allclose(after.layers["s"].bias, moved, rtol=1e-5, atol=1e-6)
    assert all(largest <= 1.01 and share < 0.01 for share, largest in gaps(job, after, block).values())
    again = SoftBlock(job, after, free)  # a bias that is there is learned as it is
    np.testing.assert_array_equal(again.biases[again._key["s"]].detach(), emitted_bias(job, after, "s"))
    known = Tuned(after.plan, {"s": LearnedLayer(-after.layers["s"].codes)})
    assert gaps(job, known, SoftBlock(job, known, learned_codes(known)))["y"][0] < 0.005


def emitted_bias(job, tuned, name):
    nodes = graph.node_names(quantized(job, tuned))
    restored = graph.producer(nodes[name].inputs[2])
    codes, scale = (graph.constant(value) for value in restored.inputs[:2])
    return (codes.astype(np.float64) * scale).astype(np.float32)


def test_dropped_roundings_pass_elements_unrounded():
    job, tuned = made(handed_on(), IMAGE, FOUR)
    feeds = as_tensors(job.feeds[0], torch.device("cpu"))
    block = SoftBlock(job, tuned, free, drop=1.0)
    plain = SoftBlock(job, tuned, free)
    assert torch.equal(block.eval()(feeds)["y"], plain.eval()(feeds)["y"])
    assert torch.equal(plain.train()(feeds)["y"], plain.eval()(feeds)["y"])
    soft = graph.soften(quantized(job, tuned), tuned.plan.tensors)
    unrounded = extract(soft.model, job.block.inputs, job.block.outputs)(feeds)
    np.testing.assert_allclose(block.train()(feeds)["y"].detach(), unrounded["y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(soft.model, job.feeds[0])["y"], unrounded["y"], rtol=1e-5, atol=1e-4)
