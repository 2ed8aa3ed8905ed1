"""Runs side by side: figures, what may be called a difference, and what the recipes and plans differ in."""

import io
import json

import pytest
from pages import NASTY, Page, details, evaluation, latency, plan, summary, verdict
from rich.console import Console

from onnxq.errors import InputError, UsageError
from onnxq.report import html_compare, html_report, print_compare, quantize_document, read_run, to_json
from onnxq.report.comparing import judged
from onnxq.types import Fidelity, Interval, PerRow, WeightGrid


def document(**changes):
    return json.loads(to_json(quantize_document(summary(**changes))))


def row(page, first):
    return next(row for table in page.tables for row in table if row[0] == first)


@pytest.fixture(scope="module")
def page():
    second = summary(
        output=f"/b/{NASTY}.onnx",
        recipe={"preset": "fast", "weight_bits": 8, "per_channel": True, "keep_float": ("a*",), "max_size": ""},
        plan=plan(weights={}, skipped={"conv": "keep"}),
        verdict=verdict(
            quantized_bytes=1_000_000,
            fidelity=Fidelity(16, {"y": float("inf")}, Interval(0.85, 0.8, 0.89)),
            latency=(latency("f", 2.0), latency("q", 0.6, Interval(0.3, 0.28, 0.33))),
            warnings=(),
        ),
        evaluation=evaluation(0.86, 0.01),
    )
    return Page(
        html_compare([document(evaluation=evaluation(0.9, 0.5)), json.loads(to_json(quantize_document(second)))])
    )


def test_every_figure_stands_beside_the_others(page):
    assert row(page, "Size")[1:] == ["1.2 MB31.2 % of float", "1.0 MB25.0 % of float"]
    assert row(page, "SQNR")[1:] == ["31.2 dB", "exact"]
    assert row(page, "Integer coverage")[1:] == ["80.0 %", "80.0 %"]
    assert row(page, "Top-1")[2] == "86.0 % (83.0 to 88.0)inside the noise"
    assert row(page, "Agreement")[1:] == ["97.5 % (90.0 to 99.5)", "85.0 % (80.0 to 89.0)worse than run 1"]
    assert row(page, "Latency, of float")[2] == "30.0 % (28.0 to 33.0)better than run 1"


def rows_of(text, digest="b" * 64):
    share = text.count("1") / len(text)
    agreement = Interval(share, max(share - 0.1, 0), min(share + 0.1, 1))
    return verdict(fidelity=Fidelity(len(text), {"y": 20.0}, agreement, PerRow(digest, text)))


def test_runs_on_the_same_rows_are_compared_row_by_row():
    one = summary(evaluation=evaluation(0.9, 0.5, "1" * 20 + "0" * 8), verdict=rows_of("1" * 12))
    two = summary(evaluation=evaluation(0.86, 0.5, "1" * 12 + "0" * 8 + "1" * 8), verdict=rows_of("1" * 3 + "0" * 9))
    documents = [json.loads(to_json(quantize_document(run))) for run in (one, two)]
    page = Page(html_compare(documents))
    assert "inside the noise (+0.00 points" in row(page, "Top-1")[2]
    assert "8 rows gained, 8 lost, McNemar p = 1)" in row(page, "Top-1")[2]
    # 0 of the 9 rows that differ: 2 / 2^9
    assert "75.00 points WORSE" in row(page, "Agreement")[2]
    assert "0 rows gained, 9 lost, McNemar p = 0.0039)" in row(page, "Agreement")[2]
    turned = Page(html_compare(documents[::-1]))
    assert "75.00 points better" in row(turned, "Agreement")[2]
    others = json.loads(to_json(quantize_document(summary(verdict=rows_of("1" * 3 + "0" * 9, "c" * 64)))))
    assert "worse than run 1" in row(Page(html_compare([documents[0], others])), "Agreement")[2]


