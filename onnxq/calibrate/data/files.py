"""Finding data files: which there are, in what order, and what may have been meant where there are none."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxq.calibrate.data.notes import Notes
from onnxq.errors import DataError, EnvironmentFault, InputError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ARRAYS = (".npz", ".npy")
FORMS = "a folder of images, .npz or .npy files, one such file, or module:callable"


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
        path: Where it is.
        shown: How messages call it: the name of the folder that was given, and the way from there.
        label: Its class, if the folder it lies in names one.
    """

    path: Path
    shown: str
    label: int | None = None

    @property
    def is_image(self) -> bool:
        """An image by its name; an array otherwise."""
        return self.path.suffix.lower() in IMAGES


def find(path: Path) -> list[DataFile]:
    """Return the one file, or the folder's usable files in natural order: all images or all arrays."""
    with _permitted(path.name):
        if path.is_dir():
            return _in_folder(path, path.resolve().name)
        if not path.exists():
            raise missing(path)
    if not _usable(path):
        raise DataError(f"{path.name} is not data that can be read here: give {FORMS}")
    return [DataFile(path, path.name)]


def by_class(path: Path, notes: Notes) -> list[DataFile]:
    """Return the files in a folder's sub-folders with the class that the sub-folder stands for.

    Names that are all whole numbers are the classes; otherwise a class is its folder's place among the sorted
    names, and a folder without files counts. No files are returned where nothing tells classes apart.
    """
    name = path.resolve().name
    with _permitted(name):
        names = sorted(child.name for child in path.iterdir() if child.is_dir() and not _hidden(child.name))
    numbers = [int(name) for name in names if re.fullmatch("[0-9]{1,9}", name)]
    named = len(numbers) == len(names)
    if not named:
        numbers = list(range(len(names)))
    elif len(set(numbers)) < len(names):
        raise DataError(f"{name}: two sub-folders stand for the same class ({', '.join(names)}): join them")
    classes = dict(zip(names, numbers, strict=True))
    found = [(file, file.path.relative_to(path).parts[0]) for file in find(path)]
    files = [DataFile(file.path, file.shown, classes[top]) for file, top in found if top in classes]
    if files and len(names) == 1:
        if not files[0].is_image:
            return []
        raise DataError(
            f"{name} has one sub-folder only, so all labels would be the same: give two or more classes, "
            f"or {name}/{names[0]} if they are in there"
        )
    if files:
        meaning = "the labels are their names" if named else "numbered in the order of their names"
        notes.put("classes", f"{len(names)} sub-folders, {meaning}")
    if files and len(files) < len(found):
        notes.put("ignored files", f"{len(found) - len(files)} outside the sub-folders")
    return files


def natural(parts: Sequence[str]) -> list[tuple[list[str | int], str]]:
    """Return a sort key under which 9.png comes before 10.png."""
    return [([int(bit) if bit.isdecimal() else bit for bit in re.split(r"(\d+)", part)], part) for part in parts]


def spread(files: Sequence[DataFile], most: int | None) -> list[DataFile]:
    """Return at most `most` files, evenly spaced and starting with the first."""
    if most is None or len(files) <= most:
        return list(files)
    return [files[i * len(files) // most] for i in range(most)]


def missing(path: Path) -> InputError:
    """Say that nothing is there, and which neighbour has a similar name."""
    parent = path.parent
    siblings = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=2)
    hint = f"did you mean {' or '.join(str(parent / name) for name in close)}?" if close else f"give {FORMS}"
    where = "" if parent.is_dir() else f" (there is no folder {parent})"
    return DataError(f"{path}: no such file or folder{where}: {hint}")


def require_regular(path: Path, where: str) -> None:
    """Refuse pipes and devices, which never end; what is not there is left to who opens it."""
    if path.exists() and not path.is_file():
        raise DataError(f"{where} is not a regular file: remove it")


def _in_folder(folder: Path, name: str) -> list[DataFile]:
    found = sorted(_walk(folder), key=lambda file: natural(file.relative_to(folder).parts))
    usable = [file for file in found if _usable(file)]
    return _one_kind([DataFile(file, f"{name}/{file.relative_to(folder).as_posix()}") for file in usable], found, name)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all visible files below a folder; linked folders are followed once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(place)
        seen.add(here.resolve())
        folders[:] = [name for name in folders if not _hidden(name) and (here / name).resolve() not in seen]
        yield from (here / name for name in names if not _hidden(name))


def _one_kind(files: list[DataFile], found: list[Path], name: str) -> list[DataFile]:
    images = sum(file.is_image for file in files)
    if 0 < images < len(files):
        raise DataError(
            f"{name} holds images ({images}) and arrays ({len(files) - images}): keep one kind in the folder"
        )
    if files:
        return files
    counts = Counter(file.suffix.lower() or "without extension" for file in found).most_common(5)
    there = "found only " + ", ".join(f"{count} {suffix}" for suffix, count in counts) if found else "it is empty"
    raise DataError(f"{name}: no data in this folder ({there}): put {' '.join((*IMAGES, *ARRAYS))} files there")


def _usable(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGES, *ARRAYS)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _permitted(name: str) -> Iterator[None]:
    """Turn a refusal of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"{name}: cannot be listed ({error.strerror}): check its permissions") from error
