"""The cheapest way to part a hypergraph in two, one side holding the source, the other the sink.

A hyperedge is paid for when its pins do not all lie on one side. Each becomes an arc  in -> out  with its cost as
capacity, and arcs of no limit from every pin to `in` and from `out` to every pin, so that a cut through it costs the
same whichever pins it parts. The minimum cut belongs to a maximum flow, found along shortest paths (Edmonds and Karp).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Pin = Hashable
SOURCE: Pin = "source"
SINK: Pin = "sink"
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Edge:
    """A hyperedge: what it joins, and what it costs to part that."""

    pins: tuple[Pin, ...]
    cost: int


def torn_least(edges: Sequence[Edge]) -> set[Pin]:
    """The pins on the sink's side of a minimum cut, the smallest such set; without the sink itself."""
    room: defaultdict[Pin, dict[Pin, int]] = defaultdict(dict)
    for index, edge in enumerate(edges):
        inner, outer = (index, "in"), (index, "out")
        _arc(room, inner, outer, edge.cost)
        for pin in edge.pins:
            _arc(room, pin, inner, _NO_LIMIT)
            _arc(room, outer, pin, _NO_LIMIT)
    while path := _path(room):
        arcs = list(pairwise(path))
        flow = min(room[tail][head] for tail, head in arcs)
        for tail, head in arcs:
            room[tail][head] -= flow
            room[head][tail] += flow
    pins = {pin for edge in edges for pin in edge.pins}
    return (_reaching_sink(room) & pins) - {SINK}


def _arc(room: defaultdict[Pin, dict[Pin, int]], tail: Pin, head: Pin, capacity: int) -> None:
    room[tail][head] = room[tail].get(head, 0) + capacity
    room[head].setdefault(tail, 0)


def _path(room: defaultdict[Pin, dict[Pin, int]]) -> list[Pin]:
    """A way from source to sink with room on every arc; empty when there is none."""
    came: dict[Pin, Pin] = {SOURCE: SOURCE}
    queue = deque([SOURCE])
    while queue and SINK not in came:
        tail = queue.popleft()
        for head, capacity in room[tail].items():
            if capacity > 0 and head not in came:
                came[head] = tail
                queue.append(head)
    if SINK not in came:
        return []
    path = [SINK]
    while path[-1] != SOURCE:
        path.append(came[path[-1]])
    return path[::-1]


def _reaching_sink(room: defaultdict[Pin, dict[Pin, int]]) -> set[Pin]:
    """Everything from which the sink can still be reached."""
    found: set[Pin] = {SINK}
    queue = deque([SINK])
    while queue:
        head = queue.popleft()
        for tail in room[head]:
            if tail not in found and room[tail].get(head, 0) > 0:
                found.add(tail)
                queue.append(tail)
    return found
