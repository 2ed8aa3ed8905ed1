"""Sensitivities against the whole network, and what is chosen by them."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import TargetNotMet, UsageError
from onnxq.grid import Grid, fake_quantize
from onnxq.pipeline import allocate as allocating
from onnxq.pipeline import mixed, sensitivity
from onnxq.pipeline.calibrated import Calibrated
from onnxq.plan import Block, Precision, Range, place
from onnxq.plan.budgets import read_wishes
from onnxq.plan.program import Infeasible, front
from onnxq.runtime import Session
from onnxq.tune import Job, TuneMoments
from onnxq.tune.sensitivity import output_error
from onnxq.types import LearnedLayer, Tuned
from onnxq.types.mixed import BASE, FLOAT, Added, Budget

TEXT = """g (float[n,4,12,12] x, float[6,4,3,3] w, float[6] e, float[6,6,3,3] u, float[6] f, float[6,6,1,1] v,
float[8,6,3,3] s, float[8] p, float[8,5] t, float[5] q) => (float[n,5] y) {
    [a] h = Conv<pads = [1, 1, 1, 1]>(x, w, e) i = Relu(h)
    [b] j = Conv<pads = [1, 1, 1, 1]>(i, u, f) [c] k = Conv(i, v) l = Add(j, k) m = Relu(l)
    [d] o = Conv<strides = [2, 1]>(m, s, p) r = Relu(o)
    z = GlobalAveragePool(r) flat = Flatten(z) [g] y = Gemm(flat, t, q)
}"""
OPTIONS = ((4, 8), (2, 8), (4, 4), FLOAT)


def network():
    sizes = {"w": (6, 4, 3, 3), "u": (6, 6, 3, 3), "v": (6, 6, 1, 1), "s": (8, 6, 3, 3)}
    constants = {name: weights(*shape, seed=2) / 3 for name, shape in sizes.items()}
    return model(TEXT, **constants, e=weights(6), f=weights(6, seed=1), p=weights(8), t=weights(8, 5), q=weights(5) / 9)


def rows(count=4, seed=0):
    return [{"x": weights(4, 4, 12, 12, seed=10 * seed + index)} for index in range(count)]


def calibrated(net=None, **changes):
    net = net or network()
    placement = place(net)
    inner = [name for name in placement.tensors if name != "x"]
    seen = rows(1)[0] | run(graph.with_outputs(net, inner), rows(1)[0])
    ends = {name: (float(seen[name].min()), float(seen[name].max())) for name in placement.tensors}
    ranges = {
        8: {name: Range(low, high, "seen") for name, (low, high) in ends.items()},
        4: {name: Range(0.8 * low, 0.8 * high, "seen") for name, (low, high) in ends.items()},
    }
    return Calibrated(net, placement, ranges, Precision(**changes))


@pytest.fixture(scope="module")
def found():
    return calibrated()


@pytest.fixture(scope="module")
def known(found):
    return sensitivity.sensitivities(found, OPTIONS, rows(), workers=1)


@pytest.fixture(scope="module")
def floats(found):
    session = Session(found.model)
    return [session.run(feeds) for feeds in rows()]


@pytest.fixture(scope="module")
def bases(found):
    session = Session(emit(found.model, found.base))
    return [session.run(feeds) for feeds in rows()]


def test_the_base_is_eight_bits_whatever_the_precision_says():
    found = calibrated(weight_bits=3, activation_bits=4, first_last=2, layers={"a": (2, 4)})
    assert {grid.bits for grid in found.base.weights.values()} == {8}
    assert {grid.bits for grid in found.base.tensors.values()} == {8}
    assert found.groups == {"a": ("a",), "b": ("b", "c"), "d": ("d",), "g": ("g",)}


def test_ranges_follow_the_bits_of_the_tensor(found):
    plan = found.plan({"b": (4, 4), "c": (2, 4), "d": (4, 8)})
    assert {name: grid.bits for name, grid in plan.weights.items()} == {"a": 8, "b": 4, "c": 2, "d": 4, "g": 8}
    assert plan.tensors["i"].bits == 4
    whole = found.base.tensors["i"]
    assert plan.tensors["i"].scale == pytest.approx(whole.scale * 255 / 15 * 0.8, rel=1e-3)
    assert plan.tensors["m"] == found.base.tensors["m"]


def test_plans_refuse_what_they_cannot_hold(found):
    with pytest.raises(UsageError, match="activations of 3 bits"):
        found.plan({"a": (8, 3)})
    with pytest.raises(UsageError, match="a placement can"):
        found.plan({"a": FLOAT})


def test_errors_are_those_of_the_whole_network(found, floats, bases):
    """Only the rear part runs; untuned, it must give what the whole emitted network gives."""
    measured = sensitivity.sensitivities(found, OPTIONS, rows(), tuned=False, workers=1)
    assert measured.rows == 16
    assert measured.base == pytest.approx(output_error(emit(found.model, found.base), rows(), floats), rel=1e-3)
    assert measured.base > 0
    for group, layers in found.groups.items():
        for bits in OPTIONS[:3]:
            whole = emit(found.model, found.plan(dict.fromkeys(layers, bits)))
            expected = output_error(whole, rows(), bases)
            got = measured.added[group][bits].output
            assert got == pytest.approx(expected, rel=0.05, abs=2e-6), (group, bits)


def test_a_group_is_tuned_before_it_is_measured(found, known, floats, bases):
    every = tuple(range(4))
    for group, bits in (("a", (2, 8)), ("b", (2, 8)), ("d", (4, 4))):
        layers = found.groups[group]
        block = Block("whole", ("x",), ("y",), (), layers, 0)
        job = Job(block, found.model, rows(), rows(), floats, every, every)
        tuned = TuneMoments()(job, Tuned(found.plan(dict.fromkeys(layers, bits))))
        expected = output_error(emit(found.model, tuned.plan, learned=tuned.layers), rows(), bases)
        assert known.added[group][bits].output == pytest.approx(expected, rel=0.05)


def test_the_error_of_the_block_is_that_of_its_outputs(found):
    """Of the group that ends the network it is the noise of the network's output."""
    measured = sensitivity.sensitivities(found, [(2, 8)], rows(), tuned=False, workers=1)
    floats, whole = Session(found.model), Session(emit(found.model, found.plan({"g": (2, 8)})))
    wanted, got = (np.concatenate([session.run(feeds)["y"] for feeds in rows()]) for session in (floats, whole))
    noise = np.square(got - wanted).sum() / np.square(wanted).sum()
    assert measured.added["g"][(2, 8)].block == pytest.approx(noise, rel=0.02)
    assert 0 < measured.added["g"][BASE].block < measured.added["g"][(2, 8)].block


