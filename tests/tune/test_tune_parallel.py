"""Layers tuned on their own, in several processes."""

import pickle
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from helpers import run
from tuning import FOUR, TWO, concat, job_of, plan_of, residual

torch = pytest.importorskip("torch")
pytest.importorskip("joblib")

from onnxq import graph  # noqa: E402
from onnxq.emit import emit, weight_codes  # noqa: E402
from onnxq.errors import UnsupportedError  # noqa: E402
from onnxq.jobs.local import Local  # noqa: E402
from onnxq.plan import layer_slices  # noqa: E402
from onnxq.tune import Job, TuneMoments, block_error  # noqa: E402
from onnxq.tune import parallel as parallel_module  # noqa: E402
from onnxq.tune.adaquant import AdaQuant  # noqa: E402
from onnxq.tune.aquant import AQuant  # noqa: E402
from onnxq.tune.parallel import parallel  # noqa: E402
from onnxq.types import LearnedLayer, Silence, Tuned  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

QUICK = AdaQuant(iterations=30)


def batches_for(count=4):
    return [{"x": np.random.default_rng(seed).normal(0.5, 1, (8, 4, 6, 6)).astype(np.float32)} for seed in range(count)]


def start(build=concat, precision=FOUR):
    m = build()
    graph.infer_shapes(m)
    batches = batches_for()
    return m, Tuned(plan_of(m, batches, precision, 0.8)), batches, layer_slices(m)


def same(one, other):
    return (
        one.plan == other.plan
        and one.layers.keys() == other.layers.keys()
        and all(
            np.array_equal(layer.codes, other.layers[name].codes)
            and np.array_equal(layer.bias, other.layers[name].bias)
            for name, layer in one.layers.items()
        )
    )


@dataclass
class Heard(Silence):
    notes: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    def note(self, text):
        self.notes.append(text)

    def step(self, text):
        self.steps.append(text)


def alone(m, part, batches, seed):
    """The job of one layer: what the float model feeds it, and what it makes of that."""
    names = [*part.inputs, *part.outputs]
    inner = graph.with_outputs(m, [name for name in names if name not in batches[0]], keep=False)
    seen = [dict(feeds) | run(inner, feeds, optimize="all") for feeds in batches]
    inputs = [{name: values[name] for name in part.inputs} for values in seen]
    targets = [{name: values[name] for name in part.outputs} for values in seen]
    model = graph.sub_model(m, part.inputs, part.outputs)
    return Job(part, model, inputs, inputs, targets, (0, 1, 2), (3,), seed)


def test_curved_borders_of_all_layers_reach_the_plan():
    m, tuned, batches, slices = start()
    method = AQuant(iterations=5, kind="quadratic", judged=False)
    found, _ = parallel(m, tuned, slices, method, batches, backend=Local(1))
    expected = {}
    for index, part in enumerate(slices):
        expected |= method(alone(m, part, batches, index), tuned).plan.borders
    assert expected
    assert found.plan.borders.keys() == expected.keys()
    assert found.plan.borders == expected


def test_the_number_of_processes_changes_nothing():
    m, tuned, batches, slices = start()
    one, first = parallel(m, tuned, slices, QUICK, batches, backend=Local(1), seed=5)
    with Local(2) as processes:
        two, second = parallel(m, tuned, slices, QUICK, batches, backend=processes, seed=5)
    assert same(one, two)
    assert [replace(result, seconds=0) for result in first] == [replace(result, seconds=0) for result in second]
    assert set(one.layers) == {part.layers[0] for part, done in zip(slices, first, strict=True) if done.kept}
    assert len(one.layers) >= 3
    other, _ = parallel(m, tuned, slices, QUICK, batches, backend=Local(1), seed=6)
    assert not same(one, other)
    emitted = emit(m, one.plan, learned=one.layers)
    wanted, found = run(m, batches[3])["y"], run(emitted, batches[3], optimize="all")["y"]
    assert np.square(found - wanted).sum() < 0.2 * np.square(wanted).sum()


