"""Measured placement: which layers are really faster in integers here, by the clock.

The rules of placement hold on average. Where the network that they give is slower than the float file - or a recipe
asks for it - its nodes and those of the float network are timed in the runtime's profile, and so is every
QuantizeLinear and DequantizeLinear that a step between float and integers would need. The labelling of least time
(`plan.paying`) says which nodes go back to float. The new network is timed against the float file and the best one so
far, in turns, and kept only if it is faster beyond doubt; its own profile then corrects the prices, and the next
labelling is tried.

Nothing here depends on ranges or codes, so it happens before either is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from onnxq.plan import Placement
from onnxq.plan.paying import Prices, unpaid
from onnxq.types import Interval, Log, Placed, Silence

ROUNDS = 3
"""Placements that are tried."""
FAVOURS = (0.95, 0.8, 0.65)
"""Milliseconds in integers count this much. What is equally fast stays in integers, and small; and where the first
gives nothing new, or no integers at all - the profile of a busy machine exaggerates - the others do."""
REASON = "faster in float on this machine (measured)"
Again = Callable[[Mapping[str, str]], Placement]
"""The rules' placement with some nodes in float: node -> why."""


@dataclass(frozen=True)
class Race:
    """Paired ratios of times of files that were called in turns.

    Attributes:
        to_float: Time of the newest file as a share of the float file's.
        to_best: The same as a share of the best quantized file's.
        best_to_float: Time of that one as a share of the float file's.
    """

    to_float: Interval
    to_best: Interval
    best_to_float: Interval


class Clock(Protocol):
    """What measures. It remembers what it has seen."""

    def race(self, best: Placement, newest: Placement) -> Race:
        """Time the float file and the networks of two placements in turns."""
        ...

    def prices(self, newest: Placement) -> Prices:
        """What nodes and steps cost, as far as known after a look into the network of `newest`."""
        ...


@dataclass(frozen=True)
class Found:
    """The fastest placement that was found.

    Attributes:
        placement: It.
        placed: What it gained; None where nothing else was looked for.
    """

    placement: Placement
    placed: Placed | None = None


def fastest(start: Placement, again: Again, clock: Clock, *, threads: int, always: bool, log: Log = Silence()) -> Found:
    """Look for a placement that takes less time than the rules'.

    Args:
        start: What the rules give.
        again: Places anew.
        clock: Measures.
        threads: Intra-op threads that it measures with, for the record.
        always: Look even where `start` is not slower than float.
        log: Progress.
    """
    before = clock.race(start, start).to_float
    if not always and before.low <= 1:
        return Found(start)
    log.stage("Looking for what is faster in float")
    best, newest, after, seen = start, start, before, [_nodes(start)]
    for _ in range(ROUNDS):
        proposed = _unseen(start, clock.prices(newest), again, seen)
        if proposed is None:
            break
        newest = proposed
        seen.append(_nodes(newest))
        race = clock.race(best, newest)
        log.step(f"{len(newest.layers)} of {len(start.layers)} layers in integers: {race.to_float.value:.2f}x")
        if race.to_best.high < 1 and race.to_float.value < race.best_to_float.value:
            if best is not start:  # what is said was measured in one race
                race = clock.race(start, newest)
            best, before, after = newest, race.best_to_float, race.to_float
    inside = {unit.name for unit in best.layers}
    back = tuple(unit.name for unit in start.layers if unit.name not in inside)
    nodes = tuple(unit.name for unit in start.units if unit.name in _nodes(start) - _nodes(best))
    return Found(best, Placed("cpu", threads, len(start.layers), back, nodes, before, after, len(seen) - 1))


def _unseen(start: Placement, prices: Prices, again: Again, seen: Collection[frozenset[str]]) -> Placement | None:
    """The placement of least time that was not tried and has integer layers; None where there is none."""
    for favour in FAVOURS:
        leaning = replace(prices, quick={name: favour * time for name, time in prices.quick.items()})
        found = again(dict.fromkeys(sorted(unpaid(start, leaning)), REASON))
        if found.layers and _nodes(found) not in seen:
            return found
    return None


def _nodes(placement: Placement) -> frozenset[str]:
    return frozenset(unit.name for unit in placement.integer)
