"""`quantize` on a small transformer layer with an attention mask."""

import numpy as np
import onnx
import pytest
from helpers import proto, run, weights

import onnxq
from onnxq import calibrate, graph
from onnxq.emit import emit
from onnxq.errors import UsageError
from onnxq.passes import apply, migration
from onnxq.passes.migrate import MigrateNorms
from onnxq.pipeline.migration import choose_migrations
from onnxq.pipeline.planning import choose_ranges, observe, plan_of
from onnxq.pipeline.prepare import model_inputs
from onnxq.pipeline.verify import kernel_gap
from onnxq.plan import Precision, Range, make_plan, place
from onnxq.recipe import PRESETS, Recipe, resolve
from onnxq.types import LogGrid, Silence

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


def layer(folder, mask=-1e9, text=TEXT):
    matrices = {name: weights(16, 16, seed=seed) / 4 for seed, name in enumerate(("wq", "wk", "wv", "wo"))}
    vectors = {name: weights(16, seed=seed + 9) for seed, name in enumerate(("bq", "bo", "beta", "lift"))}
    masks = np.triu(np.full((6, 6), mask, np.float32), 1)
    path = folder / "layer.onnx"
    onnx.save(
        proto(text, gamma=UNEVEN, gain=UNEVEN[::-1].copy(), mask=masks, wh=weights(16, 8), bh=weights(8),
              **matrices, **vectors), path)  # fmt: skip
    return path


def sqnr(m, emitted, feeds):
    """Signal-to-noise ratio of the output in decibels."""
    wanted, got = run(m, feeds)["y"], run(emitted, feeds, optimize="all")["y"]
    return 10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum())


def planned(m, **changes):
    """(plan, emitted model) as `quantize` makes them of a model that needs no simplification."""
    settings = resolve("balanced", **changes)
    rows = calibrate.open_data(ROWS, model_inputs(m))
    placement, seen = observe(m, rows, settings, Silence())
    ranges = choose_ranges(m, placement, seen, rows, settings, Silence())
    plan = plan_of(m, placement, ranges, rows, settings, Silence())
    return plan, emit(m, plan)


@pytest.mark.parametrize("mask", [-1e9, -np.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("attention", ["float", "8"])
def test_a_mask_ruins_no_range(mask, attention, tmp_path):
    m = graph.load(layer(tmp_path, mask))
    plan, emitted = planned(m, attention=attention)
    assert sqnr(m, emitted, ROWS) > 26
    assert kernel_gap(emitted, ROWS) <= 1
    assert "masked" in plan.skipped
    assert {"s", "e"}.isdisjoint(plan.tensors)
    assert ({"q", "kt", "v", "a"} <= set(plan.tensors)) is (attention == "8")
    assert max(grid.scale for grid in plan.tensors.values()) < 0.3


def test_few_bits_reach_the_attention_only_when_asked(tmp_path):
    m = graph.load(layer(tmp_path))
    plain, emitted = planned(m, activation_bits=4, first_last=4)
    assert {"scores", "values", "soft"} <= set(plain.skipped)
    best = sqnr(m, emitted, ROWS)
    for changes, log, bits in (
        ({"attention": "auto"}, LogGrid(4, 2), {"q": 4, "kt": 4, "v": 4}),
        ({"attention": "auto", "softmax": "uniform"}, None, {"q": 4, "kt": 4, "v": 4, "a": 4}),
        ({"attention": "5", "softmax": "log2"}, LogGrid(5, 1), {"q": 5, "kt": 5, "v": 5}),
    ):
        plan, emitted = planned(m, activation_bits=4, first_last=4, **changes)
        assert plan.log_softmax == ({} if log is None else {"soft": log})
        more = set(plan.tensors) - set(plain.tensors)
        assert {name: plan.tensors[name].bits for name in more} == bits
        assert kernel_gap(emitted, ROWS) <= 1
        assert 0.5 * best < sqnr(m, emitted, ROWS) < best


def test_the_preset_takes_few_bits_into_the_attention(tmp_path):
    rows, checks = {"x": ROWS["x"][:40]}, onnxq.Checks(time_it=False)
    found = onnxq.quantize(
        layer(tmp_path), rows, "repq-vit", checks=checks, activation_bits=5, weight_bits=5, first_last=5
    )
    assert found.plan.log_softmax == {"soft": LogGrid(5, 2)}
    assert {grid.bits for grid in found.plan.tensors.values()} == {5}
    assert {"q", "kt"} <= set(found.plan.tensors)
    assert "n_scaled" in found.plan.tensors
    assert found.simulated
    assert found.verdict.optimized_gap <= 1
    m = graph.load(layer(tmp_path))
    plain = planned(
        m, ranges="minmax", attention="5", softmax="uniform", activation_bits=5, weight_bits=5, first_last=5
    )
    assert sqnr(m, found.model, ROWS) > sqnr(m, plain[1], ROWS) + 1.0


@pytest.mark.parametrize("bits", [4, 8])
def test_layer_wise_codes_are_those_of_a_grid_per_channel(bits, tmp_path, monkeypatch):
    """RepQ-ViT: codes in the emitted model, against a quantizer per channel of what the float model normalises."""

    def only_repq(low, high, weights_, grid, shift):
        yield migration.repq(low, high, grid.bits, grid.signed, shift=shift)

    monkeypatch.setattr(migration, "_candidates", only_repq)
    m = graph.load(layer(tmp_path))
    y = run(graph.with_outputs(m, ["n"]), ROWS)["n"].astype(np.float64)
    chosen = choose_migrations(m, [ROWS], bits, bits)
    apply(m, [MigrateNorms(chosen)], ROWS)
    placement = place(m)
    last, ranges = 2**bits - 1, {}
    for name in placement.tensors:
        found = chosen.get(name.removesuffix("_scaled"))
        step, zero = (1.0, 0) if found is None else (found.scale, found.zero_point)
        ranges[name] = Range(-zero * step, (last - zero) * step, "given")
    plan = make_plan(m, placement, ranges, Precision(activation_bits=bits, first_last=bits))
    assert plan.tensors["n_scaled"].zero_point == 2 ** (bits - 1)
    low, high = y.min((0, 1)), y.max((0, 1))
    steps = (high - low) / last
    assert steps.max() > 20 * steps.min()
    exact = y / steps + np.rint(-low / steps)
    codes, clear = np.clip(np.rint(exact), 0, last), np.abs(exact - np.floor(exact) - 0.5) > 2e-3
    emitted = emit(m, plan)
    rounding = next(node for node in graph.nodes(emitted, "QuantizeLinear") if node.name.startswith("n_scaled"))
    got = run(graph.with_outputs(emitted, [rounding.outputs[0].name]), ROWS)[rounding.outputs[0].name]
    np.testing.assert_array_equal(got[clear], codes[clear])
    assert clear.mean() > 0.99


def test_what_is_broken_elsewhere_does_not_take_attention_out(tmp_path):
    text = TEXT.replace("float[N,6,8] y", "float[N,6,8] y, float[N,6,8] z")
    text = text.replace("[norm2]", "root = Sqrt(x)\n  z = MatMul(root, wh)\n  [norm2]")
    plan, _ = planned(graph.load(layer(tmp_path, text=text)), attention="4")
    assert "root" not in plan.tensors
    assert plan.log_softmax == {"soft": LogGrid(4, 2)}
    assert {"q", "kt", "v"} <= set(plan.tensors)


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