@pytest.mark.parametrize("build", [residual, concat])
def test_each_layer_is_tuned_as_if_it_were_alone(build):
    m, tuned, batches, slices = start(build)
    found, results = parallel(m, tuned, slices, QUICK, batches, backend=Local(1), seed=3)
    assert [result.block for result in results] == [part.name for part in slices]
    changed = set()
    for index, (part, result) in enumerate(zip(slices, results, strict=True)):
        job = alone(m, part, batches, 3 + index)
        state = QUICK(job, tuned)
        assert result.before == pytest.approx(block_error(job, tuned), rel=1e-9)
        assert result.after == pytest.approx(block_error(job, state), rel=1e-9)
        assert result.kept == (result.after < result.before)
        (name,) = part.layers
        if not result.kept:
            assert name not in found.layers
            assert found.plan.weights[name] == tuned.plan.weights[name]
            continue
        assert found.plan.weights[name] == state.plan.weights[name]
        np.testing.assert_array_equal(found.layers[name].codes, state.layers[name].codes)
        np.testing.assert_array_equal(found.layers[name].bias, state.layers[name].bias)
        for tensor, grid in state.plan.tensors.items():
            if grid != tuned.plan.tensors[tensor]:
                assert tensor not in part.inputs
                assert found.plan.tensors[tensor] == grid
                changed.add(tensor)
    assert any(result.kept for result in results)
    assert {tensor for tensor, grid in found.plan.tensors.items() if grid != tuned.plan.tensors[tensor]} == changed


def test_layers_that_are_known_are_not_done_again():
    m, tuned, batches, slices = start()
    each = []
    whole, results = parallel(m, tuned, slices, QUICK, batches, backend=Local(1), seed=5, after=each.append)
    assert sorted(layer.block for layer in each) == sorted(part.name for part in slices)
    known = {layer.block: layer for layer in each if layer.block != "b"}
    again = []
    log = Heard()
    found, rest = parallel(
        m, tuned, slices, QUICK, batches, backend=Local(1), seed=5, known=known, after=again.append, log=log
    )
    assert [layer.block for layer in again] == ["b"]
    assert log.steps == ["layer 4 of 4: b"]
    assert same(found, whole)
    assert [replace(result, seconds=0) for result in rest] == [replace(result, seconds=0) for result in results]


@dataclass(frozen=True)
class Greedy:
    """Changes everything that it is given, and says by how much."""

    judged: bool = False
    name: str = "greedy"

    def __call__(self, job, tuned):
        (layer,) = job.block.layers
        factor = 1.0 + job.seed
        node = graph.layer_of(graph.node_names(job.model)[layer])
        codes = weight_codes(node, tuned.plan.weights[layer])
        tensors = {name: replace(grid, scale=grid.scale * factor) for name, grid in tuned.plan.tensors.items()}
        weights = {
            name: replace(grid, scales=tuple(step * factor for step in grid.scales))
            for name, grid in tuned.plan.weights.items()
        }
        layers = {name: LearnedLayer(codes, np.full(node.channels, factor, np.float32)) for name in tuned.plan.weights}
        return Tuned(replace(tuned.plan, tensors=tensors, weights=weights), layers)


def test_a_layer_changes_its_own_entries_only():
    m, tuned, batches, slices = start()
    found, results = parallel(m, tuned, slices, Greedy(), batches, backend=Local(1))
    assert all(result.kept for result in results)
    makers = {"i": 1, "k": 2, "m": 3, "y": 4}
    assert set(tuned.plan.tensors) == {"x", "o", *makers}
    for name, grid in tuned.plan.tensors.items():
        assert found.plan.tensors[name].scale == pytest.approx(grid.scale * makers.get(name, 1))
    for factor, name in enumerate("abcd", 1):
        scales = np.asarray(tuned.plan.weights[name].scales)
        np.testing.assert_allclose(found.plan.weights[name].scales, scales * factor, rtol=1e-6)
        assert (found.layers[name].bias == factor).all()
    assert "h" not in found.plan.tensors


def test_layers_that_are_not_quantized_or_not_asked_for_stay():
    m, tuned, batches, slices = start()
    known = LearnedLayer(weight_codes(graph.layer_of(graph.node_names(m)["a"]), tuned.plan.weights["a"]), None)
    tuned = replace(tuned, layers={"a": known})
    found, results = parallel(m, tuned, slices[2:3], TuneMoments(), batches, backend=Local(1))
    assert [result.block for result in results] == ["c"]
    assert set(found.layers) == {"a", "c"}
    assert found.layers["a"] is known
    weights = {name: grid for name, grid in tuned.plan.weights.items() if name != "c"}
    bare = Tuned(replace(tuned.plan, weights=weights, integer=()), {})
    assert parallel(m, bare, slices[2:3], QUICK, batches, backend=Local(1)) == (bare, [])


