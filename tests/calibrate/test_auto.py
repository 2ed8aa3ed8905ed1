from importlib import import_module

import numpy as np
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.calibrate import RULES, choose, observe
from onnxq.calibrate.auto import CLEARLY, DEFAULT, OTHERS
from onnxq.grid import Grid, fake_quantize
from onnxq.runtime import Session, SessionConfig

MODULE = import_module("onnxq.calibrate.auto")
EIGHT, FOUR = (Grid(bits, signed=False, symmetric=False) for bits in (8, 4))
ONE = SessionConfig(threads=1)
LINEAR = "g (float[N,64] x, float[64,16] w) => (float[N,16] y) { y = MatMul(x, w) }"
SEEN = 480
"""Rows behind a histogram: 1 of their 30,720 values is less than what the percentile rule cuts off."""


def layers_by_tensor(made):
    found = {}
    for node in graph.nodes(made, *graph.LAYER_OPS):
        layer = graph.layer_of(node)
        found.setdefault(graph.name_of(layer.data), []).append(layer)
    return found


def chosen(made, data, grid=EIGHT, rows=None, readers=None, **options):
    """What `choose` picks, and the statistics it picks from."""
    readers = layers_by_tensor(made) if readers is None else readers
    seen = observe(made, data, list(readers) or ["x"], config=ONE)
    grids = dict.fromkeys(seen.tensors, grid)
    return choose(made, seen, readers, data if rows is None else rows, grids, config=ONE, **options), seen


def rounded(x, ends, grid):
    return fake_quantize(x, *grid.from_range(*ends), grid)


def relative(found, wanted):
    return float(np.square(found - wanted, dtype=np.float64).sum() / np.square(wanted, dtype=np.float64).sum())


def brute_force(stats, grid, output_error):
    """The rule with the least error, unless the default comes near it, and all errors."""
    errors = {rule: output_error(RULES[rule](stats, grid)) for rule in (DEFAULT, *OTHERS)}
    winner = min(errors, key=errors.__getitem__)
    return (winner if errors[winner] < CLEARLY * errors[DEFAULT] else DEFAULT), errors


def with_outlier(value, rows=SEEN, at=(0, 0), shape=(64,)):
    x = weights(rows, *shape, seed=4)
    x[at] = value
    return x


@pytest.mark.parametrize(
    ("outlier", "weight", "grid", "wanted"),
    [
        (300.0, 0.0, EIGHT, "percentile"),  # huge, but the layer ignores the channel
        (300.0, 1.0, EIGHT, "mse"),  # huge, and the layer relies on it
        (60.0, 0.0, FOUR, "mse"),  # the default clips already
        (12.0, 300.0, FOUR, "minmax"),  # the default clips what the layer relies on
    ],
)
def test_the_layer_decides_whether_a_huge_channel_is_clipped(outlier, weight, grid, wanted):
    w = weights(64, 16)
    w[0] = weight
    made, x = model(LINEAR, w=w), with_outlier(outlier)
    x[::40, 0] += outlier / 2 if weight > 1 else 0
    found, seen = chosen(made, [{"x": x}], grid)
    stats = seen.tensors["x"]
    winner, errors = brute_force(stats, grid, lambda ends: relative(rounded(x, ends, grid) @ w, x @ w))
    assert winner == wanted
    assert found == {"x": (*RULES[wanted](stats, grid), wanted)}
    assert errors[wanted] == min(errors.values()) or wanted == DEFAULT
    if wanted == "percentile":
        assert errors["percentile"] < 0.01 * errors["mse"]
        assert found["x"][1] < 6


def test_what_the_network_normalises_away_is_clipped():
    """By the layer's own output the huge token would have to be kept; the model's outputs do without it."""
    text = """g (float[N,64] x, float[64,16] w, float[16] one) => (float[N,16] y) {
        h = MatMul(x, w)
        y = LayerNormalization(h, one)
    }"""
    w, x = weights(64, 16), with_outlier(2000.0)
    made = model(text, w=w, one=np.ones(16, np.float32))

    def layer_error(ends):
        return relative(rounded(x, ends, EIGHT) @ w, x @ w)

    def model_error(ends):
        return relative(run(made, {"x": rounded(x, ends, EIGHT)})["y"], run(made, {"x": x})["y"])

    found, seen = chosen(made, [{"x": x}])
    assert brute_force(seen.tensors["x"], EIGHT, layer_error)[0] == "mse"
    assert brute_force(seen.tensors["x"], EIGHT, model_error)[0] == "percentile"
    assert found["x"][2] == "percentile"


