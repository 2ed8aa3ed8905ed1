"""House rules that a linter does not know."""

import ast
import re
from pathlib import Path

import pytest

from onnxq.cli.main import group

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "onnxq").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 300, 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_screen(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name


def test_the_readme_names_every_command_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `onnxq (\w+)", readme, re.MULTILINE))
    assert named == set(group.commands)


def test_the_readme_shows_existing_files_and_options():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((docs/[\w-]+\.md)\)", readme):
        assert (ROOT / link).is_file(), link
    command = next(line for line in readme.splitlines() if "onnxq quantize models/" in line)
    for part in re.findall(r"(?:models|calibration_data)/\S+", command):
        assert (ROOT / part).exists(), part
    options = {name for option in group.commands["quantize"].params for name in option.opts}
    assert set(re.findall(r" (--?[a-z-]+)", command.split("onnxq quantize")[1])) <= options


def test_the_recipe_page_lists_every_field():
    from dataclasses import fields

    from onnxq.recipe import Recipe

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = page.split("```")[1]
    assert set(re.findall(r"^(\w+) = ", shown, re.MULTILINE)) == {field.name for field in fields(Recipe)}


def test_the_command_line_knows_every_named_preprocessing():
    from onnxq.calibrate import PREPROCESS
    from onnxq.cli.common import PREPROCESS_NAMES

    assert set(PREPROCESS_NAMES) == set(PREPROCESS)
