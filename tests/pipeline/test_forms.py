"""Forms of products by the clock: what is looked at, what is kept, and what the file then holds."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from helpers import model, proto, run, weights

import onnxq
from onnxq import graph
from onnxq.emit import emit
from onnxq.pipeline import forms, reemit
from onnxq.pipeline.fastest import Found
from onnxq.pipeline.forms import Site, blocks, dynamic, fits_blocks, looks, sites
from onnxq.plan import Precision, Range, load_plan, make_plan, place
from onnxq.recipe import Recipe
from onnxq.types import Border, Formed, Interval, LearnedLayer, Silence, Tuned

TEXT = """g (float[n,t,64] x, float[64,64] q, float[64,64] k, float[64] b, float[64,32] v, float[32,64] w)
=> (float[n,t,64] y, float[n,t,64] z) {
    [ql] qs = MatMul(x, q) [qb] qq = Add(qs, b) [kl] kk = MatMul(x, k) [vl] vv = MatMul(x, v)
    [s] s = Sub(qq, kk) [soft] z = Tanh(s) [e] e = Erf(vv) [wl] y = MatMul(e, w)
}"""
SIZES = {"q": (64, 64), "k": (64, 64), "b": (64,), "v": (64, 32), "w": (32, 64)}
CONSTANTS = {name: weights(*shape, seed=index) / 8 for index, (name, shape) in enumerate(SIZES.items())}
ROWS = np.random.default_rng(3).normal(size=(16, 5, 64)).astype(np.float32)
SHARED = ("ql", "kl", "vl")


def planned(text=TEXT, constants=CONSTANTS, **bits):
    m = model(text, **constants)
    placement = place(m)
    ranges = {name: Range(-4.0, 4.0, "seen") for name in placement.tensors}
    return m, make_plan(m, placement, ranges, Precision(**bits))


def operators(m):
    return [node.op_type for node in m.graph]


def sure(value):
    return Interval(value, value * 0.99, value * 1.01)


def test_a_site_is_a_tensor_with_all_the_products_that_read_it():
    m, plan = planned()
    found = sites(m, plan)
    assert [(site.tensor, tuple(site.layers)) for site in found] == [("x", SHARED), ("e", ("wl",))]
    kind = found[0].shapes((1, 5, 64), plan.weights)
    assert kind == ((1, 5, 64), ((64, 64), False, 8), ((64, 64), True, 8), ((64, 32), True, 8))
    fewer = planned(weight_bits=4)[1]
    assert found[0].shapes((2,), fewer.weights) == (
        (2,),
        ((64, 64), False, 8),
        ((64, 64), True, 4),
        ((64, 32), True, 4),
    )


def test_a_tensor_with_other_readers_or_a_border_is_no_site():
    with_gemm = """g (float[n,64] x, float[64,32] v, float[64,32] w, float[32] b) => (float[n,32] y, float[n,32] z) {
        [vl] y = MatMul(x, v) [gl] z = Gemm(x, w, b)
    }"""
    m, plan = planned(with_gemm, {"v": weights(64, 32), "w": weights(64, 32), "b": weights(32)})
    assert set(plan.weights) == {"vl", "gl"}
    assert sites(m, plan) == []
    m, plan = planned()
    border = Border(-1, ((0.1, 0.0, 0.0),) * 64)
    assert [site.tensor for site in sites(m, replace(plan, borders={"x": border}))] == ["e"]
    coarse = {**plan.tensors, "e": replace(plan.tensors["e"], everywhere=True)}
    assert [site.tensor for site in sites(m, replace(plan, tensors=coarse))] == ["x"]


GUARDED = """g (float[n,t,64] x, float[64,64] a, float[64,64] b) => (float[n,t,64] y, float[n,t,64] e) {
    [al] h = MatMul(x, a) [e] e = Erf(h) [bl] z = MatMul(h, b) [t] y = Tanh(z)
}"""
MOVED = """g (float[n,64] x, float[64,64] a, float[64] ab, int64[3] shape, float[64,64] b) => (float[p,4,64] y) {
    [al] h = Gemm(x, a, ab) [r] s = Relu(h) [m] k = Reshape(s, shape) [bl] y = MatMul(k, b)
}"""
SQUARES = {"a": weights(64, 64, seed=1) / 8, "b": weights(64, 64, seed=2) / 8}


@pytest.mark.parametrize(
    ("text", "more"), [(GUARDED, {}), (MOVED, {"ab": weights(64), "shape": np.array([-1, 4, 64])})]
)
def test_what_an_integer_node_makes_keeps_its_fixed_grid(text, more):
    """Its kernel needs the QuantizeLinear behind it."""
    m, plan = planned(text, SQUARES | more)
    assert {"al", "bl"} <= set(plan.weights)
    assert "bl" not in {name for site in sites(m, plan) for name in site.layers}


def test_blocks_take_the_place_of_grid_and_weights():
    m, plan = planned()
    site = sites(m, plan)[0]
    made = blocks(plan, site)
    assert {name: (grid.bits, grid.block) for name, grid in made.blocks.items()} == dict.fromkeys(SHARED, (8, 32))
    assert set(made.weights) == {"wl"}
    assert set(made.tensors) == {"e"}
    assert not set(SHARED) & set(made.integer)
    few = blocks(planned(weight_bits=4, first_last=8)[1], site)
    assert {name: grid.bits for name, grid in few.blocks.items()} == {"ql": 8, "kl": 4, "vl": 4}
    x = {"x": ROWS}
    wanted, got = run(m, x), run(emit(m, made, fused=True), x, optimize="all")
    for name, array in wanted.items():
        assert np.square(got[name] - array).mean() < 1e-3 * np.square(array).mean()
    assert operators(emit(m, made, fused=True)).count("MatMulNBits") == 3


def test_blocks_need_one_block_and_even_steps():
    m, plan = planned()
    x, e = sites(m, plan)
    assert fits_blocks(plan, x)
    assert fits_blocks(plan, e)
    narrow = Site("e", {"wl": replace(e.layers["wl"], weight=np.zeros((31, 64), np.float32))})
    assert not fits_blocks(plan, narrow)
    book = replace(plan.weights["wl"], values=((0.0, 1.0),) * 64)
    assert not fits_blocks(replace(plan, weights={**plan.weights, "wl": book}), e)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, False),
        ({"placement": "measured"}, True),
        ({"max_latency": "0.5x"}, False),
        ({"placement": "measured", "max_drop": "0.01"}, False),
        ({"placement": "measured", "max_size": "0.2x"}, False),
    ],
)
def test_it_looks_where_time_alone_counts(changes, wanted):
    _, plan = planned()
    assert looks(Recipe(**changes), plan) is wanted


def test_it_does_not_look_without_the_operator_or_with_simulated_grids():
    _, plan = planned()
    asked = Recipe(placement="measured")
    assert not looks(asked, replace(plan, target="openvino"))
    assert not looks(asked, planned(activation_bits=4, first_last=4)[1])


class Contest:
    """Decibels lost and time by the set of (tensor, form)."""

    def __init__(self, lost, time):
        self.lost, self.time, self.fixed, self.tried = lost, time, "fixed", []

    def made(self, choices):
        return tuple((site.tensor, form.__name__) for kind, form in choices for site in kind)

    def loss(self, made):
        return self.lost.get(made, 0.0)

    def race(self, made):
        self.tried.append(made)
        return sure(self.time.get(made, 0.8)), sure(0.5), sure(0.4)


A, B = Site("a", {"a1": None, "a2": None}), Site("b", {"b1": None})
BOTH = (("a", "blocks"), ("b", "dynamic"))
ONE, OTHER = ((("b", "dynamic"),), (("a", "dynamic"),))
BLOCKS, DYNAMIC = (("a", "blocks"),), (("a", "dynamic"), ("b", "dynamic"))
WON = [([A], (blocks, dynamic)), ([B], (dynamic,))]


@pytest.mark.parametrize(
    ("lost", "time", "kept", "raced", "refused"),
    [
        ({}, {}, BOTH, [BOTH], ""),
        ({}, {BOTH: 1.0}, BLOCKS, [BOTH, BLOCKS], ""),
        ({BOTH: 0.6, ONE: 0.2}, {}, BLOCKS, [BLOCKS], ""),
        ({BOTH: 0.5}, {}, BOTH, [BOTH], ""),
        ({BOTH: 0.6, BLOCKS: 0.4}, {}, ONE, [ONE], ""),  # blocks of a alone lose more than b's grid of each run
        ({BOTH: 2.0, BLOCKS: 2.0, ONE: 2.0}, {}, DYNAMIC, [DYNAMIC], ""),
        ({BOTH: 2.0, ONE: 1.0}, {BLOCKS: 0.995, DYNAMIC: 1.2}, "fixed", [BLOCKS, DYNAMIC], "no faster together"),
        (dict.fromkeys((BOTH, BLOCKS, DYNAMIC, ONE, OTHER), 4.0), {}, "fixed", [], "faster forms cost 4.0 dB"),
    ],
)
def test_the_first_network_that_is_faster_and_exact_is_kept(lost, time, kept, raced, refused):
    contest = Contest(lost, time)
    made, found = forms._kept(contest, WON, Silence())
    assert made == kept
    assert contest.tried == raced
    assert (found.kinds, found.refused) == (2, refused)
    names = {"a": ("a1", "a2"), "b": ("b1",)}
    held = () if kept == "fixed" else kept
    for form, listed in (("dynamic", found.dynamic), ("blocks", found.blocks)):
        assert listed == tuple(name for tensor, own in held if own == form for name in names[tensor])
    assert (found.after is None) == (kept == "fixed")


def test_a_faster_pair_that_is_slower_on_average_is_not_kept():
    contest = Contest({}, {})
    contest.race = lambda made: (sure(0.8), sure(0.5), sure(0.5))
    assert forms._kept(contest, WON, Silence())[0] == "fixed"


def contest_of(tmp_path, text=TEXT, constants=CONSTANTS, rows=ROWS[:1], layers=None):
    m, plan = planned(text, constants)
    path = tmp_path / "net.onnx"
    onnx.save(proto(text, **constants), path)
    prepared = SimpleNamespace(model=m, path=path)
    return forms._Contest(prepared, Tuned(plan, layers or {}), (None, {"x": rows}), Recipe(threads=2), tmp_path)


@pytest.mark.parametrize(
    ("ms", "wanted"),
    [
        ({"dynamic": 0.5, "blocks": 0.4}, (blocks, dynamic)),
        ({"dynamic": 0.3, "blocks": 0.4}, (dynamic, blocks)),
        ({"dynamic": 1.1, "blocks": 0.4}, (blocks,)),
        ({"dynamic": 1.0, "blocks": 1.0}, ()),
    ],
)
def test_forms_that_beat_the_fixed_grid_come_fastest_first(ms, wanted, tmp_path, monkeypatch):
    def clock(ops, name):
        form = "blocks" if "MatMulNBits" in ops else "dynamic" if "DynamicQuantizeLinear" in ops else ""
        return ms.get(form, 1.0)

    rigged(monkeypatch, clock)
    contest = contest_of(tmp_path)
    x, e = sites(contest._prepared.model, contest.fixed.plan)
    assert list(contest.kinds([x, e]).values()) == [[x], [e]]
    assert contest.faster(x) == contest.faster(e) == wanted


def test_a_kind_runs_with_all_its_rows(tmp_path, monkeypatch):
    """Windows stand on the first axis: it is no batch, and is not cut."""
    text = """g (float[n,64] x, int64[3] shape, float[64,64] q) => (float[2,m,64] y) {
        r = Reshape(x, shape) s = Sin(r) [ql] y = MatMul(s, q)
    }"""
    asked = []
    seen = rigged(monkeypatch, lambda ops, name: 1.0)
    real = forms.bench.measure
    forms.bench.measure = lambda files, **options: asked.append(options["batches"]) or real(files, **options)
    contest = contest_of(tmp_path, text, {"q": CONSTANTS["q"], "shape": np.array([2, -1, 64])}, ROWS[0, :4])
    kinds = contest.kinds(sites(contest._prepared.model, contest.fixed.plan))
    assert [key[0] for key in kinds] == [(2, 2, 64)]
    contest.faster(kinds.popitem()[1][0])
    assert asked == [(2,)]
    assert seen[0][2] == {"s": (2, 2, 64)}


def test_no_winner_no_race():
    contest = Contest({}, {})
    made, found = forms._kept(contest, [([A], ()), ([B], ())], Silence())
    assert (made, contest.tried, found) == ("fixed", [], Formed(2, (), ()))


def test_words():
    assert Formed(3, (), ()).words == "fixed grids are kept (3 kinds timed)"
    assert Formed(1, (), (), None, None, "why").words == "fixed grids are kept (1 kind timed; why)"
    found = Formed(3, ("a", "b"), ("c",), sure(0.5), sure(0.4))
    assert found.words == "2 rounded in every run, 1 in blocks: 0.50x -> 0.40x of float's time"
    assert Formed(3, (), ("c",), sure(0.5), sure(0.4)).words == "1 in blocks: 0.50x -> 0.40x of float's time"


def rigged(monkeypatch, milliseconds):
    """A clock that reads the time off a file; returns what it timed."""
    seen = []

    def measure(files, **options):
        seen.append((len(files), options["threads"], {name: array.shape for name, array in options["feeds"].items()}))
        times = [milliseconds({node.op_type for node in onnx.load(file).graph.node}, Path(file).name) for file in files]
        return [SimpleNamespace(samples_ms=(time,) * 9) for time in times]

    real = forms.bench
    fake = SimpleNamespace(measure=measure, ratio_interval=real.ratio_interval, compare=real.compare)
    monkeypatch.setattr(forms, "bench", fake)
    by_the_rules(monkeypatch)
    return seen


def pipeline_run():
    return sys.modules["onnxq.pipeline.run"]


def by_the_rules(monkeypatch):
    """Placement is somebody else's business."""
    monkeypatch.setattr(pipeline_run(), "measured", lambda prepared, placement, *rest: Found(placement))


