"""`module:callable`: data that the user's own code makes."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxq.errors import DataError


def is_reference(text: str) -> bool:
    """Tell whether a text looks like `module:callable`."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text) is not None


def load_callable(reference: str) -> Callable[[], Iterable[object]]:
    """Import a callable with the current folder importable; it stays so whenever its code runs."""
    module_name, _, path = reference.partition(":")
    here = str(Path.cwd())
    with _importable(here):
        found = _module(module_name, path, reference)
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "name a function of that module"
            raise DataError(f"{reference}: {module_name} has no {part!r}: {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{reference} is of type {type(found).__name__}: name a function that takes no arguments")
    function = found

    def feeds() -> Iterator[object]:
        with _importable(here):
            iterator = iter(function())
        while True:
            with _importable(here):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    return feeds


def _module(name: str, path: str, reference: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.endswith(".py"):
            hint = f"write {name.removesuffix('.py')}:{path}"
        elif error.name and not name.startswith(error.name):
            hint = f"it needs {error.name}, which is not installed"
        else:
            hint = "run from the folder of the module, or install it"
        raise DataError(f"{reference}: there is no module {error.name or name!r}: {hint}") from error
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{reference}: importing {name} failed ({reason}): mend the module") from error


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Put a folder first on the import path for a while."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