def test_eight_bits_and_float_add_nothing(known):
    for errors in known.added.values():
        assert errors[BASE].output == errors[FLOAT].output == 0.0
        assert errors[(2, 8)].output > errors[(4, 8)].output


def test_the_number_of_workers_changes_nothing(found, known):
    many = sensitivity.sensitivities(found, [(2, 8)], rows(), workers=2)
    assert many.base == known.base
    for group, errors in many.added.items():
        assert errors == {bits: known.added[group][bits] for bits in (BASE, (2, 8))}


def test_results_are_kept(found, known, tmp_path, monkeypatch):
    options = OPTIONS[:2]
    first = sensitivity.sensitivities(found, options, rows(), workers=1, cache=tmp_path / "kept")
    assert {group: errors[(2, 8)] for group, errors in first.added.items()} == {
        group: errors[(2, 8)] for group, errors in known.added.items()
    }
    asked = []
    monkeypatch.setattr(sensitivity, "measure", lambda trial, folder: asked.append(trial.group) or {})
    assert sensitivity.sensitivities(found, options, rows(), workers=1, cache=tmp_path / "kept") == first
    assert not asked
    for other in ({"batches": rows(seed=1)}, {"batches": rows(), "tuned": False}):
        with pytest.raises(KeyError):
            sensitivity.sensitivities(found, options, workers=1, cache=tmp_path / "kept", **other)
    assert asked


