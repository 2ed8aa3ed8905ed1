"""The report of one run: what it says, that it stands alone, and that names cannot break it."""

import base64
import hashlib
import json
import math
import re
import tomllib
from dataclasses import replace
from itertools import pairwise

import pytest
from pages import FLAT, NASTY, Page, details, evaluation, latency, layer, summary, verdict

from onnxq.report import html_report
from onnxq.types import Interval, TuningStep
from onnxq.types.outliers import Outlier, TensorOutliers

COMMAND = "onnxq quantize net.onnx --data 'my photos'"


@pytest.fixture(scope="module")
def text():
    more = details(
        sensitivity={"conv": {"w4a8": 0.1, "w2a8": 10.0}, NASTY: {"w4a8": -0.5}},
        front=((100_000.0, 0.5), (200_000.0, 0.001)),
        chosen=(200_000.0, 0.001),
    )
    return html_report(summary(), more, command=COMMAND)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def cells(page, first):
    """The row of any table whose first cell begins with `first`."""
    return next(row for table in page.tables for row in table if row and row[0].startswith(first))


def test_the_page_stands_alone(text, page):
    assert text.startswith("<!DOCTYPE html>")
    assert not [found for _, found in page.elements if "src" in found or "srcset" in found]
    assert "://" not in re.sub(r"http-equiv", "", text)
    assert "@import" not in text
    assert "url(" not in text
    assert len(page.ids) == len(set(page.ids))
    inner = [link for link in page.links if link != "data:,"]
    assert inner
    assert {link.removeprefix("#") for link in inner} <= set(page.ids)
    assert not [found for _, found in page.elements if "style" in found or any(key.startswith("on") for key in found)]


def test_the_policy_lets_nothing_in_but_the_pages_own_style_and_script(text, page):
    policy = next(found["content"] for _, found in page.elements if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    for kind in ("style", "script"):
        inside = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="document">', "<script>"]


def test_names_cannot_become_markup(text, page):
    assert "<script>alert" not in text
    assert page.text.count(NASTY) >= 5


def test_pages_work_for_keyboards_and_screen_readers(page):
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 2 for before, after in pairwise(levels))
    assert [found["lang"] for name, found in page.elements if name == "html"] == ["en"]
    assert len([1 for name, _ in page.elements if name == "caption"]) == len(page.tables)
    for name, found in page.elements:
        if name == "svg":
            assert found.get("aria-hidden") == "true" or (found["role"] == "img" and found["aria-label"])
        if name == "th":
            assert found["scope"] in ("col", "row")
        if found.get("class") == "scroll":
            assert found["tabindex"] == "0"


def test_the_verdict_is_in_the_first_sentence(page):
    assert "3.20x smaller, 4.0 MB to 1.2 MB; latency: 2.00x faster (95 % CI 1.82-2.22); the same class " in page.text
    assert "the same class on 97.5 % of 16 held-out rows (95 % CI 90.0 to 99.5 %)." in page.text
    assert "31.2 dB" in page.text
    assert "80.0 %" in page.text
    assert f"mind {NASTY}" in page.text


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Interval(0.97, 0.9, 1.05), "no difference"),
        (Interval(1.4, 1.3, 1.5), "1.40x SLOWER"),
    ],
)
def test_a_latency_inside_the_noise_is_no_gain(ratio, said):
    found = verdict(latency=(latency("f", 2.0), latency("q", 1.9, ratio)))
    page = Page(html_report(summary(verdict=found), details()))
    assert f"latency: {said}" in page.text
    assert "faster" not in page.text


@pytest.mark.parametrize(
    ("value", "p_value", "said"),
    [
        (0.94, 0.2, "against the float model inside the noise (+4.00 points, 95 % CI +1.0 to +9.0, 7 rows gained"),
        (
            0.94,
            0.01,
            "against the float model 4.00 points better (95 % CI +1.0 to +9.0, 7 rows gained, 3 lost, McNemar",
        ),
        (0.88, 0.04, "against the float model 2.00 points WORSE (95 % CI -5.0 to +3.0, 7 rows gained, 3 lost, McNemar"),
    ],
)
def test_an_accuracy_is_told_with_its_paired_test(value, p_value, said):
    page = Page(html_report(summary(evaluation=evaluation(value, p_value)), details()))
    assert page.text.count(said) == 2
    assert f"95 % CI {100 * value - 3:.1f} to {100 * value + 2:.1f} %, 200 labelled rows" in page.text


