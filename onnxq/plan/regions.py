"""From regions between cuts to the groups of nodes that blocks are made of."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.graph import Value
from onnxq.plan.cuts import Flow, Region, regions_of

Group = list[int]
"""Positions of nodes, ascending."""


def pieces_of(flow: Flow, limit: int) -> list[Group]:
    """Groups of nodes of the flow: regions without layers are joined to others, those of many layers are split."""
    pieces: list[Group] = []
    for group in _joined(flow, regions_of(flow)):
        pieces += _split(flow, group, limit)
    return pieces


def _joined(flow: Flow, regions: list[Region]) -> list[Group]:
    maker = {value: k for k, region in enumerate(regions) for i in region.nodes for value in flow.nodes[i].outputs}
    weight = [sum(i in flow.layers for i in region.nodes) for region in regions]
    behind: list[list[int]] = [[] for _ in regions]
    for k, region in enumerate(regions):
        if region.entry in maker:
            behind[maker[region.entry]].append(k)
    home = list(range(len(regions)))

    def find(k: int) -> int:
        while home[k] != k:
            home[k] = home[home[k]]
            k = home[k]
        return k

    def join(k: int, other: int) -> None:
        k, other = find(k), find(other)
        if k != other:
            home[k] = other
            weight[other] += weight[k]

    shrunk: dict[int, int] = {}
    for k, region in enumerate(regions):
        if weight[find(k)]:
            continue
        front = shrunk.get(k, maker.get(region.entry) if region.entry is not None else None)
        if front is None:
            continue
        onward = min(behind[k], key=lambda child: (not weight[child], child), default=None)
        smaller = k in shrunk or (onward is not None and _shrinks(region.entry, regions[onward].entry))
        if onward is not None and smaller and weight[find(front)]:
            shrunk[onward] = front
            join(k, onward)
        else:
            join(k, front)
    groups: dict[int, Group] = {}
    for k, region in enumerate(regions):
        groups.setdefault(find(k), []).extend(region.nodes)
    return [sorted(group) for group in groups.values()]


def _shrinks(before: Value | None, after: Value | None) -> bool:
    """Whether space is pooled, upsampled or flattened between two values, as far as their shapes are known."""
    if before is None or after is None or before.shape is None or after.shape is None:
        return False
    old, new = list(before.shape), list(after.shape)
    if len(new) <= 2 < len(old):
        return True
    if len(new) != len(old):
        return False
    return (len(old) > 3 and old[2:] != new[2:]) or _elements(old) > _elements(new)


def _elements(shape: Sequence[object]) -> int:
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 1
    return count


def _split(flow: Flow, group: Group, limit: int) -> list[Group]:
    """Cut a group of more than `limit` layers where the fewest of its tensors cross, as late as that allows."""
    total = sum(i in flow.layers for i in group)
    if total <= limit:
        return [group]
    crossing = _crossing(flow, group)
    # Between two layers, the best place; behind an activation rather than in front of it.
    ends: list[int] = []
    for place, i in enumerate(group):
        if i in flow.layers:
            ends.append(place)
        elif ends and crossing[place] <= crossing[ends[-1]]:
            ends[-1] = place
    pieces, start, first = [], 0, 0
    while total - first > limit:
        window = range(first, first + limit)
        best = min(window, key=lambda k: (crossing[ends[k]], -k))
        pieces.append(group[start : ends[best] + 1])
        start, first = ends[best] + 1, best + 1
    return [*pieces, group[start:]]


def _crossing(flow: Flow, group: Group) -> list[int]:
    """Number of flow values that nodes of the group behind each place read from in front of it."""
    last: dict[Value, int] = {}
    first: dict[Value, int] = {}
    for place, i in enumerate(group):
        for value in flow.taken[i]:
            if value in flow.values:
                last[value] = place
                first.setdefault(value, 0)
        first.update((value, place) for value in flow.nodes[i].outputs)
    change = [0] * (len(group) + 1)
    for value, place in last.items():
        change[first[value]] += 1
        change[place] -= 1
    count, crossing = 0, []
    for step in change[:-1]:
        count += step
        crossing.append(count)
    return crossing


def assigned(flow: Flow, pieces: list[Group]) -> list[Group]:
    """The pieces in an order in which they can run, with the nodes beside the flow added to the first that needs them.

    A node that no piece needs joins the last one that it depends on. Pieces that could run in no order, because they
    depend on each other through shapes, become one.
    """
    if not pieces:
        return [list(range(len(flow.nodes)))] if flow.nodes else []
    maker = {value: i for i, node in enumerate(flow.nodes) for value in node.outputs}
    reads = [[maker[value] for value in taken if value in maker] for taken in flow.taken]
    rank = {i: k for k, piece in enumerate(sorted(pieces)) for i in piece}
    rank = _runnable(rank, reads)
    inside = set(rank)
    for i in range(len(reads) - 1, -1, -1):
        if i in rank:
            for source in reads[i]:
                if source not in inside:
                    rank[source] = min(rank.get(source, rank[i]), rank[i])
    for i, sources in enumerate(reads):
        if i not in rank:
            rank[i] = max((rank[source] for source in sources), default=0)
    groups: dict[int, Group] = {}
    for i in range(len(reads)):
        groups.setdefault(rank[i], []).append(i)
    return [groups[k] for k in sorted(groups)]


def _runnable(rank: dict[int, int], reads: list[list[int]]) -> dict[int, int]:
    """The ranks, those from a piece to a later one that it depends on (through nodes beside the flow) made equal."""
    needs: list[int] = []
    last = list(range(max(rank.values()) + 1))
    for i, sources in enumerate(reads):
        need = max((needs[source] for source in sources), default=-1)
        own = rank.get(i, need)
        if need > own:
            last[own] = max(last[own], need)
        needs.append(own)
    first: list[int] = []
    end = -1
    for k, furthest in enumerate(last):
        first.append(first[-1] if k <= end else k)
        end = max(end, furthest)
    return {i: first[k] for i, k in rank.items()}