def test_damaged_results_are_measured_again(found, known, tmp_path):
    sensitivity.sensitivities(found, [(2, 8)], rows(), workers=1, cache=tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("{")
    again = sensitivity.sensitivities(found, [(2, 8)], rows(), workers=1, cache=tmp_path)
    assert again.added["b"][(2, 8)] == known.added["b"][(2, 8)]


def test_an_unknown_backend_is_refused(found):
    with pytest.raises(UsageError, match="--backend takes local, dask://host:port or ray://host:port, not 'ray'"):
        sensitivity.sensitivities(found, OPTIONS, rows(), backend="ray")


def test_points_are_measured_again(found, known, bases):
    points = front(allocating.errors_of(known), allocating.sizes(found, known), points=5)
    measured = sensitivity.remeasured(found, known, points, rows())
    assert [point.bits for point in measured] == [point.bits for point in points]
    choice = allocating.Choice(found, found.by_layer(points[-1].bits))
    expected = output_error(allocating.built(choice, rows()), rows(), bases)
    assert measured[-1].measured == pytest.approx(expected)
    assert measured[-1].measured > measured[0].measured
    assert sensitivity.additivity(measured) > 0.5
    assert np.isnan(sensitivity.additivity(measured[:2]))


def test_the_allocation_meets_the_wishes(found, known):
    sizes = allocating.sizes(found, known)
    least = {group: min(entries, key=lambda bits: entries[bits]) for group, entries in sizes.layers.items()}
    whole = dict.fromkeys(found.groups, BASE)
    half = (sizes.total(whole) + sizes.total(least)) / 2
    wishes = read_wishes(max_size=f"{half:.0f}", avg_bits=5)
    budgets = allocating.budgets_of(found, known, wishes, float_bytes=1)
    assert [budget.costs.name for budget in budgets] == ["size", "average weight bits"]
    choice = allocating.allocate(found, known, budgets)
    assert set(choice.bits) == {"a", "b", "c", "d", "g"}
    assert choice.bits["b"] == choice.bits["c"]
    assert choice.allocation.costs["size"] <= half
    assert choice.allocation.costs["average weight bits"] <= 5
    assert {name: grid.bits for name, grid in choice.plan.weights.items()} == {n: b[0] for n, b in choice.bits.items()}
    share = allocating.budgets_of(found, known, read_wishes(max_size="0.25x"), float_bytes=8000)
    assert share[0].limit == 2000
    with pytest.raises(Infeasible, match="size cannot be 10 bytes"):
        allocating.allocate(found, known, [Budget(sizes, 10)])


def test_layers_in_float_are_taken_out_of_the_placement(found, known):
    costs = allocating.average_bits(found.placement, [*OPTIONS, BASE])
    cheap = replace(costs, layers={**costs.layers, "d": {**costs.layers["d"], FLOAT: 0.0}}).grouped(found.groups)
    errors = {group: dict.fromkeys(entries, 0.1) for group, entries in known.added.items()}
    choice = allocating.allocate(found, replace(known, added=_added(errors)), [Budget(cheap, 3.0)])
    assert set(choice.plan.weights) == set(choice.bits) == {"a", "b", "c", "g"}
    assert choice.found.placement.skipped["d"] == "asked to stay in float"
    kept = found.keeping_float(["d"])
    assert set(kept.base.weights) == {"a", "b", "c", "g"}
    assert kept.placement.skipped["d"] == "asked to stay in float"
    assert set(kept.ranges[8]) >= set(kept.placement.tensors)
    twice = kept.keeping_float(["a"])
    assert set(twice.base.weights) == {"b", "c", "g"}


def test_a_layer_in_float_leaves_tables_in_integers():
    text = """g (int64[n,6] ids, float[600,32] table, float[32,8] w, float[8,8] v) => (float[n,6,8] y) {
        [look] e = Gather(table, ids) [one] h = MatMul(e, w) r = Relu(h) [two] y = MatMul(r, v)
    }"""
    net = model(text, table=weights(600, 32), w=weights(32, 8), v=weights(8, 8))
    placement = place(net)
    ranges = {name: Range(-4.0, 4.0, "given") for name in placement.tensors}
    kept = Calibrated(net, placement, {8: ranges}, Precision()).keeping_float(["two"])
    assert set(kept.base.weights) == {"one"}
    assert kept.base.tables == ("look",)


def _added(errors):
    return {group: {bits: Added(error, 0.0) for bits, error in entries.items()} for group, entries in errors.items()}


def by_layers(found, wanted):
    """A drop that depends on which layers are quantized."""

    def drop(quantized):
        names = {name for name in quantized.graph.initializers if name.endswith(".weight_q")}
        return wanted({name.removesuffix(".weight_q") for name in names})

    return drop


def test_the_fewest_layers_stay_in_float(found):
    harm = allocating.harms(found, rows())
    ranking = sorted(harm, key=lambda layer: -harm[layer])
    assert len(ranking) == 5
    assert min(harm.values()) > 0
    asked = by_layers(found, lambda integer: 0.1 if set(ranking[:2]) & integer else 0.0)
    choice = allocating.within_drop(found, None, [], 0.01, asked, rows())
    assert choice.kept == tuple(ranking[:2])
    assert choice.drop == 0.0
    assert set(choice.plan.weights) == set(choice.bits) == set(ranking[2:])
    with pytest.raises(TargetNotMet, match=r"a drop of 0\.01 cannot be kept with any layer in integers"):
        allocating.within_drop(found, None, [], 0.01, lambda quantized: 0.1, rows())


def test_nothing_stays_in_float_where_eight_bits_do(found):
    choice = allocating.within_drop(found, None, [], 0.01, lambda quantized: 0.01, rows())
    assert (choice.kept, choice.drop) == ((), 0.01)
    assert set(choice.bits.values()) == {BASE}


def test_a_layer_does_harm_by_its_own_grids_alone(found, floats):
    """The harm of the last layer is that of its weights and its input: everything in front stays in float."""
    harm = allocating.harms(found, rows())["g"]
    inner = Session(graph.with_outputs(found.model, ["flat"]))
    grid, steps = found.base.tensors["flat"], np.asarray(found.base.weights["g"].scales, np.float32)
    layer = graph.layer_of(graph.node_names(found.model)["g"])
    weight = fake_quantize(layer.weight, steps, 0, Grid(8), axis=1)
    noise = power = 0.0
    for feeds, wanted in zip(rows(), floats, strict=True):
        codes = Grid(8, signed=False, symmetric=False)
        flat = fake_quantize(inner.run(feeds)["flat"], grid.scale, grid.zero_point, codes)
        noise += np.square(flat @ weight + layer.bias - wanted["y"]).sum()
        power += np.square(wanted["y"]).sum()
    assert harm == pytest.approx(noise / power, rel=0.05)


def test_the_smallest_network_within_a_drop(found, known, monkeypatch):
    monkeypatch.setattr(allocating, "built", lambda choice, batches: choice)
    points = front(allocating.errors_of(known), allocating.sizes(found, known), points=allocating.POINTS)
    asked = []

    def drop(choice):
        asked.append(choice)
        return choice.allocation.degradation if choice.allocation is not None else 0.0

    limit = points[len(points) // 2].degradation
    choice = allocating.within_drop(found, known, [], limit, drop, rows())
    smallest = min((point for point in points if point.degradation <= limit), key=lambda point: point.costs["size"])
    assert choice.bits == found.by_layer(smallest.bits)
    assert choice.drop == smallest.degradation
    assert len(asked) < len(points)
    assert set(allocating.within_drop(found, known, [], -1.0 + 1.0, drop, rows()).bits.values()) == {BASE}


def test_other_budgets_hold_beside_a_drop(found, known):
    budgets = [Budget(allocating.average_bits(found.placement, (*OPTIONS, BASE)).grouped(found.groups), 5.0)]
    choice = allocating.within_drop(found, known, budgets, 0.002, lambda quantized: 0.002, rows())
    assert choice.bits == allocating.allocate(found, known, budgets).bits
    with pytest.raises(TargetNotMet, match=r"within the other budgets the drop cannot be kept below 0\.001"):
        allocating.within_drop(found, known, budgets, 0.001, lambda quantized: 0.002, rows())


def test_drops_with_and_without_labels(found):
    reference = Session(found.model)
    base = emit(found.model, found.base)
    answers = [reference.run(feeds)["y"].argmax(axis=1) for feeds in rows()]
    same = np.concatenate([Session(base).run(feeds)["y"].argmax(axis=1) for feeds in rows()])
    changed = np.mean(same != np.concatenate(answers))
    assert allocating.drop_meter(reference, rows())(base) == pytest.approx(changed)
    right = list(zip(rows(), answers, strict=True))
    layer = graph.layer_of(graph.node_names(found.model)["g"])
    coarse = emit(found.model, found.base, learned={"g": LearnedLayer(np.zeros(layer.weight.shape, np.int8))})
    lost = allocating.drop_meter(reference, rows(), right)(coarse)
    assert lost == pytest.approx(allocating.drop_meter(reference, rows())(coarse))
    assert lost > 0
    judge = Session(coarse)
    labelled = [(feeds, judge.run(feeds)["y"].argmax(axis=1)) for feeds in rows()]
    assert allocating.drop_meter(reference, rows(), labelled)(coarse) == pytest.approx(-lost)


@pytest.fixture
def file(found, tmp_path):
    graph.save(found.model, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def test_one_call_from_wishes_to_bits(found, file, known):
    def choose(options=OPTIONS[:2], **wishes):
        return mixed.choose_bits(found, read_wishes(**wishes), file, rows(), rows(seed=3), options=options, workers=1)

    assert choose(avg_bits=8).allocation.degradation <= choose(avg_bits=4).allocation.degradation
    assert choose(avg_bits=4).allocation.costs["average weight bits"] <= 4
    size = choose(max_size="0.99x").allocation.costs["size"]
    assert size <= 0.99 * file.stat().st_size
    with pytest.raises(Infeasible, match="size cannot be"):
        choose(max_size="0.01x")
    assert set(choose(max_latency="1000ms").allocation.costs) == {"latency"}
    guarded = choose(options=[BASE], max_drop=0.9)
    assert set(guarded.bits.values()) == {BASE}
    assert 0 <= guarded.drop <= 0.9
