from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from helpers import assert_same_outputs, model, proto, run, weights

import onnxq
from onnxq import graph
from onnxq.errors import RewriteError
from onnxq.overrides import Override
from onnxq.passes import apply, migration
from onnxq.passes.migrate import MigrateNorms
from onnxq.pipeline.migration import choose_migrations, likely_bits, migrates
from onnxq.recipe import PRESETS, Recipe
from onnxq.types import Silence

UNEVEN = np.array([0.02, 5.0, 0.1, 1.0, 30.0, 0.3, 2.0, 0.5], np.float32)
TEXT = """g (float[N,4,8] x, float[8] gamma, float[8] beta, float[8,6] w, float[8] flat, float[8] zero) =>
    (float[N,4,6] y, float[N,4,8] z) {
    n = LayerNormalization(x, gamma, beta)
    y = MatMul(n, w)
    m = LayerNormalization(x, flat, zero)
    z = Add(m, x)
}"""


class Notes(Silence):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def made(gamma=UNEVEN):
    m = model(TEXT, gamma=gamma, beta=weights(8, seed=1) * 40, w=weights(8, 6),
              flat=np.ones(8, np.float32), zero=np.zeros(8, np.float32))  # fmt: skip
    graph.infer_shapes(m)
    return m


def test_uneven_channels_are_migrated_and_the_model_stays():
    m, log = made(), Notes()
    data = [{"x": weights(16, 4, 8, seed=index)} for index in range(3)]
    chosen = choose_migrations(m, data, 8, 8, log)
    assert list(chosen) == ["n"]
    assert log.notes == ["1 of 1 normalisations hand their channels' scales to the layers behind them"]
    assert chosen["n"].shifts.any()
    assert np.ptp(np.log(chosen["n"].ratios)) > 1.0
    before = run(m, data[0])
    found = apply(m, [MigrateNorms(chosen)], data[0])[0]
    assert found.count == 1
    assert "Add" in next(iter(found.refused.values()))
    assert_same_outputs(before, run(m, data[0]), rtol=1e-4, atol=1e-3)


def test_a_model_without_pairs_is_not_even_run():
    m = model("g (float[N,4] x, float[4,2] w) => (float[N,2] y) { y = MatMul(x, w) }", w=weights(4, 2))
    assert choose_migrations(m, []) == {}


def test_what_gains_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(migration, "LEAST_GAIN", 0.9999999)
    assert choose_migrations(made(), [{"x": weights(16, 4, 8)}]) == {}


def test_who_migrates():
    assert migrates(Recipe())
    assert migrates(Recipe(target="tensorrt"))
    assert not migrates(Recipe(migrate_norms=False))
    assert not migrates(Recipe(weight_only=True))
    assert not migrates(Recipe(target="cuda"))
    assert [name for name, recipe in PRESETS.items() if not recipe.migrate_norms] == ["fast", "fastest"]


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        (Recipe(), 8),
        (Recipe(weight_bits=3), 3),
        (Recipe(codebook_bits=1), 2),
        (Recipe(avg_bits="5"), 5),
        (Recipe(max_bops="0.4x"), 4),
        (Recipe(max_drop="0.01"), 8),
        (Recipe(max_latency="0.5x"), 8),
        (Recipe(layers=(Override("*/fc1", weight_bits=5), Override("*/fc2", keep_float=True))), 5),
        (Recipe(layers=(Override("*/fc1", codebook_bits=3),)), 3),
    ],
)
def test_migrations_are_for_the_fewest_bits_that_most_weights_may_get(recipe, bits):
    assert likely_bits(recipe, made(), 1000) == bits


@pytest.mark.parametrize(("size", "bits"), [("0.5x", 8), ("0.2x", 6), ("130KB", 3), ("1KB", 2), ("0.01x", 2)])
def test_a_size_leaves_what_tables_and_nodes_do_not_take(size, bits):
    """256 x 1,024 weights, and a table of 100 x 128 that takes a byte per element."""
    m = model(
        "g (int64[N] x, float[100,128] t, float[128,256] v, float[256,1024] w) => (float[N,1024] y) {"
        " e = Gather(t, x) h = MatMul(e, v) y = MatMul(h, w) }",
        t=weights(100, 128), v=weights(128, 256), w=weights(256, 1024),
    )  # fmt: skip
    assert likely_bits(Recipe(max_size=size), m, 4 * (100 * 128 + 128 * 256 + 256 * 1024)) == bits


def test_a_factor_of_their_own_must_gain_more(monkeypatch):
    text = TEXT.replace("y = MatMul(n, w)", "p = MatMul(n, w)\n    y = Add(p, o)").replace(
        "[N,4,6] y", "[N,4,6] y, float[N,4,8] n"
    )
    m = model(text.replace("float[8,6] w,", "float[8,6] w, float[6] o,"), gamma=UNEVEN, beta=weights(8, seed=1),
              w=weights(8, 6), o=weights(6), flat=np.ones(8, np.float32), zero=np.zeros(8, np.float32))  # fmt: skip
    graph.infer_shapes(m)
    data = [{"x": weights(16, 4, 8)}]
    assert list(choose_migrations(m, data)) == ["n"]
    monkeypatch.setattr("onnxq.pipeline.migration.COPY_GAIN", 0.999999)
    assert choose_migrations(m, data) == {}
    assert list(choose_migrations(made(), data)) == ["n"]


def test_a_group_normalization_whose_type_onnx_cannot_infer(tmp_path):
    """It is a function there; the walk cuts the graph behind it."""
    text = """g (float[N,3,6,6] x, float[8,3,3,3] w, float[8] gamma, float[8] beta, float[4,8,1,1] v) =>
        (float[N,4,a,b] y) {
        h = Conv(x, w) n = GroupNormalization<num_groups = 2>(h, gamma, beta) r = Relu(n) y = Conv(r, v)
    }"""
    constants = {"w": weights(8, 3, 3, 3), "gamma": weights(8, low=0.5, high=2), "beta": weights(8)}
    made = proto(text, 21, **constants, v=weights(4, 8, 1, 1))
    onnx.save(made, tmp_path / "m.onnx")
    rows = {"x": weights(24, 3, 6, 6, seed=3)}
    result = onnxq.quantize(tmp_path / "m.onnx", rows, checks=onnxq.Checks(time_it=False))
    assert result.verdict.fidelity.sqnr_db["y"] > 25


def test_migrations_that_change_the_outputs_are_put_back(tmp_path, monkeypatch):
    def refuses(*given):
        raise RewriteError("MigrateNorms changed y")

    path, warnings = tmp_path / "net.onnx", []
    graph.save(made(), path)
    fake = SimpleNamespace(apply=refuses, migrations=lambda choices: ())
    monkeypatch.setattr("onnxq.pipeline.migration.passes", fake)
    log = SimpleNamespace(**{name: lambda *given: None for name in ("stage", "step", "advance", "note")})
    log.warn = warnings.append
    found = onnxq.quantize(path, {"x": weights(40, 4, 8)}, checks=onnxq.Checks(verify=False), log=log)
    assert "MigrateNorms changed y" in warnings
    assert not found.prepared.migrations
    assert found.plan.weights