def test_the_terminal_says_the_same():
    out = io.StringIO()
    documents = [document(verdict=rows_of("1" * 12)), document(verdict=rows_of("1" * 3 + "0" * 9), output="b.onnx")]
    print_compare(Console(file=out, width=200), documents)
    lines = out.getvalue().splitlines()
    assert lines[1].split()[:6] == ["1:", "net.int8.onnx", "1.2", "MB", "31.2", "%"]
    assert "25.0 % (15.0 to 35.0)" in lines[2]
    assert lines[-1].startswith("  2: b.onnx: agreement 75.00 points WORSE (95 % CI ")
    assert lines[-1].endswith("McNemar p = 0.0039); latency inside the noise")
    out.truncate(0)
    print_compare(Console(file=out, width=200), [document(), document(source="/other.onnx")])
    assert "none is called better than another" in out.getvalue()
    assert "against run 1" not in out.getvalue()
    out.truncate(0)
    print_compare(Console(file=out, width=200), [document(verdict=None), document(verdict=None)])
    assert "nothing was measured" in out.getvalue()


def test_reports_and_documents_can_be_read_back(tmp_path):
    run = summary(source=f"/a/{NASTY}")
    expected = json.loads(to_json(quantize_document(run)))
    page, plain, other = (tmp_path / name for name in ("r.html", "r.json", "other.json"))
    page.write_text(html_report(run, details()), encoding="utf-8")
    plain.write_text(to_json(quantize_document(run)), encoding="utf-8")
    assert read_run(page) == read_run(plain) == expected
    for text in ("{", "[]", '{"kind": "benchmark", "schema": 1}', "<html></html>"):
        other.write_text(text)
        with pytest.raises(InputError, match=r"other.json is neither a report nor a JSON document"):
            read_run(other)
    with pytest.raises(InputError, match="cannot be read"):
        read_run(tmp_path / "missing")


def test_only_what_differs_in_recipes_and_bits_is_listed(page):
    fields = next(table for table in page.tables if table[0][0] == "Field")
    assert fields[1:] == [["preset", "balanced", "fast"]]
    assert row(page, "conv")[1:] == ["W8", "float"]
    assert row(page, "1: net.int8.onnx")[1] == f"mind {NASTY}"
    same = Page(html_compare([document(), document()]))
    assert "All runs had the same recipe." in same.text
    assert "All layers have the same weight bits" in same.text


def test_the_page_is_well_formed_and_escaped(page):
    assert "<script>alert" not in html_compare([document(), document(output=NASTY)])
    assert {link.removeprefix("#") for link in page.links if link != "data:,"} <= set(page.ids)


@pytest.mark.parametrize(
    ("other", "rising", "said"),
    [
        (Interval(0.95, 0.9, 0.99), True, "inside the noise"),
        (Interval(0.8, 0.7, 0.85), True, "inside the noise"),
        (Interval(0.97, 0.96, 0.99), True, "better than run 1"),
        (Interval(0.97, 0.96, 0.99), False, "worse than run 1"),
        (Interval(0.7, 0.6, 0.8), True, "worse than run 1"),
        (Interval(0.7, 0.6, 0.8), False, "better than run 1"),
    ],
)
def test_a_difference_needs_intervals_that_do_not_overlap(other, rising, said):
    assert judged(Interval(0.9, 0.85, 0.95), other, rising=rising) == said


def test_runs_of_different_models_are_not_ranked():
    bad = verdict(fidelity=Fidelity(16, {"y": 3.0}, Interval(0.1, 0.05, 0.2)))
    page = Page(html_compare([document(), document(source="/other/net2.onnx", verdict=bad)]))
    assert "Of different models (net.onnx, net2.onnx)" in page.text
    assert "than run 1" not in page.text


def test_dry_runs_can_be_compared_by_their_plans():
    wide = plan(weights={"conv": WeightGrid((0.1,), None, bits=4)})
    page = Page(html_compare([document(verdict=None, output=None), document(verdict=None, output=None, plan=wide)]))
    assert row(page, "conv") == ["conv", "W8", "W4"]
    assert "2: balanced (dry run)" in page.text
    assert "Agreement" not in page.text


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([document()], "two reports or more"),
        ([document(), {"kind": "benchmark", "schema": 1}], "report 2 is no document"),
        ([document() | {"schema": 99}, document()], "report 1 is no document"),
    ],
)
def test_anything_else_is_refused(reports, message):
    with pytest.raises(UsageError, match=message):
        html_compare(reports)