def test_a_file_that_did_not_shrink_is_not_called_smaller():
    page = Page(html_report(summary(verdict=verdict(quantized_bytes=4_100_000)), details()))
    assert "Not smaller: 4.0 MB to 4.1 MB" in page.text
    assert "x smaller" not in page.text


def test_a_dry_run_says_that_nothing_was_measured():
    page = Page(html_report(summary(verdict=None, output=None), details()))
    assert "A dry run" in page.text
    assert "not written" in page.text
    assert "verdict" not in page.ids
    assert "Nothing: every node" not in page.text


def test_the_table_shows_every_layer(page):
    row = cells(page, "conv")
    assert row == ["convConv in stem", "W4 A8tuned", "8 x 3 x 3 x 5", "1.4 KB to 400 B", "24.5 dB",
                   "75.0 %750 MACs", "integers"]  # fmt: skip
    row = cells(page, NASTY)
    assert row[1:] == ["float", "-", "-", "not measured", "25.0 %250 MACs", "float: both are computed"]
    keys = [found for _, found in page.elements if "data-sqnr" in found]
    assert [found["data-sqnr"] for found in keys] == ["24.5", ""]


def test_a_layer_that_the_runtime_left_in_float_says_so():
    missed = replace(verdict().coverage, floats=(replace(verdict().coverage.floats[0], name="conv", reason="odd"),))
    page = Page(html_report(summary(verdict=verdict(coverage=missed)), details()))
    assert cells(page, "conv")[-1] == "float, though planned in integers: odd"


def test_histograms_say_what_they_show(page):
    assert "widest grid ±1.25, SQNR of rounding alone 33.3 dB; channel 5 is 7.5x as wide as the median one" in page.text
    assert "x: range -0.5 to 1.25 (mse), seen -1 to 1.75; 1.250 % of the values clipped; SQNR of rounding alone 41.5" \
           in page.text  # fmt: skip
    assert "3 of 3 codes occur" in page.text
    assert len(page.named("svg", "histogram")) == 3


def test_the_map_colours_layers_by_error():
    levels = [9.9, 10.0, 29.9, 39.0, 40.0, math.inf]
    found = details(layers=tuple(layer(f"l{index}", sqnr_db=sqnr) for index, sqnr in enumerate(levels)))
    page = Page(html_report(summary(), found))
    boxes = page.named("a", "cell")
    assert [box["class"].split()[-1] for box in boxes] == ["d0", "d1", "d2", "d3", "d4", "d4"]
    assert [box["href"] for box in boxes] == [f"#layer-{index}" for index in range(6)]
    assert boxes[0]["title"] == "l0: W4 A8, 9.9 dB"
    worst = page.text.split("furthest from the float one.")[1].split("SQNR compares")[0]
    assert re.findall(r"l\d", worst) == ["l0", "l1", "l2"]
    assert "rounding its weights alone leaves 33.3 dB" in worst


def test_what_stayed_float_is_grouped_by_reason(page):
    rows = next(table for table in page.tables if table[0] == ["Nodes", "Why", "Work"])
    assert rows[1:] == [[NASTY, "both are computed", "20.0 %"]]
    assert "1 more node without work" in page.text
    listed = [row[0] for table in page.tables if table[0][0] == "Nodes" for row in table[1:]]
    assert sorted(listed) == [NASTY, "mask"]
    assert cells(page, "mask")[1] == "it works on shapes or masks"


def test_tuning_shows_errors_before_and_after(page):
    assert "1 of 2 steps were kept" in page.text
    assert cells(page, "stem")[1:] == ["adaquant", "5.00e-01", "2.00e-01", "-60.0 %", "kept", "3.0 s"]
    assert cells(page, "head")[1:] == ["adaround", "2.50e-01", "3.00e-01", "+20.0 %", "dropped", "4.0 s"]


def test_sensitivities_and_the_front_are_shown_where_they_are_known(page):
    heat = [found["class"].split()[-1] for found in page.named("span", "heat")]
    assert heat == ["h0", "h4", "h0"]
    assert next(table[0][1:] for table in page.tables if table[0][-1] == "w2a8") == ["w4a8", "w2a8"]
    assert len(page.named("circle", "chosen")) == 1
    assert cells(page, "200.0 KB")[1:] == ["0.001", "yes"]
    plain = Page(html_report(summary(blocks=()), details()))
    assert not {"sensitivity", "front", "tuning"} & set(plain.ids)


