"""Where the ink goes: bars, whiskers, histograms and points, read back from the SVG."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.markup import Html, join, section, table, tag
from onnxq.types import Interval
from onnxq.types.details import Bars


def numbers(text, name):
    return [float(found) for found in re.findall(rf'\b{name}="([-0-9.]+)"', text)]


def test_a_histogram_is_a_step_line_with_logarithmic_heights():
    picture = charts.histogram(Bars((0.0, 9.0, 99.0, 9.0), 0.0, 4.0), "t", "c")
    path = re.search(r' d="M0 86([^"]*)Z"', picture).group(1)
    heights, edges = (np.asarray([float(n) for n in re.findall(rf"{key}([0-9.]+)", path)]) for key in "VH")
    assert list(edges) == [80.0, 160.0, 240.0, 320.0]
    np.testing.assert_allclose((86 - heights[:4]) / 78, np.log([1, 10, 100, 10]) / np.log(100), atol=1e-3)
    assert "clip" not in picture


def test_what_a_grid_cuts_off_is_shaded():
    picture = charts.histogram(Bars((1.0,) * 8, -2.0, 6.0), "t", "c", (0.0, 4.0))
    beyond = re.findall(r'<rect class="beyond" x="([0-9.]+)" y="0" width="([0-9.]+)"', picture)
    assert beyond == [("0", "80"), ("240", "80")]
    assert [float(x) for x in re.findall(r'class="clip" x1="([0-9.]+)"', picture)] == [80.0, 240.0]
    assert '<text x="80" y="100" text-anchor="middle">0</text>' in picture


def test_a_bar_is_full_at_sixty_decibels_and_empty_at_none():
    widths = {sqnr: numbers(charts.bar(sqnr), "width")[1] for sqnr in (30.0, 60.0, 90.0, -3.0, math.inf)}
    assert widths == {30.0: 50.0, 60.0: 100.0, 90.0: 100.0, -3.0: 0.0, math.inf: 100.0}
    assert numbers(charts.bar(None), "width")[1] == 0.0
    assert "dx" in charts.bar(None)


def test_a_whisker_spans_its_interval():
    picture = charts.whisker(Interval(0.5, 0.25, 0.75), 0.0, 1.0, "t", mark=1.0)
    line = re.search(r'class="interval" x1="([0-9.]+)" x2="([0-9.]+)" y1="10"', picture)
    assert line.groups() == ("52", "148")
    assert numbers(picture, "cx") == [100.0]
    assert re.search(r'class="mark" x1="196"', picture)


def test_points_rise_with_their_value_and_go_right_with_their_size():
    points = [
        charts.Point(100.0, 1.0, "a"),
        charts.Point(200.0, 100.0, "b", chosen=True),
        charts.Point(300.0, 10.0, "c"),
    ]
    picture = charts.scatter(points, "t", ("x", "y"), joined=2, log=True)
    xs, ys = numbers(picture, "cx"), numbers(picture, "cy")
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert xs[0] < xs[1]
    assert ys[0] - ys[1] == pytest.approx(2 * (ys[2] - ys[1]), abs=0.3)
    assert ys[1] < ys[2] < ys[0]
    assert re.search(r'points="([^"]+)"', picture).group(1).split()[1] == f"{xs[1]},{ys[1]}".replace(".0,", ",")
    assert 'r="8"' in picture
    lone = charts.scatter([charts.Point(5.0, 0.0, "a")], "t", ("x", "y"))
    assert 74 < numbers(lone, "cx")[0] < 616


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_text_is_escaped_once_wherever_it_stands(content, value):
    made = tag("p.a.b", content, ["x", None, tag("b", content)], title=value)
    assert made.startswith('<p class="a b" title="')
    escaped = join(content)
    assert "<" not in escaped
    assert made.count(escaped + "x<b>" + escaped + "</b></p>") == 1
    assert '"' not in made.split('title="')[1].split('">')[0]


def test_attributes_are_left_out_stand_alone_or_have_values():
    assert tag("input", disabled=True, hidden=False, name=None, aria_label="a", for_="b", size=0) == (
        '<input disabled aria-label="a" for="b" size="0">'
    )
    assert section("a", "Heading", "", None) == ""
    assert isinstance(section("a", "Heading", "text"), Html)


def test_table_cells_know_their_heading():
    made = table(("One", "Two"), [("a", "b")], "caption")
    assert '<th scope="row">a</th><td data-label="Two">b</td>' in made
    with pytest.raises(ValueError, match="zip"):
        table(("One", "Two"), [("a",)], "caption")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (words.size(999), "999 B"),
        (words.size(1234567), "1.2 MB"),
        (words.size(5.2e9), "5.20 GB"),
        (words.decibels(None), "not measured"),
        (words.decibels(math.inf), "exact"),
        (words.decibels(-math.inf), "lost"),
        (words.number(-0.012345), "\N{MINUS SIGN}0.01235"),
        (words.short(-1.26e-5), "\N{MINUS SIGN}1.3e-05"),
        (words.millions(26_610_000), "26.61 M"),
        (words.times(1, "row", "rows"), "1 row"),
        (words.between(Interval(0.5, 0.25, 0.756)), "95 % CI 25.0 to 75.6 %"),
    ],
)
def test_figures_are_written_as_people_read_them(found, said):
    assert found == said
