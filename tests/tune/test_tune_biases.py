"""Biases learned on the outputs of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from helpers import model, run, weights
from tuning import FOUR, concat, handed_on, made, mlp, plan_of, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.emit import emit, weight_codes  # noqa: E402
from onnxq.errors import UnsupportedError  # noqa: E402
from onnxq.plan import Precision  # noqa: E402
from onnxq.runtime import Session  # noqa: E402
from onnxq.tune import biases  # noqa: E402
from onnxq.tune.biases import distance, tune_biases  # noqa: E402
from onnxq.tune.soft_block import SoftBlock, as_tensors, learned_codes, require_agreement  # noqa: E402
from onnxq.types import LearnedLayer, Silence, Tuned  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

ROUGH = Precision(weight_bits=3, first_last=3, per_channel=False)


@dataclass
class Heard(Silence):
    notes: list = field(default_factory=list)

    def note(self, text):
        self.notes.append(text)


def classifier(end="Gemm"):
    """Conv without a bias, Relu, Conv with one, pooled; a classifier of 5 classes."""
    tail = {"Gemm": "y = Gemm(q, t, d)", "Softmax": "r = Gemm(q, t, d) y = Softmax<axis = 1>(r)"}[end]
    text = f"""g (float[n,3,8,8] x, float[6,3,3,3] w, float[8,6,3,3] v, float[8] c, float[8,5] t, float[5] d)
    => (float[n,5] y) {{
        [a] h = Conv<pads = [1, 1, 1, 1]>(x, w) i = Relu(h) [b] j = Conv<strides = [2, 1]>(i, v, c) k = Relu(j)
        p = GlobalAveragePool(k) q = Flatten(p) [d] {tail}
    }}"""
    constants = {"w": weights(6, 3, 3, 3) / 3, "v": weights(8, 6, 3, 3) / 4, "c": weights(8) / 2, "d": weights(5)}
    m = model(text, **constants, t=3 * weights(8, 5))
    graph.infer_shapes(m)
    return m


BATCHES = [{"x": 1.5 * weights(16, 3, 8, 8, seed=seed) + weights(16, 3, 1, 1, seed=seed)} for seed in range(5)]


@pytest.fixture(scope="module", params=["Gemm", "Softmax"])
def case(request):
    m = classifier(request.param)
    return m, Tuned(plan_of(m, BATCHES, ROUGH, 0.8))


def softmax(x):
    parts = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    return parts / parts.sum(axis=1, keepdims=True)


def divergence(m, tuned, batches):
    """The mean KL divergence of the emitted model's classes from the float model's."""
    total = 0.0
    for feeds in batches:
        wanted = run(m, feeds)["y"]
        found = run(emit(m, tuned.plan, learned=tuned.layers), feeds, optimize="all")["y"]
        if any(node.op_type == "Softmax" for node in m.graph):
            p, q = wanted.astype(np.float64), np.maximum(found.astype(np.float64), 1e-4)
            total += float((p * np.log(np.maximum(p, 1e-4) / q) + q - p).sum(axis=1).mean())
        else:
            p, q = softmax(wanted), softmax(found)
            total += float((p * np.log(p / q)).sum(axis=1).mean())
    return total / len(batches)


def test_only_biases_change_and_the_classes_get_nearer(case):
    m, tuned = case
    found = tune_biases(m, tuned, BATCHES, iterations=60, rate=5e-3)
    assert found is not tuned
    assert found.plan == tuned.plan
    assert found.layers.keys() == {"a", "b", "d"}
    nodes = graph.node_names(m)
    for name, learned in found.layers.items():
        layer = graph.layer_of(nodes[name])
        np.testing.assert_array_equal(learned.codes, weight_codes(layer, tuned.plan.weights[name]))
        assert learned.bias.dtype == np.float32
        assert np.abs(learned.bias - (0 if layer.bias is None else layer.bias)).max() > 1e-3
    assert divergence(m, found, BATCHES[:4]) < 0.9 * divergence(m, tuned, BATCHES[:4])
    assert divergence(m, found, BATCHES[4:]) < divergence(m, tuned, BATCHES[4:])


def test_it_repeats_and_seeds_count():
    m = classifier()
    tuned = Tuned(plan_of(m, BATCHES, ROUGH, 0.8))
    one, two, other = (tune_biases(m, tuned, BATCHES, iterations=20, rate=5e-3, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one.layers[name].bias, two.layers[name].bias) for name in one.layers)
    assert any(not np.array_equal(one.layers[name].bias, other.layers[name].bias) for name in one.layers)


def test_learned_codes_stay():
    m = classifier()
    tuned = Tuned(plan_of(m, BATCHES, ROUGH, 0.8))
    layer = graph.layer_of(graph.node_names(m)["a"])
    codes = weight_codes(layer, tuned.plan.weights["a"])
    codes[0, 0, 0, 0] += 1
    start = replace(tuned, layers={"a": LearnedLayer(codes, weights(6))})
    found = tune_biases(m, start, BATCHES, iterations=40, rate=2e-2)
    assert found is not start
    np.testing.assert_array_equal(found.layers["a"].codes, codes)
    assert 0 < np.abs(found.layers["a"].bias - weights(6)).max() < 0.5


def test_torch_computes_the_emitted_model_with_the_biases_found():
    for build, shape in ((residual, (8, 4, 6, 6)), (concat, (8, 4, 6, 6)), (mlp, (8, 5, 8)), (handed_on, (8, 4, 6, 6))):
        job, tuned = made(build(), shape, FOUR)
        found = tune_biases(job.model, tuned, job.feeds, iterations=5, rate=1e-2)
        block = SoftBlock(job, found, learned_codes(found), learn_grids=False).eval()
        with torch.no_grad():
            given = block(as_tensors(job.feeds[0], torch.device("cpu")))
        emitted = Session(emit(job.model, found.plan, learned=found.layers)).run(job.feeds[0])
        for name, value in emitted.items():
            unit = found.plan.tensors[name].scale if name in found.plan.tensors else np.ptp(value)
            assert np.mean(np.abs(given[name].numpy() - value) > 1e-3 * unit) < 0.01


@pytest.mark.parametrize("end", ["Gemm", "Softmax"])
def test_gradients_of_the_loss(end):
    """Against differences, in a model whose roundings are left out."""
    m = classifier(end)
    part = made(m, (6, 3, 8, 8))[0]
    target = torch.tensor(part.targets[0]["y"]).double()
    given = target + 0.1 * torch.tensor(weights(*target.shape)).double()
    if end == "Softmax":
        given = given.abs() + 0.01
    given.requires_grad_()
    assert torch.autograd.gradcheck(lambda found: distance(found, target), given)


def test_every_bias_gets_a_gradient():
    job, tuned = made(classifier(), (6, 3, 8, 8), FOUR)
    block = SoftBlock(job, tuned, learned_codes(tuned), learn_grids=False)
    feeds, target = job.feeds[0], torch.tensor(job.targets[0]["y"])
    distance(block(as_tensors(feeds, torch.device("cpu")))["y"], target).backward()
    learned = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
    assert learned == {f"biases.{block._key[name]}" for name in "abd"}
    assert all(bias.grad.abs().max() > 1e-6 for bias in block.biases.values())


def test_the_loss_by_hand():
    logits, given = weights(4, 5), weights(4, 5, seed=1)
    p, q = softmax(logits), softmax(given)
    wanted = (p * np.log(p / q)).sum(axis=1).mean()
    assert distance(torch.tensor(given), torch.tensor(logits)).item() == pytest.approx(wanted, rel=1e-5)
    assert distance(torch.tensor(given + 7), torch.tensor(logits)).item() == pytest.approx(wanted, rel=1e-4)
    p, q = p.astype(np.float32), (1.1 * q).astype(np.float32)
    wanted = (p * np.log(p / q) + q - p).sum(axis=1).mean()
    assert distance(torch.tensor(q), torch.tensor(p)).item() == pytest.approx(wanted, rel=1e-4)
    assert distance(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(
        np.log(1e4) - 1 + 1e-4, rel=1e-4
    )
    for shape in ((4, 5, 1), (4, 1), (20,)):  # no classes
        found, target = (torch.tensor(side.reshape(-1)[: np.prod(shape)].reshape(shape)) for side in (given, logits))
        power = float(((found - target) ** 2).sum() / (target**2).sum())
        assert distance(found, target).item() == pytest.approx(power, rel=1e-5)


def test_what_does_not_help_is_dropped():
    m = classifier()
    tuned = Tuned(plan_of(m, BATCHES, ROUGH, 0.8))
    heard = Heard()
    assert tune_biases(m, tuned, BATCHES, iterations=20, rate=3.0, log=heard) is tuned
    assert heard.notes == ["biases stay as they are: tuning them does not help this model"]
    assert tune_biases(m, tuned, BATCHES, iterations=0) is tuned
    assert tune_biases(m, tuned, BATCHES, iterations=20, rate=float("inf")) is tuned


class Watched(Sequence):
    """Batches that note which of them are read."""

    def __init__(self, batches):
        self.batches, self.read = batches, set()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        if index < len(self.batches):
            self.read.add(index)
        return self.batches[index]


def test_the_batches_kept_back_judge(monkeypatch):
    m = classifier()
    tuned = Tuned(plan_of(m, BATCHES, ROUGH, 0.8))
    watched, real, learned_from = Watched(BATCHES), biases.learn, []

    def watched_learn(*given, **named):
        watched.read.clear()
        real(*given, **named)
        learned_from.append(set(watched.read))
        watched.read.clear()

    monkeypatch.setattr(biases, "learn", watched_learn)
    tune_biases(m, tuned, watched, iterations=8, rate=5e-3)
    assert learned_from == [{0, 1, 2, 3}]
    assert watched.read == {4}


def test_a_model_that_torch_cannot_run_stays():
    text = """g (float[n,6] x, float[6,5] w, float[5] b) => (float[n,5] y, float[k] u) {
        [a] y = Gemm(x, w, b) [odd] u = Unique(y)
    }"""
    job, tuned = made(model(text, w=weights(6, 5), b=weights(5)), (8, 6))
    heard = Heard()
    assert tune_biases(job.model, tuned, job.feeds, log=heard) is tuned
    assert heard.notes == ["biases stay as they are: node odd (Unique) cannot run in torch: no such operator here"]


def test_a_model_that_torch_computes_otherwise_stays(monkeypatch):
    job, tuned = made(mlp(), (8, 5, 8))
    heard, tolerances = Heard(), []

    def refuse(job, tuned, *, tolerance):
        tolerances.append(tolerance)
        require_agreement(job, tuned, tolerance=tolerance)
        raise UnsupportedError("torch computes another y than onnxruntime")

    monkeypatch.setattr(biases, "require_agreement", refuse)
    assert tune_biases(job.model, tuned, job.feeds, log=heard) is tuned
    assert heard.notes == ["biases stay as they are: torch computes another y than onnxruntime"]
    assert tolerances == [0.25]
