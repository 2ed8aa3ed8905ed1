"""The feel of the command line: hints, completion, examples, pipes, comparisons, outliers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import proto, weights

from onnxq.cli.common import left
from onnxq.cli.main import _run as run
from onnxq.cli.main import group

ROOT = Path(__file__).parent.parent
TEXT = """g (float[N,6] x, float[6,8] w, float[8,4] v) => (float[N,4] y) {
    [first] h = MatMul(x, w) i = Relu(h) [second] y = MatMul(i, v)
}"""
LOUD = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, rows and labelled rows; runs start there."""
    folder = tmp_path_factory.mktemp("terminal")
    w = weights(6, 8)
    w[:, LOUD] *= 40
    onnx.save(proto(TEXT, w=np.abs(w), v=weights(8, 4)), folder / "net.onnx")
    rows = np.abs(weights(64, 6))
    np.savez(folder / "rows.npz", x=rows)
    np.savez(folder / "labelled.npz", x=rows, label=np.arange(64) % 4)
    return folder


def arguments(files, *more):
    return ["quantize", str(files / "net.onnx"), "--data", str(files / "rows.npz"), "--no-timing", *more]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize("command", sorted(group.commands))
def test_every_help_has_examples_with_options_that_exist(command, capsys):
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    options = {name for option in group.commands[command].params for name in option.opts}
    for line in shown.split("Examples:")[1].splitlines():
        words = line.split()
        if words[:2] == ["onnxq", command]:
            assert {word for word in words if word.startswith("-")} <= options, line
    assert f"onnxq {command}" in shown.split("Examples:")[1]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["quantise", "m.onnx"], "quantize"),
        (["quantize", "m.onnx", "--dta", "d"], "--data"),
        (["compare", "--reprot", "x"], "--report"),
        (["inspect", "m.onnx", "--outlier"], "--outliers"),
    ],
)
def test_mistyped_commands_and_options_get_a_hint(words, hint, capsys):
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "Did you mean" in said
    assert f"'{hint}'" in said.split("Did you mean")[1]


def test_the_shell_completes_commands_and_options():
    code = "from onnxq.cli import main; main()"
    script = python(code, _ONNXQ_COMPLETE="bash_source")
    assert b"complete -o nosort -F _onnxq_completion onnxq" in script.stdout
    found = python(code, _ONNXQ_COMPLETE="bash_complete", COMP_WORDS="onnxq quant", COMP_CWORD="1")
    assert found.stdout.split() == [b"plain,quantize"]
    found = python(code, _ONNXQ_COMPLETE="bash_complete", COMP_WORDS="onnxq compare --re", COMP_CWORD="2")
    assert found.stdout.split() == [b"plain,--report"]


def test_a_pipe_gets_plain_lines(files, tmp_path):
    words = arguments(files, "-o", str(tmp_path / "q.onnx"), "-v")
    code = f"from onnxq.cli import main; main({words!r})"
    done = python(code, FORCE_COLOR="", TERM="xterm-256color", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        assert b"\x1b" not in stream
        assert b"\r" not in stream
    assert b"Calibrating ..." in done.stderr
    assert b"Calibrating" not in done.stdout
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["layer", "op", "bits", "SQNR", "behind", "it", "its", "weights", "its", "input", "work"]
    assert lines[1].split()[:3] == ["first", "MatMul", "w8a8"]
    quiet = python(f"from onnxq.cli import main; main({[*words, '-q']!r})")
    assert quiet.stderr == b""


def test_outliers_are_shown(files, capsys):
    words = ["inspect", str(files / "net.onnx"), "--outliers", "--data", str(files / "rows.npz")]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["outliers"]
    assert [one["index"] for one in found["i"]["channels"]] == [LOUD]
    assert found["x"]["channels"] == []
    assert run([*words, "-q"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("i "))
    assert line.split()[1] == str(LOUD)
    assert run([*words, "--samples", "1", "-q"]) == 0
    capsys.readouterr()
    assert run(words[:3]) == run([*words[:2], "--data", str(files / "rows.npz")]) == 2
    assert "--outliers and --data go together" in capsys.readouterr().err


def test_reports_of_runs_are_compared(files, tmp_path, capsys):
    reports = []
    for preset in ("fast", "w2a8"):
        reports.append(str(tmp_path / f"{preset}.html"))
        more = ["--preset", preset, "--report", reports[-1], "--eval", str(files / "labelled.npz"), "-q"]
        assert (
            run(
                arguments(
                    files,
                    "-o",
                    str(tmp_path / f"{preset}.onnx"),
                    *more,
                    "--first-last",
                    preset[1] if preset != "fast" else "8",
                )
            )
            == 0
        )
    capsys.readouterr()
    page = tmp_path / "compared.html"
    assert run(["compare", *reports, "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "1: fast.onnx" in shown
    assert "2: w2a8.onnx: top-1" in shown
    assert "McNemar p = " in shown
    assert "2 runs compared" in page.read_text(encoding="utf-8")
    assert run(["compare", reports[0]]) == 2
    assert "two reports or more" in capsys.readouterr().err
    assert run(["compare", *reports, "--report", reports[0]]) == 2
    assert run(["compare", reports[0], str(files / "rows.npz")]) == 3


def test_the_recipe_of_an_earlier_file_can_be_used_again(files, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('preset = "fast"\n[[layers]]\nmatch = "sec*"\nweights.bits = 5\n')
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    assert run(arguments(files, "-o", str(first), "--recipe", str(recipe), "--save-recipe", "-q")) == 0
    for source in (first, f"{first}.toml"):
        assert run(arguments(files, "-o", str(again), "--recipe", str(source), "-q")) == 0
        assert again.read_bytes() == first.read_bytes()
    assert run(arguments(files, "-o", str(again), "--recipe", str(files / "net.onnx"), "-q")) == 3
    assert "records no recipe" in capsys.readouterr().err
    recipe.write_text('[[layers]]\nmtch = "a"\n')
    assert run(arguments(files, "-o", str(again), "--recipe", str(recipe), "-q")) == 3
    assert "[[layers]] has no key 'mtch'. Did you mean 'match'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds", "said"),
    [
        ("3 of 8 points", 30.0, ", about 50 s left"),
        ("block 1 of 4, 7 of 9, error 0.1", 100.0, ", about 5 min left"),
        ("8 of 8", 30.0, ""),
        ("0 of 8", 30.0, ""),
        ("3 of 8", 1.0, ""),
        ("37 rows", 30.0, ""),
    ],
)
def test_the_time_left_is_told_from_the_part_that_is_done(text, seconds, said):
    assert left(text, seconds) == said
