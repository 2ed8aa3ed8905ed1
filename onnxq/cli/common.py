"""What the commands share: options, progress, and the consoles."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from onnxq.calibrate import Preprocess

F = TypeVar("F", bound=Callable[..., Any])
_PART = re.compile(r"(\d+) of (\d+)")
PREPROCESS_NAMES = ("unit", "signed", "raw", "imagenet", "imagenet-caffe", "inception", "clip")


def numbers(_context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Parse `0.5` or `0.485,0.456,0.406`."""
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or a comma-separated list", param=option) from None


def integers(_context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse `1` or `1,4`."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a whole number or a comma-separated list", param=option) from None


def image_options(function: F) -> F:
    """Options that say how images become inputs."""
    options = [
        click.option("--preprocess", "named", metavar="NAME", help="Named preprocessing of images: "
                     + ", ".join(PREPROCESS_NAMES) + "."),
        click.option("--mean", callback=numbers, metavar="M[,M,M]", help="Subtracted after scaling, per channel."),
        click.option("--std", callback=numbers, metavar="S[,S,S]", help="Divided by, per channel."),
        click.option("--resize", callback=numbers, metavar="N|H,W", help="Short side in pixels, or the part of it that "
                     "the centre crop keeps (0.875), or H,W."),
        click.option("--scale", type=float, help="Pixel multiplier (default 1/255)."),
        click.option("--channels", type=click.Choice(["rgb", "bgr", "gray"]), help="Channel order of the model."),
        click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="When it cannot be told from the input."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def backend_option(function: F) -> F:
    """The option that says where independent jobs run."""
    words = "Where jobs run: local (processes), dask://host:port or ray://host:port. The result is the same."
    option = click.option("--backend", default="local", show_default=True, metavar="WHERE", help=words)
    return option(function)


def preprocess_of(
    named: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    resize: tuple[float, ...] | None,
    scale: float | None,
    channels: str | None,
    layout: str | None,
) -> Preprocess | None:
    """The preprocessing that the image options describe; None when none was given."""
    from dataclasses import replace

    from onnxq.calibrate import PREPROCESS, Preprocess
    from onnxq.errors import UsageError

    if named is not None and named not in PREPROCESS:
        raise UsageError(f"there is no preprocessing {named!r}; known: {', '.join(PREPROCESS)}.")
    given = {
        "mean": mean, "std": std, "resize": _size(resize), "scale": scale, "channels": channels, "layout": layout,
    }  # fmt: skip
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if named is None and not changes:
        return None
    return replace(PREPROCESS[named] if named is not None else Preprocess(), **changes)


def _size(given: tuple[float, ...] | None) -> float | int | tuple[int, int] | None:
    from onnxq.errors import UsageError

    if given is None:
        return None
    if len(given) == 1 and 0 < given[0] <= 1:
        return given[0]
    if len(given) > 2 or any(size < 1 or size != int(size) for size in given):
        raise UsageError("--resize takes a number of pixels, a fraction up to 1, or H,W.")
    return int(given[0]) if len(given) == 1 else (int(given[0]), int(given[1]))


def printable(text: str) -> str:
    """`text` with what could steer a terminal (escapes, backspaces, reversed writing) shown as Python writes it."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _console(*, stderr: bool = False, width: int | None = None, soft_wrap: bool = True) -> Console:
    """A console that shows names from files harmlessly; a reader that stops reading early ends the program quietly."""
    from rich.console import Console
    from rich.segment import Segment

    class Harmless(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return Harmless(stderr=stderr, width=width, soft_wrap=soft_wrap)


def stdout_console() -> Console:
    """Where results go."""
    terminal = sys.stdout.isatty()
    return _console(width=None if terminal else 160, soft_wrap=not terminal)


class TerminalLog:
    """Progress on stderr: a spinner on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.console = _console(stderr=True)
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        self._status = self.console.status("", spinner="dots") if self.live else None
        self._text, self._began, self._said = "", time.monotonic(), 0.0

    def stage(self, text: str) -> None:
        """A new step begins."""
        self._text, self._began, self._said = text, time.monotonic(), time.monotonic()
        if self._status is not None:
            self._status.update(text)
        elif not self.quiet:
            self.console.print(f"{text} ...")

    def advance(self, done: int) -> None:
        """So many rows are done."""
        self.step(f"{done} rows")

    def step(self, text: str) -> None:
        """The current step has come this far."""
        now = time.monotonic()
        text = f"{self._text} ({text}, {now - self._began:.0f} s{left(text, now - self._began)})"
        if self._status is not None:
            self._status.update(text)
        elif not self.quiet and now - self._said > 10.0:
            self._said = now
            self.console.print(text)

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Something the user must read."""
        self.console.print("warning:", text, style="yellow", markup=False)


def left(text: str, seconds: float) -> str:
    """Time left of a step, from the first "3 of 8" in its text; "" where there is none, or too early to tell."""
    part = _PART.search(text)
    done, whole = (int(part[1]), int(part[2])) if part else (0, 0)
    if not 0 < done < whole or seconds < 2.0:
        return ""
    rest = seconds * (whole - done) / done
    return f", about {rest:.0f} s left" if rest < 100 else f", about {rest / 60:.0f} min left"


@contextmanager
def terminal_log(quiet: bool) -> Iterator[TerminalLog]:
    """A log whose spinner stops at the end."""
    log = TerminalLog(quiet)
    if log._status is None:
        yield log
        return
    with log._status:
        yield log


def require_writable(output: Path, source: Path, *, force: bool = True) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    from onnxq.errors import EnvironmentFault, UsageError

    if output.exists() and output.samefile(source):
        raise UsageError(f"the output {output} is the input model; give another -o.")
    if output.is_dir():
        raise UsageError(f"{output} is a folder; give a file name with -o.")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is not a regular file; give another -o.")
    folder = output.parent
    if not folder.is_dir():
        raise EnvironmentFault(f"{output} cannot be written: the folder {folder} does not exist.")
    import os

    if not os.access(folder, os.W_OK):
        raise EnvironmentFault(f"{output} cannot be written: permission denied in {folder}.")
    _outputs[output] = _identity(output)


_outputs: dict[Path, tuple[int, int, int] | None] = {}
"""What a command is about to write, as it was before."""


def forget_outputs() -> None:
    """Begin a command: nothing is to be written yet."""
    _outputs.clear()


def written_outputs() -> list[Path]:
    """Outputs that are there now, whole, and were not when `require_writable` saw them."""
    return [path for path, before in _outputs.items() if _identity(path) not in (before, None)]


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from onnxq import graph
    from onnxq.errors import EnvironmentFault

    try:
        with graph.atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error