def test_what_was_learned_is_where_a_layer_starts():
    m, tuned, batches, slices = start()
    known = TuneMoments()(job_of(m, batches), tuned)
    seen = {}

    @dataclass(frozen=True)
    class Look:
        judged: bool = True
        name: str = "look"

        def __call__(self, job, state):
            assert torch.get_num_threads() == 1
            seen[job.block.name] = state
            return state

    torch.set_num_threads(2)
    try:
        found, _ = parallel(m, known, slices, Look(), batches, backend=Local(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert same(found, known)
    for part in slices:
        assert seen[part.name].plan == known.plan
        assert set(seen[part.name].layers) == set(part.layers)


def test_groups_keep_the_budget_and_start_with_the_most_work(monkeypatch):
    m, tuned, batches, slices = start()
    whole, _ = parallel(m, tuned, slices, TuneMoments(), batches, backend=Local(1))
    order, sizes = [], []
    real = parallel_module._tasks

    def spied(model, tuned, group, *given):
        tasks = list(real(model, tuned, group, *given))
        folder = given[-1]
        sizes.append(sum(np.load(path).nbytes for path in folder.glob("*.npy")))
        order.append([part.name for part in group])
        assert all(len(pickle.dumps(task)) < 20_000 for task in tasks)
        return tasks

    monkeypatch.setattr(parallel_module, "_tasks", spied)
    tensor = 4 * 8 * 36 * 4  # bytes per channel: batches, rows, positions, float32
    # multiplications per position: a 6*4*9, b 5*6, c 7*6*9, d 3*12
    for budget, groups in (
        (1, [["c"], ["a"], ["d"], ["b"]]),
        ((4 + 6 + 7) * tensor, [["c", "a"], ["d"], ["b"]]),
        ((4 + 6 + 7) * tensor - 1, [["c"], ["a"], ["d"], ["b"]]),
        (1 << 30, [["c", "a", "d", "b"]]),
    ):
        order.clear()
        sizes.clear()
        found, _ = parallel(m, tuned, slices, TuneMoments(), batches, backend=Local(1), budget=budget)
        assert order == groups
        assert same(found, whole)
        assert budget == 1 or max(sizes) <= budget
    assert sizes == [(4 + 6 + 7 + 5 + 12 + 3) * tensor]


@dataclass(frozen=True)
class Refuse:
    """Refuses one layer."""

    layer: str
    judged: bool = True
    name: str = "refuse"

    def __call__(self, job, tuned):
        if self.layer in job.block.layers:
            raise UnsupportedError("not this one")
        return TuneMoments()(job, tuned)


def test_a_layer_that_is_refused_stays_and_the_log_says_so():
    m, tuned, batches, slices = start(residual, TWO)
    heard = Heard()
    found, results = parallel(m, tuned, slices, Refuse("b"), batches, backend=Local(1), log=heard)
    assert "b" not in found.layers
    assert "a" in found.layers
    assert [result.kept for result in results][1] is False
    assert heard.notes == ["block b: plain rounding stays: not this one"]
    assert heard.steps == ["layer 1 of 3: b", "layer 2 of 3: a", "layer 3 of 3: s"]


def test_steps_leave_room_for_biases_on_grids_that_others_shrank():
    m, tuned, batches, slices = start()

    @dataclass(frozen=True)
    class Shrink:
        """The first layer makes its result's grid tiny; the third one has a large bias."""

        judged: bool = False
        name: str = "shrink"

        def __call__(self, job, state):
            plan = state.plan
            node = graph.layer_of(graph.node_names(job.model)[job.block.layers[0]])
            codes = weight_codes(node, plan.weights[job.block.layers[0]])
            if job.block.name == "a":
                plan = replace(plan, tensors={**plan.tensors, "i": replace(plan.tensors["i"], scale=1e-9)})
            return Tuned(plan, {job.block.layers[0]: LearnedLayer(codes, np.full(node.channels, 9.0, np.float32))})

    found, _ = parallel(m, tuned, slices, Shrink(), batches, backend=Local(1))
    np.testing.assert_allclose(found.plan.weights["c"].scales, 9 / (1e-9 * 2**30), rtol=1e-6)
    assert found.plan.weights["a"] == tuned.plan.weights["a"]
    assert found.plan.weights["d"] == tuned.plan.weights["d"]
