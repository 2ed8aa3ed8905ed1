"""Writes docs/cli.md, the command line's reference, from the commands themselves: python docs/cli_reference.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from onnxq.cli.main import group

PAGE = Path(__file__).with_name("cli.md")


HEAD = """\
# Command line

`onnxq COMMAND --help` prints the same. Exit codes: 0 done; 1 a bug of ours; 2 usage; 3 the model or the data cannot be
read; 4 nothing can be quantized; 5 the target asked for cannot be met; 6 the environment; 130 and 143 interrupted.

Shell completion: `eval "$(_ONNXQ_COMPLETE=bash_source onnxq)"`, or `zsh_source`, `fish_source`.
"""


def reference() -> str:
    """The page."""
    lines = [HEAD.rstrip()]
    for name, command in group.commands.items():
        lines += ["", *_command(name, command)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    shown = [f"{(param.name or '').upper()}{'...' if param.nargs != 1 else ''}" for param in arguments]
    required = [f"{param.opts[-1]} {_takes(param)}" for param in options if param.required]
    yield from (f"## onnxq {name}", "", "```", " ".join(["onnxq", name, *shown, *required, "[OPTIONS]"]), "```", "")
    yield inspect.cleandoc(command.help or "")
    if command.epilog:
        examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("onnxq ")]
        yield from ("", "```sh", *examples, "```")
    yield from ("", "| option | what it does |", "| --- | --- |")
    for param in options:
        names = ", ".join((*param.opts, *param.secondary_opts))
        yield f"| `{' '.join((names, _takes(param))).strip()}` | {_cell(param)} |"


def _takes(option: click.Option) -> str:
    """What stands behind the option."""
    if option.is_flag:
        return ""
    if option.metavar:
        return option.metavar.replace("|", "\\|")
    if isinstance(option.type, click.Choice):
        return "\\|".join(map(str, option.type.choices))
    words = {"integer": "N", "integer range": "N", "float": "X", "path": "PATH"}
    return words.get(option.type.name, option.type.name.upper())


def _cell(option: click.Option) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    default = f" (default {option.default})" if option.show_default and option.default is not None else ""
    return text.removesuffix(".") + default + "." if default else text


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
