"""Measurement decides between allocations of bits."""

import numpy as np
import pytest
from helpers import model, weights

from onnxq.pipeline import contest
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.contest import contested, proposals
from onnxq.plan import Precision, Range, place
from onnxq.types.mixed import BASE, Added, Budget, Costs, Sensitivities

TEXT = """g (float[n,6] x, float[6,8] w, float[8,8] v, float[8,8] u, float[8,5] t) => (float[n,5] y) {
    [a] h = MatMul(x, w) i = Relu(h) [b] j = MatMul(i, v) k = Relu(j) [c] l = MatMul(k, u) m = Relu(l)
    [d] y = MatMul(m, t)
}"""
OPTIONS = (BASE, (4, 8), (2, 8))
ROWS = [{"x": weights(9, 6, seed=seed)} for seed in range(3)]


@pytest.fixture(scope="module")
def found():
    made = model(TEXT, w=weights(6, 8), v=weights(8, 8), u=weights(8, 8, seed=1), t=weights(8, 5))
    placement = place(made)
    ranges = {name: Range(-4.0, 4.0, "given") for name in placement.tensors}
    return Calibrated(made, placement, {8: ranges}, Precision())


@pytest.fixture(scope="module")
def known(found):
    """Sums that lie: two bits in one layer are said to cost next to nothing."""
    costs = {BASE: 0.0, (4, 8): 1.0, (2, 8): 1.001}
    added = {group: {bits: Added(costs[bits], costs[bits]) for bits in OPTIONS} for group in found.groups}
    return Sensitivities(0.0, found.groups, added, 27)


def budget(found, average):
    layers = {group: {bits: bits[0] / 4 for bits in OPTIONS} for group in found.groups}
    return Budget(Costs("average weight bits", "bits", layers), average)


def test_every_proposal_keeps_the_budgets_and_comes_once(found, known):
    made = list(proposals(found, known, [budget(found, 6)]))
    bits = [choice.bits for choice in made]
    assert all(sum(chosen[0] for chosen in each.values()) <= 24 for each in bits)
    assert {"a": BASE, "b": (4, 8), "c": (4, 8), "d": BASE} in bits
    assert all(each != other for index, each in enumerate(bits) for other in bits[:index])
    assert any(min(chosen[0] for chosen in each.values()) == 2 for each in bits)
    assert len(made) >= 2


def test_the_nearest_to_the_float_model_wins(found, known, monkeypatch):
    limit = [budget(found, 6)]
    candidates = [contest.allocate(found, known, limit), *proposals(found, known, limit)]
    errors = {id(choice): contest.built(choice, ROWS) for choice in candidates}
    reference = contest.Session(found.model)
    wanted = [reference.run(feeds) for feeds in ROWS]
    reached = [contest.output_error(errors[id(choice)], ROWS, wanted, simulate=True) for choice in candidates]
    chosen = contested(found, known, limit, ROWS)
    assert chosen.bits == candidates[int(np.argmin(reached))].bits
    assert min(reached) < reached[0]
    assert contested(found, known, limit, ROWS, lambda choice: False).bits == candidates[0].bits


def test_without_rivals_nothing_is_built(found, known, monkeypatch):
    monkeypatch.setattr(contest, "built", None)
    assert set(contested(found, known, [budget(found, 2)], ROWS).bits.values()) == {(2, 8)}
