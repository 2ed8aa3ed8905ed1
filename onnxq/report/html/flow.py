"""The graph, drawn like a history with branches: a row per layer or junction, lanes for what flows beside each other.

What a node makes stays in the node's lane down to its last reader, which takes the lane over; other readers branch off
to the first lane that is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.markup import Html, join, tag
from onnxq.types.details import Details, FlowNode, LayerDetail

ROW, LANE = 26, 16
"""Pixels between rows, and between lanes."""
OPEN = 80
"""Most rows that are shown without being asked for."""


def flow_map(details: Details) -> Html:
    """The picture, with a line of text beside every row; nothing where the graph is not known."""
    if not details.flow:
        return Html()
    places = {layer.name: index for index, layer in enumerate(details.layers)}
    lanes = lanes_of(details.flow)
    rows = [_line(node, places.get(node.name), details.layers) for node in details.flow]
    drawn = tag("div.flow", _picture(details, lanes, places), tag("ol", (tag("li", row) for row in rows)))
    summary = tag("summary", f"The graph: {words.times(len(rows), 'row', 'rows')}, junctions among them")
    return tag("details.graph", summary, drawn, open=len(rows) <= OPEN)


def lanes_of(nodes: Sequence[FlowNode]) -> list[int]:
    """The lane of every node, from 0."""
    left = Counter(source for node in nodes for source in node.sources)
    taken: dict[int, int] = {}
    found: list[int] = []
    for index, node in enumerate(nodes):
        left.subtract(node.sources)
        done = [source for source in node.sources if not left[source]]
        freed = [found[source] for source in done]
        for lane in freed:
            taken.pop(lane, None)
        lane = min(freed, default=next(lane for lane in range(len(nodes)) if lane not in taken))
        found.append(lane)
        if left[index]:
            taken[lane] = index
    return found


def _picture(details: Details, lanes: Sequence[int], places: dict[str, int]) -> Html:
    width, height = LANE * (max(lanes) + 1), ROW * len(lanes)
    edges = [
        tag("path.edge", d=_edge(lanes[source], source, lanes[index], index))
        for index, node in enumerate(details.flow)
        for source in node.sources
    ]
    dots = [
        tag(f"circle.{_kind(places.get(node.name), details.layers)}", cx=_x(lanes[index]), cy=_y(index), r=5)
        for index, node in enumerate(details.flow)
    ]
    return tag("svg", edges, dots, width=width, height=height, viewBox=f"0 0 {width} {height}", aria_hidden="true")


def _edge(lane: int, row: int, other: int, target: int) -> str:
    """Down the source's lane, then over to the target's within one row."""
    if lane == other:
        return f"M{_x(lane)} {_y(row)}V{_y(target)}"
    bend = _y(target) - ROW
    middle = bend + ROW // 2
    return f"M{_x(lane)} {_y(row)}V{bend}C{_x(lane)} {middle} {_x(other)} {middle} {_x(other)} {_y(target)}"


def _x(lane: int) -> int:
    return LANE * lane + LANE // 2


def _y(row: int) -> int:
    return ROW * row + ROW // 2


def _kind(place: int | None, layers: Sequence[LayerDetail]) -> str:
    if place is None:
        return "junction"
    return charts.level(layers[place].sqnr_db) if layers[place].integer else "float"


def _line(node: FlowNode, place: int | None, layers: Sequence[LayerDetail]) -> Html:
    """What stands beside a row."""
    if place is None:
        return join((tag("span.sub", f"{node.op_type} {node.name}"),))
    layer = layers[place]
    kind = "int" if layer.integer else "float"
    bits = f"{layer.weight_bits}/{layer.input_bits}" if layer.integer else "float"
    figure = "\N{EN DASH}" if layer.sqnr_db is None else words.decibels(layer.sqnr_db)
    return join(
        (
            tag(f"span.chip.{kind}", bits),
            tag("span.figure", figure),
            tag("a.name", layer.name, href=f"#layer-{place}", title=f"{layer.op_type} in {layer.block}"),
        )
    )
