"""Affine layers behind layers, folded into steps and biases."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, ops, run, weights
from tuning import EIGHT, FOUR, IMAGE, TWO, ahead_of, concat, made, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.emit import weight_codes  # noqa: E402
from onnxq.errors import UnsupportedError, UsageError  # noqa: E402
from onnxq.plan import Precision  # noqa: E402
from onnxq.runtime import Session, SessionConfig  # noqa: E402
from onnxq.tune import TuneMoments, block_error, repapq  # noqa: E402
from onnxq.tune.job import quantized  # noqa: E402
from onnxq.tune.methods import LEARNED, learned_method  # noqa: E402
from onnxq.tune.repapq import RepAPQ, spread_steps  # noqa: E402
from onnxq.tune.soft_block import SoftBlock, as_tensors, learned_codes  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

CPU = torch.device("cpu")
WHOLE = Precision(weight_bits=4, activation_bits=8, first_last=4, per_channel=False)


def layers_of(m):
    nodes = graph.node_names(m)
    return {name: graph.layer_of(node) for name, node in nodes.items() if not isinstance(graph.layer_of(node), str)}


def plain_codes(job, tuned):
    return {name: weight_codes(layer, tuned.plan.weights[name]) for name, layer in layers_of(job.model).items()}


def test_an_affine_layer_changes_nothing_at_the_start():
    job, tuned = made(concat(), IMAGE, FOUR)
    feeds = as_tensors(job.feeds[0], CPU)
    outputs = [
        SoftBlock(job, tuned, learned_codes(tuned, learn_steps=learns)).eval()(feeds)["y"] for learns in (True, False)
    ]
    assert torch.equal(*outputs)


EXPLICIT = """g (float[n,4,6,6] x, float xs, uint8 xz, float[5,4,3,3] w, float[5,1,1] gamma, float[5,1,1] beta,
float ys, uint8 yz) => (float[n,5,3,3] y) {
    q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
    h = Conv<pads = [1, 0, 1, 2], strides = [2, 2]>(d, w) i = Mul(h, gamma) j = Add(i, beta) k = Relu(j)
    r = QuantizeLinear(k, ys, yz) y = DequantizeLinear(r, ys, yz)
}"""
SINGLE = """g (float[n,4,6,6] x, float[5,4,3,3] w, float[5] b) => (float[n,5,3,3] y) {
    [a] h = Conv<pads = [1, 0, 1, 2], strides = [2, 2]>(x, w, b) y = Relu(h)
}"""


@pytest.mark.parametrize("precision", [EIGHT, FOUR])
def test_affine_layers_fold_into_steps_and_biases(precision):
    m = model(SINGLE, w=weights(5, 4, 3, 3) / 4, b=weights(5))
    job, tuned = made(m, IMAGE, precision)
    block = SoftBlock(job, tuned, learned_codes(tuned, learn_steps=True), learn_grids=False)
    gamma = np.exp(0.5 * weights(5, seed=7))
    unit = gamma * tuned.plan.weights["a"].scales * tuned.plan.tensors["x"].scale  # of the int32 bias
    beta = (np.rint(weights(5, seed=8) / unit) * unit).astype(np.float32)
    with torch.no_grad():
        block.weights["layer_0"].log_steps.copy_(torch.tensor(np.log(gamma)))
        block.biases["layer_0"].copy_(torch.tensor(beta))
    after = block.found(tuned)
    np.testing.assert_array_equal(after.layers["a"].codes, plain_codes(job, tuned)["a"])
    steps = np.asarray(tuned.plan.weights["a"].scales)
    np.testing.assert_allclose(after.plan.weights["a"].scales, gamma * steps, rtol=1e-6)
    np.testing.assert_allclose(after.layers["a"].bias, beta, rtol=1e-6)
    assert ops(quantized(job, after)) == ops(quantized(job, tuned))
    data, result = tuned.plan.tensors["x"], tuned.plan.tensors["y"]
    constants = {"xs": np.float32(data.scale), "xz": np.uint8(data.zero_point)}
    constants |= {"ys": np.float32(result.scale), "yz": np.uint8(result.zero_point)}
    floats = after.layers["a"].codes * steps.reshape(-1, 1, 1, 1)
    explicit = model(
        EXPLICIT,
        w=floats.astype(np.float32),
        gamma=gamma.reshape(-1, 1, 1).astype(np.float32),
        beta=beta.reshape(-1, 1, 1),
        **constants,
    )
    reach = {
        name: [(code - grid.zero_point) * grid.scale for code in (0, 2**grid.bits - 1)]
        for name, grid in tuned.plan.tensors.items()
    }
    feeds = {"x": np.clip(job.feeds[0]["x"], *np.float32(reach["x"]))}  # below 8 bits, grids are cut off by a Clip
    wanted = np.minimum(run(explicit, feeds)["y"], np.float32(reach["y"][1]))
    off = np.abs(Session(quantized(job, after), SessionConfig(threads=1)).run(feeds)["y"] - wanted) / result.scale
    assert off.max() < 1.01
    assert np.mean(off > 0.01) < 0.01


METHOD = RepAPQ(iterations=40, loss="mse", stage=0.0)


def test_codes_stay_and_learning_beats_matching_moments():
    job, tuned = made(residual(), IMAGE, TWO, batches=5, alike=True)
    found = METHOD(job, tuned)
    for name, codes in plain_codes(job, tuned).items():
        np.testing.assert_array_equal(found.layers[name].codes, codes)
        assert min(found.plan.weights[name].scales) > 0
        assert found.plan.weights[name].scales != tuned.plan.weights[name].scales
    matched = TuneMoments()(job, tuned)
    assert block_error(job, found, job.train) < 0.95 * min(block_error(job, s, job.train) for s in (tuned, matched))
    assert ops(quantized(job, found)) == ops(quantized(job, matched))
    again = METHOD(job, found)  # codes that were learned stay as well
    for name, layer in found.layers.items():
        np.testing.assert_array_equal(again.layers[name].codes, layer.codes)


def test_it_starts_from_moments_where_these_help():
    job, tuned = made(residual(), IMAGE, TWO, batches=5)
    start = replace(METHOD, iterations=0)
    matched = TuneMoments()(job, tuned)
    assert block_error(job, matched, job.train) < block_error(job, tuned, job.train)
    assert block_error(job, start(job, tuned), job.train) == pytest.approx(
        block_error(job, matched, job.train), rel=1e-3
    )

    class Worse(TuneMoments):
        def __call__(self, job, tuned):
            steps = {n: replace(g, scales=tuple(2 * s for s in g.scales)) for n, g in tuned.plan.weights.items()}
            return replace(super().__call__(job, tuned), plan=replace(tuned.plan, weights=steps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repapq, "TuneMoments", Worse)
        found = start(job, tuned)
    assert block_error(job, found, job.train) == pytest.approx(block_error(job, tuned, job.train), rel=1e-3)


def test_rounding_is_learned_on_the_steps_it_starts_from():
    job, tuned = made(residual(), IMAGE, FOUR, batches=9, alike=True)  # spreads are trusted from 2000 values on
    plain = plain_codes(job, tuned)
    start = replace(METHOD, iterations=0, rounding=True)(job, tuned)
    for name, codes in plain.items():
        np.testing.assert_array_equal(start.layers[name].codes, codes)
        assert start.plan.weights[name].scales != tuned.plan.weights[name].scales
    found = RepAPQ(iterations=300, loss="mse", stage=0.0, rounding=True)(job, tuned)
    assert any(not np.array_equal(found.layers[name].codes, codes) for name, codes in plain.items())
    for name, layer in layers_of(job.model).items():
        grid = tuned.plan.weights[name]
        steps, low, high = (values.reshape(-1, 1, 1, 1) for values in (np.asarray(grid.scales), *grid.ends()))
        assert np.abs(np.clip(layer.weight / steps, low, high) - found.layers[name].codes).max() <= 1
    assert block_error(job, found, job.train) < block_error(job, METHOD(job, tuned), job.train)


def test_auto_takes_the_loss_with_the_smaller_error_on_held_batches(monkeypatch):
    job, tuned = made(residual(), IMAGE, TWO, batches=5)
    held = {}
    for loss in ("mae", "mse"):
        held[loss] = block_error(job, RepAPQ(iterations=10, loss=loss, stage=0.0)(job, tuned))
    found = RepAPQ(iterations=10, stage=0.0)(job, tuned)
    assert block_error(job, found) == min(held.values())
    assert held["mae"] != held["mse"]
    with pytest.raises(UsageError, match="a loss is auto, mse, mae, huber, not 'mad'"):
        RepAPQ(loss="mad")


def test_absolute_errors_are_not_owned_by_one_sample():
    job, tuned = made(residual(), IMAGE, FOUR, batches=5)
    loud = [{name: value.copy() for name, value in targets.items()} for targets in job.targets]
    for targets in loud:
        targets["y"][0] *= 30
    loud = replace(job, targets=loud, held=job.train)
    quiet = {}
    for loss in ("mae", "mse"):
        found = RepAPQ(iterations=40, loss=loss, stage=0.0, judged=False)(loud, tuned)
        quiet[loss] = block_error(job, found)
    assert quiet["mae"] < 0.5 * quiet["mse"]


def test_a_step_per_channel_behind_weights_rounded_as_a_whole():
    job, tuned = made(residual(), IMAGE, WHOLE, batches=5)
    assert {grid.axis for grid in tuned.plan.weights.values()} == {None}
    spread = spread_steps(job, tuned)
    for name, layer in layers_of(job.model).items():
        assert spread.plan.weights[name].axis == 0
        assert spread.plan.weights[name].scales == tuned.plan.weights[name].scales * layer.channels
    feeds = job.feeds[0]
    np.testing.assert_array_equal(run(quantized(job, spread), feeds)["y"], run(quantized(job, tuned), feeds)["y"])
    single, each = METHOD(job, tuned), replace(METHOD, spread=True)(job, tuned)
    assert {grid.axis for grid in single.plan.weights.values()} == {None}
    for name, codes in plain_codes(job, tuned).items():
        np.testing.assert_array_equal(each.layers[name].codes, codes)
    assert block_error(job, each, job.train) < block_error(job, single, job.train)


@pytest.mark.parametrize("name", LEARNED)
def test_every_method_has_its_name(name):
    method = learned_method(name, iterations=3)
    assert method.name == name
    assert method.iterations == 3
    assert method.judged


def test_what_torch_computes_otherwise_is_refused(monkeypatch):
    job, tuned = made(residual(), IMAGE)

    def refuse(*_):
        raise UnsupportedError("another result")

    monkeypatch.setattr(repapq, "require_agreement", refuse)
    with pytest.raises(UnsupportedError, match="another result"):
        METHOD(job, tuned)


def test_the_stage_is_looked_at_where_its_error_counts(monkeypatch):
    job, tuned = made(residual(), IMAGE)
    rest = ahead_of(job)
    asked = []
    given = replace(job, rest=lambda reach: (asked.append(reach), rest)[1])
    RepAPQ(iterations=1, loss="huber", stage=0.5, reach=2)(given, tuned)
    assert asked == [2]
    RepAPQ(iterations=1, loss="huber", stage=0.0)(given, tuned)
    assert asked == [2]
