"""Imported models: the same outputs, trained weights in the right places."""

import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.errors import UnsupportedError  # noqa: E402
from onnxq.train import Distillation, Imported, distill, ranges_of  # noqa: E402
from onnxq.train.distill import distance, mixed  # noqa: E402

torch.set_num_threads(1)

MIXED = """
g (float[n,3,8,8] x, float[4,3,3,3] w, float[4] b, float[4,1,3,3] d, float[4,5] m, float[5] mb, float[5,6] h,
   float[6] hb, float[1] k)
=> (float[n,6] y, float[n,5] z) {
  a = Conv<strides=[2,2], pads=[1,0,1,1]>(x, w, b)
  r = Relu(a)
  e = Conv<group=4>(r, d)
  q = GlobalAveragePool(e)
  f = Flatten(q)
  p = MatMul(f, m)
  z = Add(mb, p)
  s = Mul(z, k)
  y = Gemm<transB=0>(s, h, hb)
}
"""


def network(seed=0):
    return model(
        MIXED,
        w=weights(4, 3, 3, 3, seed=seed),
        b=weights(4, seed=seed),
        d=weights(4, 1, 3, 3, seed=seed),
        m=weights(4, 5, seed=seed),
        mb=weights(5, seed=seed),
        h=weights(5, 6, seed=seed),
        hb=weights(6, seed=seed),
        k=np.float32([1.5]),
    )


def image(rows=4, seed=1):
    return {"x": weights(rows, 3, 8, 8, seed=seed)}


def tensors(feeds):
    return {name: torch.from_numpy(value) for name, value in feeds.items()}


def test_it_computes_what_the_runtime_computes():
    source = network()
    module = Imported(source)
    feeds = image()
    found = module(tensors(feeds))
    assert list(found) == ["y", "z"]
    assert_same_outputs(run(source, feeds), {name: found[name].detach().numpy() for name in ("y", "z")})
    assert module.error(source, feeds) < 1e-5
    assert (module.inputs, module.outputs) == (("x",), ("y", "z"))


def test_weights_and_biases_of_layers_are_its_parameters_and_go_back():
    source = network()
    module = Imported(source)
    assert sorted(tuple(value.shape) for value in module.parameters()) == sorted(
        [(4, 3, 3, 3), (4,), (4, 1, 3, 3), (4, 5), (5,), (5, 6), (6,)]
    )
    with torch.no_grad():
        for index, value in enumerate(module.parameters()):
            value += 0.1 * (index + 1) * torch.sin(torch.arange(value.numel()).reshape(value.shape))
    feeds = image()
    written = module.written(source)
    found = {name: value.detach().numpy() for name, value in module(tensors(feeds)).items()}
    assert_same_outputs(run(written, feeds), found)
    before = run(source, feeds)
    assert np.abs(before["y"] - found["y"]).max() > 0.1
    assert_same_outputs(before, {name: value.numpy() for name, value in module.original(tensors(feeds)).items()})
    assert graph.input_specs(written) == graph.input_specs(source)
    np.testing.assert_array_equal(graph.constant(graph.value_map(written)["k"]), [1.5])


def test_weights_are_found_with_their_channels():
    found = Imported(network()).ranged_weights()
    assert [(tuple(w.read().shape), w.axis, w.depthwise) for w in found] == [
        ((4, 3, 3, 3), 0, False),
        ((4, 1, 3, 3), 0, True),
        ((4, 5), 1, False),
        ((5, 6), 1, False),
    ]


def test_a_shared_weight_stays_one():
    text = "g (float[n,4] x, float[4,4] w) => (float[n,4] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }"
    source = model(text, w=weights(4, 4))
    module = Imported(source)
    assert len(list(module.parameters())) == len(module.ranged_weights()) == 1
    with torch.no_grad():
        next(iter(module.parameters())).mul_(2.0)
    feeds = {"x": weights(3, 4, seed=2)}
    np.testing.assert_allclose(run(module.written(source), feeds)["y"], 4 * run(source, feeds)["y"], rtol=1e-5)


def test_what_cannot_be_trained_is_refused():
    text = "g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }"
    with pytest.raises(UnsupportedError, match="no Conv, Gemm or MatMul"):
        Imported(model(text))
    text = "g (float[n,4] x, float[4,4] w) => (float[n,4] y, float[k] u) { y = MatMul(x, w)  u = Unique(y) }"
    with pytest.raises(UnsupportedError, match="Unique"):
        Imported(model(text, w=weights(4, 4)))


