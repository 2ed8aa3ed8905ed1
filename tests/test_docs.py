"""The pages: every link leads somewhere, every command and option exists, the reference is current."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from onnxq.cli.main import group

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]


def name_of(path):
    return str(path.relative_to(DOCS))


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(text):
    """Everything that the page tells to type, continued lines joined."""
    text = text.replace("\\\n", " ")
    shown = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    shown += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in shown:
        line = re.split(r" {3,}", line.replace("\\|", "|").removeprefix("$ "))[0]  # a remark may stand behind
        if line.startswith("onnxq ") and (words := shlex.split(line, comments=True))[1:]:
            yield words[1], words[2:]


def test_the_reference_of_the_command_line_is_current():
    spec = importlib.util.spec_from_file_location("cli_reference", DOCS / "cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.reference(), "run: python docs/cli_reference.py"


def test_the_site_lists_every_page_and_no_other():
    assert sorted(re.findall(r": (\S+\.md)$", NAV, re.M)) == sorted(map(name_of, PAGES))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        page, _, anchor = link.partition("#")
        target = (path.parent / page).resolve() if page else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(path):
    for name, words in commands(path.read_text(encoding="utf-8")):
        if name.startswith("-") or not name.islower():
            continue
        command = group.commands.get(name)
        assert isinstance(command, click.Command), f"onnxq {name}"
        known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known, f"onnxq {name}: {used - known}"


def test_extras_that_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in PAGES:
        for listed in re.findall(r"onnxq\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(listed.split(",")) <= set(extras), path
