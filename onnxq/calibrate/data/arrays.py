"""Reading .npz and .npy files that nobody vouches for.

Nothing is ever unpickled. An array's header is checked against the bytes that are really there before memory
is taken for it, and against a limit where they are compressed.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from onnxq.calibrate.data.files import require_regular
from onnxq.errors import DataError, EnvironmentFault
from onnxq.types import Array

MAX_BYTES = 4 * 2**30
"""Largest array that is unpacked from a .npz file."""

ONLY = "array"
"""Name of the array of a .npy file, which has none."""

_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    SyntaxError,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Header:
    """What an array's header says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Named(Protocol):
    """Arrays by name, of a file or in memory."""

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays' names."""
        ...

    def header(self, name: str) -> Header:
        """Tell an array's shape and type without reading it."""
        ...

    def load(self, name: str) -> Array:
        """Read one array."""
        ...


@dataclass(frozen=True, eq=False)
class Memory:
    """Arrays that are in memory already."""

    arrays: Mapping[str, Array]

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays' names."""
        return tuple(self.arrays)

    def header(self, name: str) -> Header:
        """Tell an array's shape and type."""
        array = self.arrays[name]
        return Header(array.shape, array.dtype)

    def load(self, name: str) -> Array:
        """Return the array."""
        return self.arrays[name]


@dataclass(frozen=True, eq=False)
class Npy:
    """The array of a .npy file, mapped into memory rather than read."""

    path: Path
    where: str

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (ONLY,)

    def header(self, name: str) -> Header:
        """Tell the array's shape and type."""
        with readable(self.where), self.path.open("rb") as file:
            header = _read_header(file, self.where)
            there = self.path.stat().st_size - file.tell()
            if header.nbytes > there:
                raise _cut_short(self.where, header, there)
            return header

    def load(self, name: str) -> Array:
        """Map the array; rows are read as they are sliced."""
        with readable(self.where):
            array: Array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            return array


@dataclass(frozen=True, eq=False)
class Npz:
    """The arrays of an open .npz file."""

    archive: zipfile.ZipFile
    where: str

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays' names."""
        return tuple(dict.fromkeys(name.removesuffix(".npy") for name in self.archive.namelist()))

    def header(self, name: str) -> Header:
        """Tell an array's shape and type; only the member's start is unpacked."""
        info = self._info(name)
        where = f"{self.where}: {name!r}"
        with readable(self.where), self.archive.open(info) as file:
            header = _read_header(file, where)
            there = info.file_size - file.tell()
        if header.nbytes > MAX_BYTES:
            raise DataError(
                f"{where} would take {header.nbytes / 2**30:.1f} GiB ({header}), too much for one array of "
                "a .npz file: save it as several files, or as .npy"
            )
        if header.nbytes > there:
            raise _cut_short(where, header, there)
        return header

    def load(self, name: str) -> Array:
        """Read one array to the member's end, where its checksum is compared."""
        self.header(name)
        with readable(self.where), self.archive.open(self._info(name)) as file:
            array: Array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError(f"{name!r} has bytes behind its last element")
            return array

    def _info(self, name: str) -> zipfile.ZipInfo:
        members = self.archive.NameToInfo
        return members[f"{name}.npy"] if f"{name}.npy" in members else members[name]


@contextmanager
def open_arrays(path: Path, where: str) -> Iterator[Named]:
    """Open a .npz or .npy file."""
    require_regular(path, where)
    if path.suffix.lower() == ".npy":
        yield Npy(path, where)
        return
    with readable(where):
        archive = zipfile.ZipFile(path)
    with archive:
        yield Npz(archive, where)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what the libraries raise on a broken file into one line that names it."""
    try:
        yield
    except PermissionError as error:
        raise EnvironmentFault(f"{where}: no permission to read it") from error
    except MemoryError as error:
        raise EnvironmentFault(f"{where}: not enough memory to read it: save it as several files") from error
    except _BROKEN as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise DataError(f"{where}: cannot be read ({reason}): write it again with numpy") from error


def _read_header(file: IO[bytes], where: str) -> Header:
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise DataError(f"{where} is not a numpy array: write it with np.save or np.savez") from error
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise DataError(f"{where} is no plain array (format {version}): save it as numbers")
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never loaded: save it as an array of numbers")
    if min(shape, default=0) < 0 or any(type(size) is not int for size in shape):
        raise DataError(f"{where} has a damaged header (shape {shape}): write it again with numpy")
    return Header(shape, dtype)


def _cut_short(where: str, header: Header, there: int) -> DataError:
    return DataError(
        f"{where} is cut short: {header} takes {header.nbytes} bytes, only {there} are there: write it again"
    )
