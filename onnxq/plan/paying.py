"""Where integers pay: the labelling of a graph with "float" and "integer" that takes the least time.

Every node v has a time in float f(v) and, where there is an integer kernel, one in integers i(v). A tensor t that a
float node makes and an integer node reads has to be quantized, once for all readers: that takes enter(t). One that an
integer node makes and a float node reads has to be restored: leave(t). Wanted is the labelling that minimises

    sum f(v) over float v  +  sum i(v) over integer v  +  sum enter(t), leave(t) over the tensors that cross

This is a minimum cut (integer nodes lie on the source's side), found exactly, whatever the graph looks like:

    source --f(v)--> v --i(v)--> sink           a float v cuts the first arc, an integer v the second
    readers --no limit--> a --enter(t)--> maker     the helper a is on the source's side if any reader is
    maker --leave(t)--> b --no limit--> readers     the helper b is on the sink's side if any reader is

The maximum flow behind it is Dinic's: blocking flows over shortest paths (Soviet Math. Doklady 11, 1970).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnxq import graph
from onnxq.plan.placement import Placement
from onnxq.plan.units import makers

_NO_LIMIT = 1 << 60
_NANOSECONDS = 1e6
"""Per millisecond: flows are whole numbers."""
OUTSIDE = ""
"""What feeds the model's inputs and reads its outputs: always float."""


@dataclass(frozen=True)
class Crossing:
    """A tensor, and what it costs where its maker and a reader do not agree.

    Attributes:
        maker: The node that makes it, or `OUTSIDE`.
        readers: Those that read it.
        enter: Milliseconds for rounding it, if the maker is float and a reader is not.
        leave: Milliseconds for restoring it, if a reader is float and the maker is not.
    """

    maker: str
    readers: tuple[str, ...]
    enter: float
    leave: float


@dataclass(frozen=True)
class Prices:
    """Milliseconds of every unit of a placement and of every step between float and integers.

    Attributes:
        slow: In float, by unit.
        quick: In integers, by unit; only those that may run in integers.
        enter: For rounding a tensor, by tensor.
        leave: For restoring it.
    """

    slow: Mapping[str, float]
    quick: Mapping[str, float]
    enter: Mapping[str, float]
    leave: Mapping[str, float]


def total(
    slow: Mapping[str, float], quick: Mapping[str, float], tensors: Sequence[Crossing], integer: set[str]
) -> float:
    """Milliseconds of a labelling: what `cheapest` minimises."""
    crossed = 0.0
    for tensor in tensors:
        inside = [reader in integer for reader in tensor.readers]
        if tensor.maker in integer:
            crossed += 0.0 if all(inside) else tensor.leave
        elif any(inside):
            crossed += tensor.enter
    return crossed + sum(quick[name] if name in integer else time for name, time in slow.items())


def cheapest(slow: Mapping[str, float], quick: Mapping[str, float], tensors: Sequence[Crossing]) -> set[str]:
    """The nodes that run in integers in the labelling of least time; of several such labellings, the most nodes.

    Args:
        slow: Milliseconds in float of every node.
        quick: The same in integers, of those that have an integer kernel.
        tensors: What passes between them; makers and readers that are not in `quick` are float.
    """
    network = _Network()
    for name, time in quick.items():
        network.arc(_SOURCE, name, round(slow[name] * _NANOSECONDS))
        network.arc(name, _SINK, round(time * _NANOSECONDS))
    for index, tensor in enumerate(tensors):
        maker = tensor.maker if tensor.maker in quick else _SINK
        ends = [reader if reader in quick else _SINK for reader in dict.fromkeys(tensor.readers)]
        entering, leaving = (index, "enter"), (index, "leave")
        network.arc(entering, maker, round(tensor.enter * _NANOSECONDS))
        network.arc(maker, leaving, round(tensor.leave * _NANOSECONDS))
        for end in ends:
            network.arc(end, entering, _NO_LIMIT)
            network.arc(leaving, end, _NO_LIMIT)
    network.fill()
    return set(quick) - network.behind()