def test_everything_needed_to_do_it_again_is_there(text, page):
    assert COMMAND in page.text
    recipe = page.text[page.text.index('preset = "balanced"') :].split("Data")[0]
    assert tomllib.loads(recipe) == {"preset": "balanced", "weight_bits": 8, "per_channel": True, "keep_float": ["a*"]}
    for shown in ("preprocess.mean", "0.5, 0.25", "rows that calibrated", "112", "/models/net.int8.onnx"):
        assert shown in page.text
    assert "resize" not in page.text
    assert "FoldBatchNorm" in page.text


def test_a_single_bin_and_an_empty_model_make_a_page():
    flat = replace(FLAT, counts=(0.0,), low=0.0, high=0.0)
    odd = layer(weight=replace(layer().weight, values=flat, codes=flat, clip=(0.0, 0.0)))
    Page(html_report(summary(), details(layers=(odd,))))
    empty = Page(html_report(summary(), details(layers=(), tensors={}, passes=())))
    assert not {"map", "layers", "worst", "rewrites"} & set(empty.ids)


def outliers():
    loud = tuple(Outlier(index, 8.0 * (9 - index), 4.5 * (9 - index), 7.0) for index in range(8))
    return {"x": TensorOutliers(loud, (), 32), NASTY: TensorOutliers((), (Outlier(11, 90.0, 12.3, 9.0),), 4)}


def test_outliers_are_named_with_the_layers_that_read_them():
    page = Page(html_report(summary(), details(outliers=outliers(), outlier_rows=64)))
    table = next(table for table in page.tables if table[0][0] == "Tensor")
    assert table[1][:2] == ["x", f"conv, {NASTY}"]
    assert table[1][2].startswith("8 of 320: 40.5x the median, up to 72")
    assert table[1][2].endswith("5: 18x the median, up to 32and 2 more")
    assert table[1][3] == "-"
    assert table[2] == [NASTY, "-", "-", "11: 12.3x the median, up to 90"]
    assert "Looked for in 64 calibration rows" in page.text
    quiet = Page(html_report(summary(), details(outlier_rows=64)))
    assert "No channel and no sample stands out in 64 calibration rows." in quiet.text
    assert "Outliers" not in Page(html_report(summary(), details())).text


def test_stages_of_tuning_are_judged_at_the_outputs():
    steps = (TuningStep("weights", 0.5, 0.125, True), TuningStep("biases", 0.125, 0.25, False))
    page = Page(html_report(summary(steps=steps, blocks=()), details()))
    table = next(table for table in page.tables if table[0][0] == "Stage")
    assert table[1:] == [
        ["weights", "5.00e-01", "1.25e-01", "-75.0 %", "kept"],
        ["biases", "1.25e-01", "2.50e-01", "+100.0 %", "dropped"],
    ]
    assert "Block by block" not in page.text
    assert "Tuning" not in Page(html_report(summary(blocks=()), details())).text


def test_what_was_taken_may_lie_beside_the_front():
    front = ((300.0, 0.001), (100.0, 0.1))
    text = html_report(summary(), details(front=front, chosen=(200.0, 0.05)))
    corners = re.search(r'<polyline[^>]* points="([^"]+)"', text).group(1).split()
    assert len(corners) == 2
    page = Page(text)
    table = next(table for table in page.tables if table[0][0] == "Size")
    assert [row[2] for row in table[1:]] == ["", "yes", ""]
    assert "The ring is the one that was taken." in page.text
    assert len(page.named("circle", "chosen")) == 1
    on = Page(html_report(summary(), details(front=front, chosen=front[1])))
    assert [row[2] for row in next(t for t in on.tables if t[0][0] == "Size")[1:]] == ["yes", ""]


def test_the_page_carries_the_document_without_an_end_tag_in_it():
    text = html_report(summary(source=NASTY), details())
    inside = re.search(r'<script type="application/json" id="document">(.*?)</script>', text, re.DOTALL).group(1)
    assert "<" not in inside
    assert json.loads(inside)["source"] == NASTY
