"""Placements and plans of small models."""

from helpers import run

from onnxq import graph
from onnxq.plan import Precision, Range, make_plan, place

EIGHT = Precision()


def ranges_of(model, feeds, names):
    """Smallest and largest value of each tensor."""
    inner = [name for name in names if name not in feeds]
    seen = dict(feeds) | run(graph.with_outputs(model, inner), feeds)
    return {name: Range(float(seen[name].min()), float(seen[name].max()), "seen") for name in names}


def planned(model, feeds, precision=EIGHT, **choices):
    """The plan of a model, with the ranges that `feeds` give."""
    placement = place(model, **choices)
    return make_plan(model, placement, ranges_of(model, feeds, placement.tensors), precision)


def given(model, ranges, precision=EIGHT, **choices):
    """The plan of a model for ranges made up: tensor -> (low, high)."""
    placement = place(model, **choices)
    assert set(ranges) == set(placement.tensors)
    return make_plan(model, placement, {name: Range(*ends, "given") for name, ends in ranges.items()}, precision)


def integer(placement):
    """Names of the nodes that run in integers, in graph order."""
    return [unit.name for unit in placement.units if unit in placement.integer]