def crossings(placement: Placement, prices: Prices) -> list[Crossing]:
    """The tensors between the units of a placement.

    A Gemm or MatMul with integer operands can return float, so nothing has to be restored behind it.
    """
    maker = makers(list(placement.units))
    readers: dict[str, list[str]] = {}
    for unit in placement.units:
        for value in unit.inputs:
            readers.setdefault(graph.name_of(value), []).append(unit.name)
    values = {graph.name_of(value): value for unit in placement.units for value in (*unit.inputs, *unit.outputs)}
    found = []
    for name, value in values.items():
        made_by = maker.get(value)
        ends = [*readers.get(name, ()), *([OUTSIDE] if value.is_graph_output() else [])]
        leave = 0.0 if made_by is not None and made_by.linear else prices.leave.get(name, 0.0)
        found.append(
            Crossing(OUTSIDE if made_by is None else made_by.name, tuple(ends), prices.enter.get(name, 0.0), leave)
        )
    return found


def unpaid(placement: Placement, prices: Prices) -> frozenset[str]:
    """Names of the integer units of `placement` that take less time in float, steps in between included."""
    candidates = {unit.name for unit in placement.integer}
    quick = {name: time for name, time in prices.quick.items() if name in candidates}
    return frozenset(candidates - cheapest(prices.slow, quick, crossings(placement, prices)))


_Vertex = str | tuple[int, str]
_SOURCE, _SINK = (-1, "source"), (-1, "sink")


class _Network:
    """Arcs with room, and the flow that fills them."""

    def __init__(self) -> None:
        self._room: dict[_Vertex, dict[_Vertex, int]] = {_SOURCE: {}, _SINK: {}}

    def arc(self, tail: _Vertex, head: _Vertex, room: int) -> None:
        """Add room from `tail` to `head`; an arc from a vertex to itself is none."""
        if tail == head:
            return
        heads = self._room.setdefault(tail, {})
        heads[head] = heads.get(head, 0) + room
        self._room.setdefault(head, {}).setdefault(tail, 0)

    def fill(self) -> None:
        """Send as much as possible from source to sink."""
        while _SINK in (level := self._levels()):
            ways = {tail: list(heads) for tail, heads in self._room.items()}
            while path := self._path(level, ways):
                arcs = list(pairwise(path))
                flow = min(self._room[tail][head] for tail, head in arcs)
                for tail, head in arcs:
                    self._room[tail][head] -= flow
                    self._room[head][tail] += flow

    def _levels(self) -> dict[_Vertex, int]:
        level: dict[_Vertex, int] = {_SOURCE: 0}
        queue: deque[_Vertex] = deque([_SOURCE])
        while queue:
            tail = queue.popleft()
            for head, room in self._room[tail].items():
                if room > 0 and head not in level:
                    level[head] = level[tail] + 1
                    queue.append(head)
        return level

    def _path(self, level: Mapping[_Vertex, int], ways: Mapping[_Vertex, list[_Vertex]]) -> list[_Vertex]:
        """A shortest way to the sink, empty where none is left; heads that lead nowhere are taken out of `ways`."""
        path: list[_Vertex] = [_SOURCE]
        while path[-1] != _SINK:
            tail = path[-1]
            heads = ways[tail]
            while heads and not (self._room[tail][heads[-1]] > 0 and level.get(heads[-1]) == level[tail] + 1):
                heads.pop()
            if heads:
                path.append(heads[-1])
            elif tail == _SOURCE:
                return []
            else:
                path.pop()
                ways[path[-1]].pop()
        return path

    def behind(self) -> set[_Vertex]:
        """Everything from which the sink can still be reached: the smallest sink's side of a minimum cut."""
        found: set[_Vertex] = {_SINK}
        queue: deque[_Vertex] = deque([_SINK])
        while queue:
            head = queue.popleft()
            for tail in self._room[head]:
                if tail not in found and self._room[tail][head] > 0:
                    found.add(tail)
                    queue.append(tail)
        return found
