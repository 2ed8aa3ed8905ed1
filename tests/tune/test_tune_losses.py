"""Losses of outputs, and of what they lead to at the end of the stage."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from helpers import model, run, weights
from tuning import FOUR, IMAGE, TWO, ahead_of, handed_on, made, plan_of, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.errors import UnsupportedError, UsageError  # noqa: E402
from onnxq.plan import find_blocks  # noqa: E402
from onnxq.tune import TuneMoments, learn, walk  # noqa: E402
from onnxq.tune.learn import Ahead, Rates, look_ahead  # noqa: E402
from onnxq.tune.losses import absolute, huber, losses_of, squared  # noqa: E402
from onnxq.tune.soft_block import SoftBlock, as_tensors, learned_codes  # noqa: E402
from onnxq.types import Silence, Tuned  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

CPU = torch.device("cpu")


def test_losses_by_hand():
    found, target = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.5, 2.0, 4.0])
    assert squared(found, target).item() == pytest.approx((0.25 + 25) / (2.25 + 4 + 16))
    assert absolute(found, target).item() == pytest.approx(5.5 / 7.5)
    assert huber(2.0)(found, target).item() == pytest.approx((0.25 / 4 + 5 - 1) / 7.5)
    assert huber(0.1)(found, target).item() == pytest.approx((0.5 - 0.05 + 5 - 0.05) / 7.5)
    for loss in (squared, absolute, huber(1.0)):
        assert torch.isfinite(loss(found, torch.zeros(3)))


def test_hubers_step_is_that_of_the_outputs_grid():
    job, tuned = made(handed_on(), IMAGE, FOUR)
    outputs = {"i", "y"}
    plan = replace(tuned.plan, tensors={name: grid for name, grid in tuned.plan.tensors.items() if name != "y"})
    found = losses_of("huber", job.targets[0], Tuned(plan))
    assert set(found) == outputs
    zeros, ones = torch.zeros(4), torch.ones(4)
    width = float(np.ptp(job.targets[0]["y"]))
    for name, step in (("i", plan.tensors["i"].scale), ("y", width / 255)):
        tiny = 0.5 * step * ones
        assert found[name](tiny, zeros).item() == pytest.approx(huber(step)(tiny, zeros).item())
        assert found[name](tiny + 1, ones).item() == pytest.approx(0.125 * step, rel=1e-3)
    assert set(losses_of("mae", job.targets[0], tuned).values()) == {absolute}
    assert set(losses_of("mse", job.targets[0], tuned).values()) == {squared}
    with pytest.raises(UsageError, match="a loss is one of mse, mae, huber, not 'mad'"):
        losses_of("mad", job.targets[0], tuned)


def test_each_output_has_its_own_loss():
    job, tuned = made(handed_on(), IMAGE)
    seen = []

    def note(name):
        return lambda found, target: (seen.append((name, tuple(target.shape[1:]))), squared(found, target))[1]

    block = SoftBlock(job, tuned, learned_codes(tuned))
    learn.learn(block, job, Rates(codes=0.0), iterations=1, loss={"i": note("i"), "y": note("y")})
    assert sorted(seen) == [("i", (6, 4, 4)), ("y", (3, 4, 4))]


def stage():
    """Three blocks of one size, a shortcut from before the first into the last; a smaller one behind."""
    text = """g (float[n,4,6,6] x, float[5,4,3,3] s, float[5,5,3,3] w, float[5,5,3,3] v, float[5,5,3,3] u,
    float[3,5,3,3] t) => (float[n,3,2,2] y) {
        [s] a = Conv<pads = [1, 1, 1, 1]>(x, s) b = Relu(a)
        [w] c = Conv<pads = [1, 1, 1, 1]>(b, w) d = Relu(c)
        [v] e = Conv<pads = [1, 1, 1, 1]>(d, v) f = Relu(e)
        [u] h = Conv<pads = [1, 1, 1, 1]>(f, u) i = Add(h, b) j = Relu(i)
        [t] y = Conv<strides = [2, 2]>(j, t)
    }"""
    kernels = {"w": weights(5, 5, 3, 3) / 5, "v": weights(5, 5, 3, 3, seed=1) / 5, "u": weights(5, 5, 3, 3, seed=2) / 5}
    m = model(text, s=weights(5, 4, 3, 3) / 4, t=weights(3, 5, 3, 3) / 5, **kernels)
    graph.infer_shapes(m)
    return m


BATCHES = [{"x": weights(6, 4, 6, 6, seed=seed)} for seed in range(3)]


@dataclass(frozen=True)
class Look:
    """Notes what is behind each block."""

    reach: int
    seen: dict = field(default_factory=dict)
    judged: bool = False
    name: str = "look"

    def __call__(self, job, tuned):
        rest = job.rest(self.reach)
        self.seen[job.block.layers] = rest and (rest, list(rest.floats), list(rest.targets))
        return TuneMoments()(job, tuned)


def walked(reach, budget=1 << 28):
    m = stage()
    blocks = find_blocks(m, limit=1)
    look = Look(reach)
    walk(m, Tuned(plan_of(m, BATCHES, TWO)), blocks, [look], BATCHES, budget=budget)
    return m, blocks, look.seen


@pytest.mark.parametrize("budget", [1 << 28, 10_000])
def test_the_rest_of_a_stage_is_the_float_network_behind_the_block(budget):
    m, blocks, seen = walked(9, budget)
    first = next(block for block in blocks if "w" in block.layers)
    end = [block for block in blocks if block.stage == first.stage][-1].outputs
    assert end == ("j",)
    rest, floats, targets = seen["w",]
    assert rest.outputs == end
    assert set(rest.inputs) == {"d", "b"}  # the shortcut comes from the float network
    for batch, feeds in enumerate(BATCHES):
        plain = run(graph.with_outputs(m, ["b", "d", "j"]), feeds)
        assert set(floats[batch]) == {"d", "b"}
        assert set(targets[batch]) == {"j"}
        for name, value in (floats[batch] | targets[batch]).items():
            np.testing.assert_allclose(value, plain[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run(rest.model, floats[batch])["j"], plain["j"], rtol=1e-4, atol=1e-5)
    assert seen["t",] is None  # nothing of its stage is left


def test_one_looks_no_further_than_asked():
    _, _, seen = walked(1)
    rest, _, targets = seen["w",]
    assert rest.outputs == ("f",)
    assert rest.inputs == ("d",)
    assert set(targets[0]) == {"f"}
    _, _, seen = walked(0)
    assert not any(seen.values())


def test_the_error_ahead_by_hand_and_its_gradient():
    job, tuned = made(residual(), IMAGE, TWO)
    rest = ahead_of(job)
    block = SoftBlock(job, tuned, learned_codes(tuned, learn_steps=True))
    found = block(as_tensors(job.feeds[1], CPU))
    ahead = Ahead(rest, 0.7, {"e": squared})
    loss = ahead.loss(1, found, CPU)
    reached = run(rest.model, {"y": found["y"].detach().numpy(), "r": rest.floats[1]["r"]})["e"]
    target = rest.targets[1]["e"]
    assert loss.item() == pytest.approx(0.7 * np.square(reached - target).sum() / np.square(target).sum(), rel=1e-4)
    loss.backward()
    for quantizer in block.quantizers():
        assert (quantizer.log_steps.grad.abs() > 0).any()
    for bias in block.biases.values():
        assert (bias.grad.abs() > 0).any()
    assert not any(value.requires_grad for value in ahead._slice.constants.values())


def test_the_error_ahead_is_part_of_what_is_learned():
    job, tuned = made(residual(), IMAGE, TWO, batches=4)
    rest = ahead_of(job)

    def error(block):
        return np.mean(
            [
                float(Ahead(rest, 1.0, {"e": squared}).loss(i, block(as_tensors(job.feeds[i], CPU)), CPU))
                for i in job.train
            ]
        )

    block = SoftBlock(job, tuned, learned_codes(tuned, learn_steps=True))
    with torch.no_grad():
        before = error(block)
    ahead = Ahead(rest, 1.0, {"e": squared})
    learn.learn(
        block,
        job,
        Rates(codes=0.0, steps=1e-2, biases=1e-2),
        iterations=60,
        loss=lambda a, b: 0 * squared(a, b),
        ahead=ahead,
    )
    with torch.no_grad():
        assert error(block) < 0.95 * before


def test_looking_ahead(monkeypatch):
    job, tuned = made(residual(), IMAGE)
    rest = ahead_of(job)
    asked = []
    given = replace(job, rest=lambda reach: (asked.append(reach), rest)[1])
    assert isinstance(look_ahead(given, tuned, "mse", weight=1.0, reach=3), Ahead)
    assert asked == [3]
    assert look_ahead(given, tuned, "mse", weight=0.0, reach=3) is None
    assert asked == [3]
    assert look_ahead(job, tuned, "mse", weight=1.0, reach=3) is None
    whole = replace(rest, targets=[{"e": np.zeros(3, np.int64)}] * 3)
    assert look_ahead(replace(job, rest=lambda _: whole), tuned, "mse", weight=1.0, reach=3) is None

    class Notes(Silence):
        kept = ()

        def note(self, text):
            self.kept += (text,)

    def refuse(*_):
        raise UnsupportedError("no such operator")

    monkeypatch.setattr(learn, "extract", refuse)
    notes = Notes()
    assert look_ahead(replace(given, log=notes), tuned, "mse", weight=1.0, reach=3) is None
    assert notes.kept == ("block block: the rest of its stage is not looked at: no such operator",)
