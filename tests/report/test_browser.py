"""Pages in a real browser, where there is one: its policy lets the page's own parts work, and nothing is wrong."""

import json
import shutil
import subprocess

import pytest
from pages import details, summary

from onnxq.report import html_compare, html_report, quantize_document, to_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FRONT = ((300_000.0, 0.001), (100_000.0, 0.1))
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def opened(page, folder, width):
    """(what the page became, what the console says)."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
    logged = ["--enable-logging=stderr", f"--window-size={width},900"]
    command = [CHROMIUM, *options, *logged, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_report_works_without_a_word_on_the_console(tmp_path):
    page = html_report(summary(), details(front=FRONT, chosen=FRONT[0], outlier_rows=8))
    after, console = opened(page, tmp_path, 400)
    assert console == []
    assert page.count("<button") == 0
    assert after.count('<button type="button">') == 6
    assert 'type="search"' in after


def test_a_comparison_works_without_a_word_on_the_console(tmp_path):
    document = json.loads(to_json(quantize_document(summary())))
    _, console = opened(html_compare([document, document]), tmp_path, 1200)
    assert console == []


def test_the_console_would_say_what_the_policy_forbids(tmp_path):
    page = html_report(summary(), details()).replace('"use strict";', '"use strict"; ')
    after, console = opened(page, tmp_path, 1200)
    assert any("Content Security Policy" in line for line in console)
    assert "<button" not in after
