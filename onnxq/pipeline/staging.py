"""What the jobs of a sweep read: where it is, what is in it, and how it gets to another machine.

On this machine a job reads models and rows where they are. For a cluster, files are gathered in one folder (as links),
and folders as archives; a job unpacks them under the name that they have here, which ends up in the quantized file.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxq import graph
from onnxq.errors import DataError, InputError, UsageError

ENDINGS = ("", ".npz", ".npy")


@dataclass(frozen=True)
class Place:
    """Where a job finds one thing.

    Attributes:
        path: As the job calls it: absolute, relative to the job's folder, or "module:callable".
        files: What has to be in the job's folder.
        archive: The one of them that has to be unpacked there first; "" for none.
    """

    path: str
    files: tuple[str, ...] = ()
    archive: str = ""

    def found(self, folder: Path) -> str:
        """The path on the job's machine, unpacked where that is needed."""
        if self.archive:
            packed = folder / self.archive
            with zipfile.ZipFile(packed) as stored:
                stored.extractall(packed.parent)
        return str(folder / self.path) if self.files else self.path


def place_of(path: str, companions: Iterable[Path], folder: Path | None) -> Place:
    """Where a job finds what is called `path` here.

    Args:
        path: Of a file or a folder, or "module:callable".
        companions: Files that belong beside it.
        folder: Where everything for a cluster is gathered; None for jobs on this machine.

    Raises:
        UsageError: It is no path, and the job runs elsewhere.
    """
    here = Path(path)
    if folder is None:
        return Place(str(here.resolve()) if here.exists() else path)
    if not here.exists():
        raise UsageError(f"rows have to be files for a --backend on other machines, not {path}.")
    return _staged(here, list(companions), folder)


def _staged(path: Path, companions: list[Path], folder: Path) -> Place:
    """Gather a file and those that belong beside it, or a folder, in `folder`, under a name of their own."""
    home = folder / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    shown = path.resolve().name
    if not home.exists():
        home.mkdir()
        if path.is_dir():
            _pack(path, home / "folder.zip", shown)
        for file in () if path.is_dir() else (path, *companions):
            link = home / file.relative_to(path.parent)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    if path.is_dir():
        archive = f"{home.name}/folder.zip"
        return Place(f"{home.name}/{shown}", (archive,), archive)
    return Place(
        f"{home.name}/{path.name}",
        tuple(f"{home.name}/{file.relative_to(path.parent)}" for file in (path, *companions)),
    )


def _pack(source: Path, target: Path, name: str) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(source.rglob("*")):
            if file.is_file():
                archive.write(file, Path(name) / file.relative_to(source))


def content_of(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files and folders, as hex.

    Raises:
        InputError: One of them cannot be read.
    """
    state = hashlib.sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                content = file.read_bytes()
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
            name = str(file.relative_to(path.parent))
            state.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return state.hexdigest()


def companions_of(model: Path) -> list[Path]:
    """Files with the external weights of a model; none of a file that is no model, which its job will say."""
    try:
        return [file for file in graph.model_files(model)[1:] if file.is_file()]
    except Exception:
        return []


def rows_of(given: str, stems: Iterable[str], option: str) -> Mapping[str, str]:
    """The rows of each model: DATA/STEM, DATA/STEM.npz or DATA/STEM.npy where there are such, else DATA for all.

    Args:
        given: A folder, a file, or "module:callable".
        stems: Names of the models without their endings.
        option: For messages.

    Raises:
        DataError: Some models have rows of their own, and others have not.
    """
    folder, every = Path(given), list(stems)
    own = {
        stem: str(path)
        for stem in every
        for path in (folder / f"{stem}{ending}" for ending in reversed(ENDINGS))
        if folder.is_dir() and path.exists()
    }
    if not own:
        return dict.fromkeys(every, given)
    missing = [stem for stem in every if stem not in own]
    if missing:
        raise DataError(f"{option} {given} has rows for {', '.join(own)} but none for {', '.join(missing)}.")
    return own


def require_distinct(names: Iterable[str], what: str) -> None:
    """Refuse two things of one name, whose results would replace each other.

    Raises:
        UsageError: Names it.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"two {what} are called {name!r}; rename one, or give it once.")
        seen.add(name)