def test_an_initializer_takes_only_what_fits():
    source = network()
    graph.set_initializer(source, "hb", np.ones(6, np.float32))
    np.testing.assert_array_equal(graph.constant(graph.value_map(source)["hb"]), np.ones(6))
    for name, value in (("hb", np.ones(5, np.float32)), ("hb", np.ones(6)), ("none", np.ones(6, np.float32))):
        with pytest.raises(ValueError, match="initializer"):
            graph.set_initializer(source, name, value)


def batches(count=6):
    return [image(8, seed=index) for index in range(count)]


def test_distilling_narrows_weights_and_keeps_outputs():
    source = network()
    module = Imported(source)
    before = ranges_of(module.ranged_weights())
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    settings = Distillation(iterations=100, rate=1e-2, strength=0.3, per_channel=False)
    trace = distill(module, batches(), settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = ranges_of(module.ranged_weights())
    assert sum(r.per_tensor for r in after) < 0.9 * sum(r.per_tensor for r in before)
    assert trace[-1][1] < 0.9 * trace[0][1]
    assert trace[-1][0] < 0.1
    feeds = image(32, seed=9)
    wanted, found = run(source, feeds), run(module.written(source), feeds)
    for name in wanted:
        assert np.square(found[name] - wanted[name]).sum() < 0.05 * np.square(wanted[name]).sum()


def test_the_same_seed_gives_the_same_weights():
    ends = []
    for seed in (0, 0, 1):
        module = Imported(network())
        torch.manual_seed(len(ends))
        trace = distill(module, batches(), Distillation(iterations=12, rate=1e-2, seed=seed))
        ends.append((trace, [value.detach() for value in module.parameters()]))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_without_strength_nothing_moves_far_and_every_batch_is_seen():
    module = Imported(network())
    seen = []
    module.register_forward_pre_hook(lambda _, given: seen.append(float(given[0]["x"][0, 0, 0, 0])))
    distill(module, batches(4), Distillation(iterations=8, strength=0.0, mix=False, rate=1e-4))
    firsts = {float(np.float32(feeds["x"][0, 0, 0, 0])) for feeds in batches(4)}
    assert set(seen[:4]) == set(seen[4:]) == firsts
    assert distance(module(tensors(image())), module.original(tensors(image()))).item() < 1e-5


def test_the_first_step_is_the_rate_times_the_weights_size():
    module = Imported(network())
    before = [value.detach().clone() for value in module.parameters()]
    distill(module, batches(1), Distillation(iterations=1, strength=1.0, kind="linf", rate=0.01, mix=False))
    for old, new in zip(before, module.parameters(), strict=True):
        moved = float((new.detach() - old).abs().max())
        if old.ndim > 1:
            assert moved == pytest.approx(0.01 * float(old.square().mean().sqrt()), rel=1e-3)


def test_the_distance_by_hand():
    wanted = {"y": torch.tensor([[1.0, 2.0, 3.0]]), "z": torch.ones(1, 2, 2), "n": torch.tensor([1])}
    found = {"y": torch.tensor([[1.0, 2.0, 2.0]]), "z": torch.full((1, 2, 2), 1.5), "n": torch.tensor([2])}
    p, q = (np.exp(v) / np.exp(v).sum() for v in (np.array([1.0, 2, 3]), np.array([1.0, 2, 2])))
    divergence = (p * np.log(p / q)).sum()
    assert distance(found, wanted).item() == pytest.approx(divergence + 1 / 14 + 0.25, rel=1e-5)
    twice = (
        {name: torch.cat([value, value]) for name, value in wanted.items()},
        {name: torch.cat([value, value]) for name, value in found.items()},
    )
    assert distance(twice[1], twice[0]).item() == pytest.approx(divergence + 1 / 14 + 0.25, rel=1e-5)
    shares = {**wanted, "y": torch.tensor([[0.2, 0.3, 0.5]])}
    guess = {**found, "y": torch.tensor([[0.3, 0.3, 0.4]])}
    divergence = 0.2 * np.log(0.2 / 0.3) + 0.5 * np.log(0.5 / 0.4)
    assert distance(guess, shares).item() == pytest.approx(divergence + 0.02 / 0.38 + 0.25, rel=1e-5)


def test_rows_are_mixed_with_one_share_for_all_inputs():
    torch.manual_seed(0)
    rows = torch.eye(6)
    found = mixed({"a": rows, "b": rows.reshape(6, 2, 3) * 10})
    np.testing.assert_allclose(found["a"].sum(1), np.ones(6), rtol=1e-6)
    np.testing.assert_allclose(found["b"].reshape(6, 6), 10 * found["a"], rtol=1e-5)
    assert not torch.equal(found["a"], rows)
    tokens = {"a": rows, "ids": torch.arange(6)}
    assert mixed(tokens)["a"] is rows
    assert mixed({"a": rows[:1]})["a"].shape == (1, 6)