def shipped(folder):
    path = folder / "net.onnx"
    onnx.save(proto(TEXT, **CONSTANTS), path)
    return path


def test_a_run_takes_what_is_faster_and_says_so(tmp_path, monkeypatch):
    seen = rigged(monkeypatch, lambda ops, name: 0.5 if "DynamicQuantizeLinear" in ops else 1.0)
    path = shipped(tmp_path)
    found = onnxq.quantize(path, {"x": ROWS}, "fastest", threads=2)
    assert found.plan.dynamic == ("x", "e")
    assert found.verdict.formed.dynamic == (*SHARED, "wl")
    assert found.verdict.formed.kinds == 2
    assert (found.verdict.formed.before.value, found.verdict.formed.after.value) == (1.0, 0.5)
    assert [node.op_type for node in graph.nodes(found.model, "DynamicQuantizeLinear", "QuantizeLinear")] == [
        "DynamicQuantizeLinear"] * 2  # fmt: skip
    assert found.verdict.coverage.share == 1.0
    assert min(found.verdict.fidelity.sqnr_db.values()) > 30
    shapes = [(1, 5, 64), (1, 5, 32), (1, 5, 64)]
    assert [(count, threads, *feeds.values()) for count, threads, feeds in seen] == [
        (3, (2,), shape) for shape in shapes]  # fmt: skip
    plain = onnxq.quantize(path, {"x": ROWS}, "fastest", placement="rules")
    assert plain.plan.dynamic == ()
    assert plain.verdict.formed is None
    assert plain.plan.tensors == found.plan.tensors