CONV = "g (float[N,4,8,8] x, float[{o},{i},3,3] w, float[{o}] b) => (float[N,{o},6,6] y) {{ y = Conv{a}(x, w, b) }}"


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        (LINEAR, {"w": (64, 16)}),
        ("g (float[N,64] x, float[16,64] w, float[16] b) => (float[N,16] y) { y = Gemm<transB = 1>(x, w, b) }",
         {"w": (16, 64), "b": (16,)}),
        ("g (float[N,64] x, float[64,16] w, float[16] b) => (float[N,16] y) { m = MatMul(x, w)  y = Add(b, m) }",
         {"w": (64, 16), "b": (16,)}),
        (CONV.format(o=5, i=4, a=""), {"w": (5, 4, 3, 3), "b": (5,)}),
        (CONV.format(o=6, i=2, a="<group = 2>"), {"w": (6, 2, 3, 3), "b": (6,)}),
    ],
    ids=["MatMul", "Gemm", "MatMul and Add", "Conv", "grouped Conv"],
)  # fmt: skip
@pytest.mark.parametrize("outlier", [300.0, 9.0])
@pytest.mark.parametrize("grid", [EIGHT, FOUR], ids=["8", "4"])
def test_every_kind_of_layer(text, constants, outlier, grid):
    made = model(text, **{name: weights(*shape, seed=3) for name, shape in constants.items()})
    shape = (64,) if "64] x" in text else (4, 8, 8)
    x = with_outlier(outlier, rows=30_720 // int(np.prod(shape)), at=(7, *(0 for _ in shape)), shape=shape)

    def output_error(ends):
        return relative(run(made, {"x": rounded(x, ends, grid)})["y"], run(made, {"x": x})["y"])

    found, seen = chosen(made, [{"x": x}], grid)
    winner, _ = brute_force(seen.tensors["x"], grid, output_error)
    assert found["x"] == (*RULES[winner](seen.tensors["x"], grid), winner)


@pytest.mark.parametrize("factor", [1.0, 1e-3])
@pytest.mark.parametrize(("relied_upon", "wanted"), [(0.0, "percentile"), (1.0, "mse")])
def test_several_layers_and_outputs_count_alike(relied_upon, wanted, factor):
    text = """g (float[N,64] x, float[64,16] w, float[64,2] v) => (float[N,16] y, float[N,2] z) {
        y = MatMul(x, w)
        z = MatMul(x, v)
    }"""
    w, v, x = weights(64, 16), weights(64, 2, seed=1), with_outlier(300.0)
    w[0], v[0] = 0.0, relied_upon
    v *= factor  # that an output is small does not make it less important
    found, seen = chosen(model(text, w=w, v=v), [{"x": x}])
    winner, _ = brute_force(
        seen.tensors["x"],
        EIGHT,
        lambda ends: sum(relative(rounded(x, ends, EIGHT) @ each, x @ each) for each in (w, v)),
    )
    assert found["x"][2] == winner == wanted


def test_only_layers_read_the_rounded_tensor():
    text = """g (float[N,64] x, float[64,64] w) => (float[N,64] y) {
        r = Relu(x)
        m = MatMul(r, w)
        y = Add(m, r)
    }"""
    w = weights(64, 64)
    w[0] = 0.0  # what is huge reaches the output through the sum alone
    made, x = model(text, w=w), with_outlier(300.0)
    r = np.maximum(x, 0)
    found, seen = chosen(made, [{"x": x}])
    winner, _ = brute_force(seen.tensors["r"], EIGHT, lambda ends: relative(rounded(r, ends, EIGHT) @ w + r, r @ w + r))
    assert found["r"][2] == winner == "percentile"
    through_both = brute_force(
        seen.tensors["r"],
        EIGHT,
        lambda ends: relative(rounded(r, ends, EIGHT) @ w + rounded(r, ends, EIGHT), r @ w + r),
    )
    assert through_both[0] == "mse"


def test_tensors_are_judged_one_at_a_time():
    text = """g (float[N,64] x, float[64,64] w, float[64,16] v) => (float[N,16] y) {
        h = MatMul(x, w)
        y = MatMul(h, v)
    }"""
    w, v = weights(64, 64), weights(64, 16, seed=2)
    w[0] = v[5] = 0.0
    w[:, 5] *= 0.01
    w[1, 5] = 400.0
    x = np.clip(with_outlier(300.0), -4, 300)
    x[:, 1] = np.where(np.arange(SEEN) == 3, 1.0, 0.0)
    made = model(text, w=w, v=v)
    found, seen = chosen(made, [{"x": x}])
    h = x @ w
    wanted = {
        "x": brute_force(seen.tensors["x"], EIGHT, lambda ends: relative(rounded(x, ends, EIGHT) @ w @ v, h @ v))[0],
        "h": brute_force(seen.tensors["h"], EIGHT, lambda ends: relative(rounded(h, ends, EIGHT) @ v, h @ v))[0],
    }
    assert {name: rule for name, (_, _, rule) in found.items()} == wanted == {"x": "percentile", "h": "percentile"}


@pytest.mark.parametrize(("scale", "rows"), [(0.0, None), (1.0, [])], ids=["a tie", "no rows"])
def test_the_default_where_trials_tell_nothing(scale, rows):
    found, seen = chosen(model(LINEAR, w=scale * weights(64, 16)), [{"x": with_outlier(300.0)}], rows=rows)
    assert found["x"] == (*RULES["mse"](seen.tensors["x"], EIGHT), "mse")


def test_a_small_gain_keeps_the_default(monkeypatch):
    w, x = weights(64, 16), with_outlier(5.2)
    w[0] = 0.0
    made = model(LINEAR, w=w)
    found, seen = chosen(made, [{"x": x}])
    _, errors = brute_force(seen.tensors["x"], EIGHT, lambda ends: relative(rounded(x, ends, EIGHT) @ w, x @ w))
    share = errors["percentile"] / errors["mse"]
    assert CLEARLY < share < 0.95
    assert found["x"][2] == "mse"
    for limit, rule in ((share * 1.02, "percentile"), (share * 0.98, "mse")):
        monkeypatch.setattr(MODULE, "CLEARLY", limit)
        assert chosen(made, [{"x": x}])[0]["x"][2] == rule


def test_tensors_without_layers_get_the_default_and_nothing_runs(monkeypatch):
    monkeypatch.setattr(MODULE, "Session", None)
    made = model("g (float[N,64] x) => (float[N,64] y) { y = Relu(x) }")
    done = []
    found, seen = chosen(made, [{"x": with_outlier(300.0)}], readers={}, progress=done.append)
    assert found == {"x": (*RULES["mse"](seen.tensors["x"], EIGHT), "mse")}
    assert not done


def test_equal_ranges_are_not_tried(monkeypatch):
    monkeypatch.setattr(MODULE, "Session", None)
    x = np.random.default_rng(0).uniform(-1, 1, (SEEN, 64)).astype(np.float32)
    found, _ = chosen(model(LINEAR, w=weights(64, 16)), [{"x": x}])
    assert found["x"][2] == "mse"


def test_a_model_with_fixed_rows():
    w = weights(64, 16)
    w[0] = 0.0
    made = model(LINEAR.replace("N", "8"), w=w)
    x = with_outlier(300.0)
    data = [{"x": part} for part in np.split(x, SEEN // 8)]
    done = []
    found, seen = chosen(made, data, rows=data[:3], progress=done.append)
    assert (seen.rows, seen.batch_rows) == (SEEN, 8)
    assert found["x"][2] == "percentile"
    assert done == [1, 2, 3]


def test_no_more_rows_are_run_than_the_budget_allows(monkeypatch):
    fed = []

    class Spy(Session):
        def run(self, feeds, outputs=None):
            fed.append(feeds["x"])
            return super().run(feeds, outputs)

    monkeypatch.setattr(MODULE, "Session", Spy)
    made, x = model(LINEAR, w=weights(64, 16)), with_outlier(300.0)
    data = [{"x": part} for part in np.split(x, SEEN // 4)]
    monkeypatch.setattr(MODULE, "RUNS", 10**9)
    fed.clear()
    chosen(made, data)
    candidates = len(fed) // len(data) - 1
    assert candidates > 1
    for budget, batches in ((candidates * 4 * 5, 5), (candidates * 4 * 5 - 1, 4), (1, 1), (10**9, SEEN // 4)):
        monkeypatch.setattr(MODULE, "RUNS", budget)
        fed.clear()
        chosen(made, data)
        assert len(fed) == batches * (1 + candidates)
        if batches == 5:  # spread over all rows
            wanted = [x[at * 4 : at * 4 + 4] for at in (0, 30, 60, 89, 119)]
            np.testing.assert_array_equal(np.stack(fed[:: 1 + candidates]), np.stack(wanted))


@pytest.mark.parametrize(
    ("outputs", "tail"),
    [
        ("int64[N,1] c", "c = ArgMax<axis = 1>(y)"),  # no float output
        ("float[N,16] z", "k = Sub(y, y)  z = Div(k, k)"),  # nothing finite in it
        ("float[N,M] z", "k = Cast<to = 9>(y)  i = NonZero(k)  z = Cast<to = 1>(i)"),  # its size depends on the values
        ("float[N,16] z", "k = Sub(y, y)  z = Exp(k)"),  # always the same
    ],
)
def test_outputs_that_tell_nothing_leave_the_default(outputs, tail):
    w = weights(64, 16)
    w[0] = 0.0
    if "NonZero" in tail:
        tail = tail.replace("Cast<to = 9>(y)", "Cast<to = 9>(f)")
        tail = f"r = Relu(y)  f = Floor(r)  {tail}"
    made = model(f"g (float[N,64] x, float[64,16] w) => ({outputs}) {{ y = MatMul(x, w)  {tail} }}", w=w)
    with np.errstate(all="raise"):
        assert chosen(made, [{"x": with_outlier(300.0)}])[0]["x"][2] == "mse"


def test_outputs_that_tell_nothing_do_not_hide_others():
    w = weights(64, 16)
    w[0] = 0.0
    text = """g (float[N,64] x, float[64,16] w) => (int64[N,1] c, float[N,16] q, float[N,16] y) {
        y = MatMul(x, w)
        q = Sqrt(y)
        c = ArgMax<axis = 1>(y)
    }"""
    assert chosen(model(text, w=w), [{"x": with_outlier(300.0)}])[0]["x"][2] == "percentile"
