"""Measured placement: what is kept, when it looks, and what the file says. Clocks here have their own idea of time."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
from helpers import model, proto, weights

import onnxq
from onnxq.pipeline import fastest as search
from onnxq.pipeline import stopwatch
from onnxq.pipeline.fastest import REASON, Race, fastest
from onnxq.pipeline.prepare import Prepared
from onnxq.plan import place
from onnxq.plan.paying import Prices
from onnxq.recipe import Recipe
from onnxq.types import Interval, Observations, Silence, TensorStats

TEXT = """g (float[n,3,24,24] x, float[8,3,3,3] w1, float[16,8,3,3] w2, float[16,16,3,3] w3, float[16,10] w4)
=> (float[n,10] y) {
    [stem] a = Conv(x, w1) r = Relu(a) [mid] b = Conv(r, w2) s = Relu(b) [last] c = Conv(s, w3) t = Relu(c)
    [pool] p = GlobalAveragePool(t) [flat] f = Flatten(p) [head] y = Gemm(f, w4)
}"""
SIZES = {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 16, 3, 3), "w4": (16, 10)}
LAYERS = ("stem", "mid", "last", "head")
NET = model(TEXT, **{name: weights(*shape) for name, shape in SIZES.items()})
START = place(NET)
FLOAT_MS = {"stem": 3.0, "mid": 3.0, "last": 3.0, "pool": 0.2, "flat": 0.1, "head": 1.0}


@pytest.fixture(autouse=True)
def _quick_races(monkeypatch):
    monkeypatch.setattr(stopwatch, "SECONDS", (0.01, 0.01))


def again(floats):
    return place(NET, keep_float=floats)


def inside(placement):
    return {unit.name for unit in placement.layers}


def sure(value):
    return Interval(value, value * 0.99, value * 1.01)


class Clock:
    """`truth` is the time of a network by its integer layers, 1 in float; `quick` are the prices, one after another."""

    def __init__(self, truth, *quick, spread=0.01):
        self.truth, self.quick, self.spread = truth, list(quick), spread
        self.races, self.looks = [], []

    def race(self, best, newest):
        self.races.append((inside(best), inside(newest)))
        mine, other = self.truth(inside(newest)), self.truth(inside(best))
        return Race(*(Interval(v, v * (1 - self.spread), v * (1 + self.spread)) for v in (mine, mine / other, other)))

    def prices(self, newest):
        self.looks.append(inside(newest))
        return Prices(FLOAT_MS, FLOAT_MS | self.quick.pop(0), {}, {})


def look(clock, **options):
    return fastest(START, again, clock, threads=2, **({"always": False} | options))


SLOW_STEM = {"stem": 9.0, "mid": 1.0, "last": 1.0, "head": 0.3}


def test_a_faster_placement_is_kept_and_said():
    clock = Clock(lambda layers: 1.3 if "stem" in layers else 0.7, SLOW_STEM, SLOW_STEM, SLOW_STEM)
    found = look(clock)
    assert inside(found.placement) == {"mid", "last", "head"}
    assert found.placed.back == found.placed.nodes == ("stem",)
    assert (found.placed.layers, found.placed.threads) == (4, 2)
    assert found.placed.before.value == 1.3
    assert found.placed.after.value == 0.7
    assert found.placed.words == "1 of 4 layers back in float, 1.30x -> 0.70x of float's time"
    assert clock.races[1] == (set(LAYERS), {"mid", "last", "head"})
    assert found.placement.skipped["stem"] == "asked to stay in float"  # `again` of the pipeline says REASON


def test_nothing_is_looked_for_where_the_rules_are_not_slower():
    for value in (0.5, 1.0, 1.009):
        clock = Clock(lambda layers, value=value: value)
        found = look(clock)
        assert found.placement is START
        assert found.placed is None
        assert clock.looks == []
    clock = Clock(lambda layers: 1.02, SLOW_STEM, SLOW_STEM, SLOW_STEM)
    assert look(clock).placed is not None


def test_a_recipe_can_ask_for_a_look_anyway():
    clock = Clock(lambda layers: 0.5 if "stem" in layers else 0.4, SLOW_STEM, SLOW_STEM, SLOW_STEM)
    found = look(clock, always=True)
    assert found.placed.back == ("stem",)
    assert (found.placed.before.value, found.placed.after.value) == (0.5, 0.4)


@pytest.mark.parametrize("gain", [1.2, 1.0, 0.995])
def test_what_is_not_faster_beyond_doubt_is_not_kept(gain):
    clock = Clock(lambda layers: 1.3 * (1 if "stem" in layers else gain), SLOW_STEM, SLOW_STEM, SLOW_STEM)
    found = look(clock)
    assert found.placement is START
    assert found.placed.back == ()
    assert found.placed.after.value == found.placed.before.value == 1.3
    assert found.placed.words.startswith("the rules' placement is kept, 1.30x of float's time (")


def test_what_is_faster_in_pairs_but_not_against_float_is_not_kept():
    clock = Clock(lambda layers: 1.3, SLOW_STEM, SLOW_STEM, SLOW_STEM)
    clock.race = lambda best, newest: Race(sure(1.3), sure(0.9), sure(1.3))
    found = look(clock)
    assert found.placement is START
    assert found.placed.back == ()


def test_prices_are_corrected_and_three_placements_tried_at_most(monkeypatch):
    monkeypatch.setattr(search, "FAVOURS", (1.0,))
    times = {"stem": 0.1, "mid": 0.2, "last": 0.3, "head": 0.0}
    quick = [
        SLOW_STEM,
        SLOW_STEM | {"mid": 9.0},
        SLOW_STEM | {"last": 9.0},
        SLOW_STEM | {"head": 9.0},
    ]
    clock = Clock(lambda layers: 1.1 + sum(times[name] for name in layers), *quick)
    found = look(clock)
    assert clock.looks == [set(LAYERS), {"mid", "last", "head"}, {"last", "head"}]
    tried = [set(LAYERS), *clock.looks[1:], {"mid", "head"}]
    assert clock.races == [
        (set(LAYERS), tried[0]), (set(LAYERS), tried[1]), (tried[1], tried[2]), (set(LAYERS), tried[2]),
        (tried[2], tried[3]), (set(LAYERS), tried[3]),
    ]  # fmt: skip
    assert found.placed.rounds == 3
    assert inside(found.placement) == {"mid", "head"}
    assert found.placed.before.value == pytest.approx(1.7)
    assert found.placed.back == ("stem", "last")
    assert found.placed.nodes == ("stem", "last", "pool", "flat")
    assert found.placed.after.value == pytest.approx(1.3)


def test_a_placement_is_not_tried_twice_and_one_without_integers_not_at_all(monkeypatch):
    monkeypatch.setattr(search, "FAVOURS", (1.0,))
    clock = Clock(lambda layers: 1.3, SLOW_STEM, SLOW_STEM)
    assert look(clock).placed.rounds == 1
    all_slow = dict.fromkeys(LAYERS, 50.0)
    found = look(Clock(lambda layers: 1.3, all_slow))
    assert found.placement is START
    assert found.placed.rounds == 0


def test_where_nothing_seems_to_pay_a_milder_view_is_taken():
    clock = Clock(lambda layers: 1.3 if "last" in layers else 0.9, *[dict.fromkeys(LAYERS, 3.3) | {"last": 9.0}] * 3)
    found = look(clock)
    assert inside(found.placement) == {"stem", "mid"}


def shipped(folder):
    path = folder / "net.onnx"
    onnx.save(proto(TEXT, **{name: weights(*shape) for name, shape in SIZES.items()}), path)
    return path


def test_the_run_places_by_the_clock_and_records_it(tmp_path, monkeypatch):
    races = []

    class Rigged(stopwatch.Stopwatch):
        def race(self, best, newest):
            races.append(newest)
            values = [1.3 if "stem" in inside(place) else 0.7 for place in (newest, best)]
            return Race(sure(values[0]), sure(values[0] / values[1]), sure(values[1]))

        def prices(self, newest):
            found = super().prices(newest)
            return dataclasses.replace(found, quick=dict.fromkeys(found.quick, 0.0) | {"stem": 1e3})

    monkeypatch.setattr(stopwatch, "Stopwatch", Rigged)
    rows = {"x": np.random.default_rng(1).normal(size=(24, 3, 24, 24)).astype(np.float32)}
    path = shipped(tmp_path)
    found = onnxq.quantize(path, rows)
    assert found.verdict.placed.back == ("stem",)
    assert found.plan.skipped["stem"] == REASON
    assert "stem" not in found.plan.weights
    assert json.loads(found.model.metadata_props["onnxq.back_in_float"]) == ["stem"]
    assert found.verdict.coverage.floats[0].reason == REASON
    assert found.verdict.fidelity.sqnr_db["y"] > 25
    raced = len(races)
    again = onnxq.quantize(path, rows, "fastest", checks=onnxq.Checks(time_it=False), keep_float=("stem",))
    assert again.plan.tensors == found.plan.tensors
    assert again.plan.weights == found.plan.weights
    assert len(races) == raced


@pytest.mark.parametrize(
    "changes",
    [{"placement": "rules"}, {"activation_bits": 6}, {"first_last": 4}, {"residual_bits": 4}, {"attention": "8"},
     {"reconstruction": "aquant"}],
)  # fmt: skip
def test_nothing_is_timed_where_a_recipe_wants_the_rules_or_grids_without_kernels(changes):
    settings = Recipe(**{"placement": "measured"} | changes)
    nothing = Prepared(None, NET, NET, (), None)
    found = stopwatch.measured(nothing, START, observed(START.tensors), None, settings, Silence())
    assert found.placement is START
    assert found.placed is None


@pytest.mark.parametrize(
    ("changes", "looks"),
    [({}, False), ({"placement": "measured"}, True), ({"max_latency": "0.9x"}, True), ({"max_size": "0.9x"}, False)],
)
def test_a_latency_budget_and_the_preset_look_anyway(changes, looks, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stopwatch, "fastest", lambda *_, **options: asked.append(options))
    prepared = Prepared(shipped(tmp_path), NET, NET, (), None)
    rows = [{"x": weights(2, 3, 24, 24)}]
    stopwatch.measured(prepared, START, observed(START.tensors), rows, Recipe(threads=2, **changes), Silence())
    assert [(options["always"], options["threads"]) for options in asked] == [(looks, 2)]


def test_a_run_whose_best_is_slower_than_float_says_so(tmp_path, monkeypatch):
    class Rigged(stopwatch.Stopwatch):
        def race(self, best, newest):
            return Race(sure(1.3), sure(1.0), sure(1.3))

    from onnxq.pipeline import verify

    slow = Interval(1.3, 1.2, 1.4)
    monkeypatch.setattr(stopwatch, "Stopwatch", Rigged)
    timed = verify._latency
    monkeypatch.setattr(
        verify, "_latency", lambda *given: (timed(*given)[0], dataclasses.replace(timed(*given)[1], ratio=slow))
    )
    rows = {"x": np.random.default_rng(1).normal(size=(24, 3, 24, 24)).astype(np.float32)}
    found = onnxq.quantize(shipped(tmp_path), rows, threads=2)
    assert any("net.onnx is the fastest file here" in warning for warning in found.verdict.warnings)
    assert [latency.threads for latency in found.verdict.latency] == [2, 2]


def observed(names):
    made = {name: TensorStats(name, -4.0, 4.0, -3.0, 3.0, np.ones(4), 4.0, 4, True, (1,)) for name in names}
    return Observations(made, {}, 1, 1)


def watch(tmp_path):
    prepared = Prepared(shipped(tmp_path), NET, NET, (), None)
    feeds = {"x": weights(1, 3, 24, 24)}
    return stopwatch.Stopwatch(prepared, observed(START.tensors), feeds, Recipe(), tmp_path)


def test_the_clock_prices_every_unit_and_every_tensor(tmp_path):
    found = watch(tmp_path).prices(START)
    assert set(found.slow) == {"stem", "mid", "last", "pool", "flat", "head"}
    assert set(found.quick) == set(found.slow)
    assert all(found.slow[name] > 0 and found.quick[name] > 0 for name in LAYERS)
    assert set(found.enter) == set(found.leave) == set(START.tensors)
    assert all(time > 0 for time in (*found.enter.values(), *found.leave.values()))


def test_the_clock_corrects_what_it_saw_in_another_network(tmp_path, monkeypatch):
    clock = watch(tmp_path)
    first = clock.prices(START)
    ran = []
    monkeypatch.setattr(stopwatch.bench, "profiles", lambda models, *given, **options: ran.append(models) or [
        {"stem_nchwc": stopwatch.bench.Kernel("Conv", 2 * clock._float_ms)},
        {
            "stem_nchwc": stopwatch.bench.Kernel("Conv", 8.0), "r_q": stopwatch.bench.Kernel("QuantizeLinear", 2e3),
            "mid_token_4": stopwatch.bench.Kernel("QLinearConv", 6.0),
        },
    ])  # fmt: skip
    second = clock.prices(again(["stem"]))
    assert second.slow["stem"] == pytest.approx(4.0)  # the machine was half as fast
    assert second.quick["mid"] == pytest.approx(3.0)
    assert second.quick["stem"] == first.quick["stem"]
    assert second.slow["mid"] == first.slow["mid"]
    assert second.enter["r"] == pytest.approx(first.enter["r"] * 8)  # as much as is believed
    assert second.leave["s"] == pytest.approx(first.leave["s"] * 8)


def test_the_clock_races_files_that_run_in_turns(tmp_path):
    clock = watch(tmp_path)
    found = clock.race(START, START)
    assert found.to_best.low == found.to_best.high == 1.0
    assert found.to_float.low <= found.to_float.value <= found.to_float.high
    assert found.to_float == found.best_to_float
    other = clock.race(START, again(["stem"]))
    assert other.to_best.value != 1.0
    assert other.to_float != other.best_to_float
    assert len(list(tmp_path.glob("[0-9].onnx"))) == 2


@pytest.mark.parametrize(
    ("spans", "same", "races"),
    [
        ({"float": (1.1, 1.2), "best": (0.9, 1.1)}, False, 2),
        ({"float": (0.9, 1.1), "best": (0.8, 0.9)}, False, 1),
        ({"float": (0.9, 1.1), "best": (1.0, 1.0)}, True, 2),
        ({"float": (1.1, 1.2), "best": (1.0, 1.0)}, True, 1),
        ({"float": (0.99, 1.02), "best": (1.0, 1.0)}, True, 1),
    ],
)
def test_a_race_in_doubt_is_run_again_for_longer(spans, same, races, tmp_path, monkeypatch):
    clock = watch(tmp_path)
    asked = []
    result = Race(*(Interval(sum(span) / 2, *span) for span in (spans["float"], spans["best"], (1.0, 2.0))))
    monkeypatch.setattr(stopwatch, "SECONDS", (1.0, 5.0))
    monkeypatch.setattr(clock, "_raced", lambda files, seconds: asked.append((len(files), seconds)) or result)
    assert clock.race(START, START if same else again(["stem"])) is result
    assert asked == [(2 if same else 3, 1.0), (2 if same else 3, 5.0)][:races]


def test_a_layer_that_only_one_profile_shows_has_no_say():
    found = stopwatch._first(START, {"stem": 1.0, "mid": 2.0}, {"mid": 1.0, "last": 3.0}, {}, {})
    assert found.slow["stem"] == found.quick["stem"] == 1.0
    assert found.slow["last"] == found.quick["last"] == 3.0
    assert (found.slow["mid"], found.quick["mid"]) == (2.0, 1.0)
    assert (found.slow["pool"], found.quick["pool"]) == (0.0, 0.0)