def test_an_output_that_is_exact_in_both_says_nothing(tmp_path, monkeypatch):
    """Infinity less infinity is no number, and no number is above the limit."""
    contest = contest_of(tmp_path)
    found = iter([{"y": np.inf, "z": 30.0}, {"y": np.inf, "z": 20.0}])
    monkeypatch.setattr(forms.bench, "compare", lambda *given: SimpleNamespace(sqnr_db=next(found)))
    monkeypatch.setattr(forms, "some_rows", lambda *given: [])
    assert contest.loss(replace(contest.fixed)) == 10.0


def test_a_run_takes_blocks_rounded_with_feedback(tmp_path, monkeypatch):
    rigged(monkeypatch, lambda ops, name: 0.5 if "MatMulNBits" in ops and "MatMulIntegerToFloat" not in ops else 1.0)
    found = onnxq.quantize(shipped(tmp_path), {"x": ROWS}, "fastest", weight_bits=4)
    assert found.verdict.formed.blocks == (*SHARED, "wl")
    assert {name: grid.bits for name, grid in found.plan.blocks.items()} == {"ql": 8, "kl": 4, "vl": 4, "wl": 8}
    assert found.plan.weights == found.plan.tensors == {}
    assert set(found.learned) <= {"kl", "vl"}
    assert operators(found.model).count("MatMulNBits") == 4


