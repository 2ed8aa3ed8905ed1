"""The picture of the graph: lanes, edges, colours, and a line for every row."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from pages import NASTY, Page, details, layer, summary

from onnxq.report import html_report
from onnxq.report.html import flow as subject
from onnxq.report.html.flow import flow_map, lanes_of
from onnxq.types.details import FlowNode


def nodes(*sources):
    return tuple(FlowNode(f"n{index}", "Add", tuple(read)) for index, read in enumerate(sources))


def test_a_branch_leaves_its_lane_and_comes_back():
    assert lanes_of(nodes((), (0,), (1,), (2,), (1, 3))) == [0, 0, 1, 1, 0]
    assert lanes_of(nodes((), (0,), (0,), (1, 2))) == [0, 1, 0, 0]
    assert lanes_of(nodes((), (), (0, 1))) == [0, 1, 0]


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 14))
    return nodes(
        *(sorted(draw(st.sets(st.integers(0, index - 1), max_size=3))) if index else () for index in range(count))
    )


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_no_node_stands_on_a_line_that_passes_by(found):
    lanes = lanes_of(found)
    for target, node in enumerate(found):
        for source in node.sources:
            assert all(lanes[row] != lanes[source] for row in range(source + 1, target))


def picture():
    flow = (
        FlowNode("x", "input", ()),
        FlowNode("conv", "Conv", (0,)),
        FlowNode(NASTY, "MatMul", (1,)),
        FlowNode("odd<b>", "Add", (1, 2)),
    )
    return details(flow=flow)


def test_every_row_has_its_line_and_links_to_its_layer():
    page = Page(html_report(summary(), picture()))
    links = [found["href"] for name, found in page.elements if name == "a" and "name" in (found.get("class") or "")]
    assert links == ["#layer-0", "#layer-1"]
    assert "Add odd<b>" in page.text
    assert "4/824.5 dBconv" in page.text
    circles = [
        found for name, found in page.elements if name == "circle" and found["class"] in ("junction", "d2", "float")
    ]
    assert [(found["class"], found["cx"], found["cy"]) for found in circles[-4:]] == [
        ("junction", "8", "13"),
        ("d2", "8", "39"),
        ("float", "24", "65"),
        ("junction", "8", "91"),
    ]


def test_edges_run_down_their_lane_and_bend_in_the_last_row():
    edges = re.findall(r'<path class="edge" d="([^"]+)"', flow_map(picture()))
    assert edges == [
        "M8 13V39",
        "M8 39V39C8 52 24 52 24 65",
        "M8 39V91",
        "M24 65V65C24 78 8 78 8 91",
    ]


def test_long_graphs_are_folded_and_unknown_ones_left_out(monkeypatch):
    assert '<details class="graph" open>' in flow_map(picture())
    monkeypatch.setattr(subject, "OPEN", 3)
    assert '<details class="graph">' in flow_map(picture())
    assert flow_map(details(layers=(layer(),))) == ""
