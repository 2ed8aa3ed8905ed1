"""Files on their way to a cluster: read once, sent once, known by what is in them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any


class Parcels:
    """Contents of files that jobs on their way or at work need.

    Args:
        send: Gives the cluster some bytes and returns what stands for them there, another thing each time: under one
            name, what is let go here could take what was sent again with it.
    """

    def __init__(self, send: Callable[[bytes], Any]) -> None:
        self._send = send
        self._digests: dict[Path, str] = {}
        self._sent: dict[str, Any] = {}
        self._users: Counter[str] = Counter()
        self._used: dict[Future[Any], tuple[str, ...]] = {}

    def of(self, folder: Path, files: Sequence[str]) -> tuple[list[Any], tuple[str, ...]]:
        """What stands for the contents of `files`, and their digests for `hold`."""
        digests = tuple(self._parcel(folder / name) for name in files)
        return [self._sent[digest] for digest in digests], digests

    def hold(self, future: Future[Any], digests: tuple[str, ...]) -> None:
        """Keep contents on the cluster until `release`."""
        self._users.update(digests)
        self._used[future] = digests

    def release(self, future: Future[Any]) -> None:
        """A job is done; what no other job waits for is dropped."""
        for digest in self._used.pop(future, ()):
            self._users[digest] -= 1
            if not self._users[digest]:
                self._sent.pop(digest, None)

    def forget(self) -> None:
        """Some contents are lost: send whatever is needed from now on again."""
        self._sent.clear()

    def _parcel(self, path: Path) -> str:
        digest = self._digests.get(path)
        if digest is None or digest not in self._sent:
            content = path.read_bytes()
            digest = self._digests[path] = hashlib.sha256(content).hexdigest()
            if digest not in self._sent:
                self._sent[digest] = self._send(content)
        return digest