def test_other_targets_get_the_bits_that_blocks_have(tmp_path, monkeypatch):
    """Not eight: what another target gets must not depend on this machine's clock."""
    rigged(monkeypatch, lambda ops, name: 0.5 if "MatMulNBits" in ops and "MatMulIntegerToFloat" not in ops else 1.0)
    path = shipped(tmp_path)
    for name, forms_ in (("blocks", "fastest"), ("fixed", "balanced")):
        checks = onnxq.Checks(ranges=True, time_it=name == "blocks")
        onnxq.quantize(path, {"x": ROWS}, forms_, weight_bits=4, migrate_norms=False, checks=checks).save_plan(
            tmp_path / f"{name}.json"
        )
    assert load_plan(tmp_path / "blocks.json").blocks
    for target in ("web", "tensorrt", "cuda"):
        found, wanted = (
            reemit(tmp_path / f"{name}.json", target=target, model=path).plan for name in ("blocks", "fixed")
        )
        assert {name: grid.bits for name, grid in found.weights.items()} == {
            name: grid.bits for name, grid in wanted.weights.items()
        }
        assert found.blocks == wanted.blocks


def test_what_costs_too_much_is_left(tmp_path, monkeypatch):
    rigged(monkeypatch, lambda ops, name: 0.5 if "DynamicQuantizeLinear" in ops else 1.0)
    monkeypatch.setattr(forms, "LOSS_DB", -100.0)
    found = onnxq.quantize(shipped(tmp_path), {"x": ROWS}, "fastest")
    assert found.plan.dynamic == ()
    assert found.verdict.formed.dynamic == ()
    assert found.verdict.formed.refused.startswith("faster forms cost ")


