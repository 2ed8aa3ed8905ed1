"""Rounding borders: in torch, in a plan, and emitted as operators."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning import FOUR, IMAGE, MIXED, bare_gemm, made, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.emit import emit  # noqa: E402
from onnxq.errors import InputError, UnsupportedError  # noqa: E402
from onnxq.grid import Grid  # noqa: E402
from onnxq.plan.file import plan_from_json, plan_to_json  # noqa: E402
from onnxq.tune.job import quantized, restrict  # noqa: E402
from onnxq.tune.quantizers import ActivationQuantizer, RoundingBorder  # noqa: E402
from onnxq.tune.soft_block import SoftBlock, as_tensors, learned_codes, require_agreement  # noqa: E402
from onnxq.types import Border, TensorGrid, Tuned  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

LIMITS = (0.05, 0.95)


def sigmoid(x):
    return 1 / (1 + np.exp(-4 * x))


def level(kind, terms, place):
    """B by hand; terms [number, channels], place [rows, channels]."""
    t = np.clip(place, 0, 1)
    if kind == "quadratic":
        return np.clip(sigmoid(terms[0] + terms[1] * t + terms[2] * t**2), *LIMITS)
    ends = np.clip(sigmoid(terms), *LIMITS)
    return ends[0] * (1 - t) + ends[-1] * t


@pytest.mark.parametrize(("kind", "count"), [("constant", 1), ("affine", 2), ("quadratic", 3)])
def test_borders_by_hand(kind, count):
    border = RoundingBorder(kind, 5, -1)
    assert border.terms.shape == (count, 5)
    place = weights(40, 5, low=-0.3, high=1.3)
    assert torch.all(border(torch.tensor(place)) == 0.5)
    terms = 0.4 * weights(count, 5, seed=1)
    with torch.no_grad():
        border.terms.copy_(torch.tensor(terms))
    found = border(torch.tensor(place)).detach().numpy()
    np.testing.assert_allclose(found, np.broadcast_to(level(kind, terms, place), found.shape), rtol=1e-5)
    if kind != "quadratic":
        np.testing.assert_allclose(
            border.line(), level(kind, terms, np.asarray([[0.0], [1.0]]) * np.ones(5)), rtol=1e-5
        )
    image = RoundingBorder(kind, 5, -3)
    image.terms = border.terms
    spread = torch.tensor(place.reshape(2, 5, 4, 5))
    moved = border(spread.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(image(spread), moved.expand(2, 5, 4, 5) if kind == "constant" else moved)


def test_straight_borders_stay_where_they_have_a_gradient():
    for kind in ("constant", "affine"):
        border = RoundingBorder(kind, 3, -1)
        with torch.no_grad():
            border.terms.add_(torch.tensor([5.0, -5.0, 0.2]))
        border.limit()
        np.testing.assert_allclose(border.line()[0], [0.95, 0.05, sigmoid(0.2)], atol=1e-6)
        assert border.terms.detach()[0, 0] == pytest.approx(np.log(19) / 4, rel=1e-6)
    curve = RoundingBorder("quadratic", 3, -1)
    with torch.no_grad():
        curve.terms.add_(5.0)
    curve.limit()
    assert torch.all(curve.terms == 5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.floats(0.01, 3),
    st.sampled_from(["constant", "affine", "quadratic"]),
    st.data(),
)
def test_a_border_of_one_half_is_ordinary_rounding(bits, signed, scale, kind, data):
    codes = Grid(bits, signed, symmetric=False)
    grid = TensorGrid(float(np.float32(scale)), data.draw(st.integers(codes.qmin, codes.qmax)), bits, signed)
    x = torch.tensor(weights(64, 3, seed=data.draw(st.integers(0, 9))) * scale * 2**bits)
    x[0] = torch.tensor([0.5, 1.5, -2.5]) * np.float32(scale)  # ties
    plain = ActivationQuantizer(grid, learn=True)
    bordered = ActivationQuantizer(grid, learn=True, border=RoundingBorder(kind, 3, -1))
    assert torch.equal(plain(x), bordered(x))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.sampled_from(["constant", "affine", "quadratic"]), st.integers(0, 99))
def test_values_round_up_from_the_border_on(bits, kind, seed):
    grid = TensorGrid(0.3, 1 if seed % 2 else 0, bits)
    last = 2**bits - 1
    border = RoundingBorder(kind, 3, -1)
    terms = 0.3 * weights(len(border.terms), 3, seed=seed)
    with torch.no_grad():
        border.terms.copy_(torch.tensor(terms))
    x = weights(200, 3, seed=seed, low=-0.3 * 2, high=0.3 * (last + 2))
    quantizer = ActivationQuantizer(grid, learn=True, border=border)
    found = quantizer(torch.tensor(x)).detach().numpy() / 0.3 + grid.zero_point
    units = x / np.float64(np.float32(0.3)) + grid.zero_point
    raised = units + 1 - level(kind, terms, units / last)
    clear = np.abs(raised - np.rint(raised)) > 1e-3
    np.testing.assert_allclose(found[clear], np.clip(np.floor(raised), 0, last)[clear], atol=1e-3)
    assert torch.all(quantizer(torch.zeros(1, 3)) == 0)


def test_gradients_pass_straight_through():
    grid = TensorGrid(0.5, 2, 4)
    border = RoundingBorder("affine", 2, -1)
    with torch.no_grad():
        border.terms.copy_(torch.tensor([[0.1, -0.2], [0.3, 0.1]]))
    quantizer = ActivationQuantizer(grid, learn=False, border=border)
    x = torch.tensor([[0.8, 1.3], [-9.0, 9.0]], requires_grad=True)
    quantizer(x).sum().backward()
    low, high = border.line()
    np.testing.assert_allclose(x.grad[0], 1 - (high - low) / 15, rtol=1e-5)  # dq/du = 1 - dB/du
    np.testing.assert_array_equal(x.grad[1], 0)  # cut off by the grid
    place = (x.detach()[0].numpy() / 0.5 + 2) / 15
    ends = np.stack([low, high])
    slope = 4 * ends * (1 - ends) * np.stack([1 - place, place])
    np.testing.assert_allclose(border.terms.grad, -0.5 * slope, rtol=1e-5)  # dq/dB = -1, in steps of 0.5


def test_a_border_that_rises_too_steeply_goes_back():
    border = RoundingBorder("quadratic", 3, -3)
    with torch.no_grad():
        border.terms.copy_(torch.tensor([[-0.4, 0.1, 0.2], [4.0, 0.3, -4.0], [0.1, 0.2, 0.1]]))
    steep, fine, falling = border.found(3).terms
    assert steep == (0.0, 0.0, 0.0)
    assert fine == pytest.approx((0.1, 0.3, 0.2))
    assert falling == pytest.approx((0.2, -4.0, 0.1))
    assert border.found(3).axis == -3
    assert border.found(15).terms[0] == pytest.approx((-0.4, 4.0, 0.1))  # over more codes it is less steep
    kept = RoundingBorder.fixed(border.found(15))
    assert torch.equal(kept.terms, border.terms)
    assert not kept.terms.requires_grad


def bordered(job, tuned, seed=0):
    """Random curved borders for all tensors but the inputs."""
    borders = {}
    for name in tuned.plan.tensors:
        if name not in job.block.inputs:
            channels, axis = job_channels(job, name)
            terms = 0.25 * weights(channels, 3, seed=seed)
            borders[name] = Border(axis, tuple(tuple(map(float, row)) for row in terms))
    assert borders
    return Tuned(replace(tuned.plan, borders=borders), tuned.layers)


def job_channels(job, name):
    value = run(graph.with_outputs(job.model, [name]), job.feeds[0])[name]
    return (value.shape[1], 1 - value.ndim)


@pytest.mark.parametrize("precision", [FOUR, MIXED])
@pytest.mark.parametrize("build", [residual, bare_gemm])
def test_emitted_borders_are_those_of_the_block_in_torch(build, precision):
    job, tuned = made(build(), IMAGE if build is residual else (40, 8), precision, shrink=0.8)
    with_borders = bordered(job, tuned)
    emitted = quantized(job, with_borders)
    feeds = job.feeds[0]
    found = run(emitted, feeds)["y"]
    plain = run(quantized(job, tuned), feeds)["y"]
    block = SoftBlock(job, with_borders, learned_codes(with_borders)).eval()
    with torch.no_grad():
        wanted = block(as_tensors(feeds, torch.device("cpu")))["y"].numpy()
    off = np.abs(found - wanted) > 1e-3 * np.ptp(wanted)
    assert off.mean() < 0.005
    assert np.mean(np.abs(found - plain) > 1e-3 * np.ptp(plain)) > 0.1
    require_agreement(job, with_borders)
    learns = [grid.border.terms.requires_grad for grid in block.activations() if grid.border is not None]
    assert len(learns) == len(with_borders.plan.borders)
    assert not any(learns)


@pytest.mark.parametrize("axis", [-1, -3])
@pytest.mark.parametrize(("bits", "signed", "zero"), [(8, False, 0), (4, False, 3), (3, True, -1), (2, False, 0)])
def test_one_emitted_border(axis, bits, signed, zero):
    shape = (6, 5, 4, 5)
    text = "g (float[6,5,4,5] x, float[5,5] w) => (float[6,5,4,5] y) { h = Mul(x, x) i = Sub(h, x) y = MatMul(i, w) }"
    m = model(text, w=np.eye(5, dtype=np.float32))
    grid = TensorGrid(4 / 2**bits, zero, bits, signed)
    terms = 0.3 * weights(5, 3, seed=2)
    border = Border(axis, tuple(tuple(map(float, row)) for row in terms))
    _, tuned = made(m, shape)
    plan = replace(tuned.plan, tensors={"i": grid}, weights={}, integer=(), borders={"i": border})
    feeds = {"x": weights(*shape, seed=4)}
    found = run(emit(m, plan), feeds)["y"]
    values = torch.tensor(run(graph.with_outputs(m, ["i"]), feeds)["i"])
    wanted = ActivationQuantizer(grid, learn=False, border=RoundingBorder.fixed(border))(values).numpy()
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.004  # ties apart
    assert np.abs(found - wanted).max() < 1.01 * grid.scale
    again = ActivationQuantizer(grid, learn=False, border=RoundingBorder.fixed(border))(torch.tensor(wanted)).numpy()
    np.testing.assert_allclose(again, wanted, atol=1e-6)  # codes stay codes


def test_borders_of_a_part():
    job, tuned = made(residual(), IMAGE, FOUR)
    state = bordered(job, tuned)
    every = {**state.plan.borders, "x": Border(-3, ((0.1, 0.1, 0.1),) * 4), "elsewhere": Border(-1, ((0.1, 0.1, 0.1),))}
    part = restrict(replace(state.plan, borders=every), job.model)
    assert part.borders == state.plan.borders  # inputs come rounded already


def test_a_plan_keeps_its_borders(tmp_path):
    job, tuned = made(residual(), IMAGE, FOUR)
    state = bordered(job, tuned)
    text = plan_to_json(state.plan)
    assert plan_from_json(text) == state.plan
    assert plan_from_json(plan_to_json(tuned.plan).replace('"borders": {}', '"sums": []')).borders == {}
    name = next(iter(state.plan.borders))
    for key, value, says in (
        ("axis", 1, "the axis must be an integer below 0, not 1"),
        ("terms", ((0.0, 0.0),), "terms must be three numbers for each channel"),
        ("terms", ((0.0, 0.0, float("nan")),), "terms must be three numbers for each channel"),
    ):
        wrong = replace(state.plan, borders={name: replace(state.plan.borders[name], **{key: value})})
        with pytest.raises(InputError, match=f"border {name}: {says}"):
            plan_from_json(plan_to_json(wrong))
    with pytest.raises(InputError, match=r"unknown key 'term'\. Did you mean 'terms'"):
        plan_from_json(text.replace('"terms"', '"term"'))
    with pytest.raises(UnsupportedError, match="gives 'p' a rounding border, but does not quantize it"):
        emit(job.model, replace(tuned.plan, borders={"p": state.plan.borders[name]}))
