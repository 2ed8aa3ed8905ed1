"""`quantize` on a small transformer layer with an attention mask."""

import numpy as np
import onnx
import pytest
from helpers import proto, run, weights

import onnxq
from onnxq import graph
from onnxq.errors import UsageError
from onnxq.passes import migration
from onnxq.recipe import PRESETS, Recipe, resolve
from onnxq.types import LogGrid

TEXT = """
g (float[N,6,16] x, float[16] gamma, float[16] beta, float[16,16] wq, float[16] bq, float[16,16] wk, float[16,16] wv,
   float[6,6] mask, float[16,16] wo, float[16] bo, float[16] gain, float[16] lift, float[16,8] wh, float[8] bh) =>
    (float[N,6,8] y) {
  [norm] n = LayerNormalization<axis = -1, epsilon = 0.1>(x, gamma, beta)
  mq = MatMul(n, wq)
  q = Add(mq, bq)
  k = MatMul(n, wk)
  v = MatMul(n, wv)
  kt = Transpose<perm = [0, 2, 1]>(k)
  [scores] s = MatMul(q, kt)
  [masked] e = Add(s, mask)
  [soft] a = Softmax<axis = -1>(e)
  [values] h = MatMul(a, v)
  mo = MatMul(h, wo)
  o = Add(mo, bo)
  r = Add(o, x)
  [norm2] n2 = LayerNormalization<axis = -1, epsilon = 0.1>(r, gain, lift)
  mh = MatMul(n2, wh)
  y = Add(mh, bh)
}
"""
ROWS = {"x": weights(60, 6, 16, seed=5)}
UNEVEN = np.exp(weights(16, seed=6) * 1.5)


def layer(folder, mask=-1e9):
    matrices = {name: weights(16, 16, seed=seed) / 4 for seed, name in enumerate(("wq", "wk", "wv", "wo"))}
    vectors = {name: weights(16, seed=seed + 9) for seed, name in enumerate(("bq", "bo", "beta", "lift"))}
    masks = np.triu(np.full((6, 6), mask, np.float32), 1)
    path = folder / "layer.onnx"
    onnx.save(
        proto(TEXT, gamma=UNEVEN, gain=UNEVEN[::-1].copy(), mask=masks, wh=weights(16, 8), bh=weights(8),
              **matrices, **vectors), path)  # fmt: skip
    return path


def quantized(path, **changes):
    return onnxq.quantize(path, ROWS, checks=onnxq.Checks(time_it=False), **changes)


def sqnr(found):
    return found.verdict.fidelity.sqnr_db["y"]