def test_the_contest_runs_the_real_clock(tmp_path, monkeypatch):
    by_the_rules(monkeypatch)
    monkeypatch.setattr(forms, "SECONDS", (0.01, 0.01))
    found = onnxq.quantize(shipped(tmp_path), {"x": ROWS}, "fastest")
    assert found.verdict.formed.kinds == 2
    assert min(found.verdict.fidelity.sqnr_db.values()) > 30


def test_combinations():
    found = forms._combinations([([A], (blocks, dynamic)), ([B], (dynamic, blocks)), ([A, B], ())])
    assert [[form for _, form in part] for part in found] == [[blocks, dynamic], [blocks, blocks], [dynamic, dynamic]]


def test_nothing_is_tried_twice():
    contest = Contest({}, {(("a", "dynamic"),): 1.0})
    forms._kept(contest, [([A], (dynamic,))], Silence())
    assert contest.tried == [(("a", "dynamic"),)]


def test_learned_codes_of_blocks_are_left_behind(tmp_path):
    m, plan = planned()
    codes = {name: LearnedLayer(np.zeros(layer.weight.shape, np.int8)) for name, layer in _layers(m, plan).items()}
    contest = contest_of(tmp_path, layers=codes)
    assert not run(graph.load(contest._file), {"x": ROWS[:1]})["y"].any()  # the fixed side has what was learned
    made = contest.made([(sites(contest._prepared.model, plan)[:1], blocks)])
    assert set(made.layers) == {"wl"}
    assert set(made.plan.blocks) == set(SHARED)


def _layers(m, plan):
    return {name: graph.layer_of(node) for name, node in graph.node_names(m).items() if name in plan.weights}