@pytest.mark.parametrize("mask", [-1e9, -np.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("attention", ["float", "8"])
def test_a_mask_ruins_no_range(mask, attention, tmp_path):
    found = quantized(layer(tmp_path, mask), attention=attention)
    assert sqnr(found) > 28
    assert found.verdict.optimized_gap <= 1
    assert "masked" in found.plan.skipped
    assert {"s", "e"}.isdisjoint(found.plan.tensors)
    assert ({"q", "kt", "v", "a"} <= set(found.plan.tensors)) is (attention == "8")
    assert max(grid.scale for grid in found.plan.tensors.values()) < 0.2


def test_few_bits_reach_the_attention_only_when_asked(tmp_path):
    path = layer(tmp_path)
    plain = quantized(path, activation_bits=4, first_last=4)
    assert {"scores", "values", "soft"} <= set(plain.plan.skipped)
    for changes, log, bits in (
        ({"attention": "auto"}, LogGrid(4, 2), {"q": 4, "kt": 4, "v": 4}),
        ({"attention": "auto", "softmax": "uniform"}, None, {"q": 4, "kt": 4, "v": 4, "a": 4}),
        ({"attention": "6", "softmax": "log2"}, LogGrid(6, 1), {"q": 6, "kt": 6, "v": 6}),
    ):
        found = quantized(path, activation_bits=4, first_last=4, **changes)
        assert found.plan.log_softmax == ({} if log is None else {"soft": log})
        more = set(found.plan.tensors) - set(plain.plan.tensors)
        assert {name: found.plan.tensors[name].bits for name in more} == bits
        assert found.simulated
        assert found.verdict.optimized_gap <= 1
        assert 3 < sqnr(found) < sqnr(plain)


def test_the_preset_takes_few_bits_into_the_attention_and_8_not(tmp_path):
    path = layer(tmp_path)
    eight = quantized(path, recipe="repq-vit")
    assert not eight.simulated
    assert not eight.plan.log_softmax
    assert "n_scaled" in eight.plan.tensors
    few = quantized(path, recipe="repq-vit", activation_bits=5, weight_bits=5, first_last=5)
    assert few.plan.log_softmax == {"soft": LogGrid(5, 2)}
    assert few.plan.tensors["v"].bits == 5
    plain = quantized(
        path, recipe="fast", attention="5", softmax="uniform", activation_bits=5, weight_bits=5, first_last=5
    )
    assert sqnr(few) > sqnr(plain) + 1.0


def only_repq(low, high, weights_, grid, shift):
    """RepQ-ViT's reparameterisation as the only candidate."""
    yield migration.repq(low, high, grid.bits, grid.signed, shift=shift)


@pytest.mark.parametrize("bits", [4, 8])
def test_layer_wise_codes_are_those_of_a_grid_per_channel(bits, tmp_path, monkeypatch):
    """Codes that the emitted model makes, against a quantizer per channel of what the float model normalises."""
    monkeypatch.setattr(migration, "_candidates", only_repq)
    path = layer(tmp_path)
    found = quantized(path, ranges="minmax", migrate_norms=True, activation_bits=bits, first_last=bits, bn_tuning=False)
    grid = found.plan.tensors["n_scaled"]
    values = graph.value_map(found.prepared.model)
    node = values["n_scaled"].producer()
    gamma, beta = (graph.constant(value).astype(np.float64) for value in node.inputs[1:])
    original = graph.node_names(graph.load(path))["norm"]
    old_gamma, old_beta = (graph.constant(value).astype(np.float64) for value in original.inputs[1:])
    ratios = old_gamma / gamma
    shifts = old_beta / ratios - beta
    assert np.ptp(np.log(ratios)) > 2
    zeros = grid.zero_point - shifts / grid.scale
    np.testing.assert_allclose(zeros, np.rint(zeros), atol=2e-3)  # RepQ-ViT's integer zero point per channel
    y = run(graph.with_outputs(graph.load(path), ["n"]), ROWS)["n"].astype(np.float64)
    exact = y / (grid.scale * ratios) + np.rint(zeros)
    codes = np.clip(np.rint(exact), 0, 2**bits - 1)
    rounding = next(user for user in graph.value_map(found.model)["n_scaled_q"].producer().inputs)
    assert rounding is not None
    got = run(graph.with_outputs(found.model, ["n_scaled_q"]), ROWS)["n_scaled_q"]
    ties = np.abs(exact - np.floor(exact) - 0.5) < 0.01
    np.testing.assert_array_equal(got[~ties], codes[~ties])
    assert ties.mean() < 0.05
    assert (np.ptp(got.reshape(-1, 16), axis=0) >= 0.85 * (2**bits - 1)).all()  # every channel has all of the codes


@pytest.mark.parametrize(
    ("attention", "activations", "bits"),
    [("float", 4, 0), ("auto", 4, 4), ("auto", 6, 6), ("auto", 7, 0), ("auto", 8, 0), ("8", 4, 8), ("2", 8, 2)],
)
def test_bits_of_attention(attention, activations, bits):
    assert Recipe(attention=attention, activation_bits=activations).attention_bits == bits


def test_the_recipe_of_the_preset():
    recipe = PRESETS["repq-vit"]
    assert (recipe.migrate_norms, recipe.attention, recipe.softmax, recipe.reconstruction) == (
        True, "auto", "auto", "none",
    )  # fmt: skip
    with pytest.raises(UsageError, match="attention takes float, auto, 2"):
        resolve(attention="9")
    with pytest.raises(UsageError, match="softmax takes auto, uniform, log-sqrt2, log2"):
        resolve(softmax="log")
    with pytest.raises(UsageError, match="budgets leave the products of attention in float"):
        resolve("repq-vit", activation_bits=4, max_size="0.2x")
    assert resolve("repq-vit", max_size="0.2x").wishes


def test_learning_takes_the_grid_of_the_probabilities_as_it_is(tmp_path):
    pytest.importorskip("torch")
    changes = {"activation_bits": 4, "weight_bits": 4, "first_last": 8, "samples": 24, "bn_tuning": False}
    found = quantized(layer(tmp_path), recipe="repq-vit", reconstruction="adaquant", iterations=3, **changes)
    assert found.plan.log_softmax == {"soft": LogGrid(4, 2)}
    assert found.blocks
