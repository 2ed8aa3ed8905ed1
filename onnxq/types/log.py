"""Where a run says what it is doing."""

from __future__ import annotations

from typing import Protocol


class Log(Protocol):
    """Where a run says what it is doing."""

    def stage(self, text: str) -> None:
        """A new step begins."""
        ...

    def advance(self, done: int) -> None:
        """So many rows of the current step are done."""
        ...

    def step(self, text: str) -> None:
        """The current step has come this far."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Something the user must read."""
        ...


class Silence:
    """A log that nobody reads."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def advance(self, done: int) -> None:
        """Say nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


class Within:
    """A log whose steps say in which part of the work they are.

    Args:
        log: Where everything goes.
        part: Comes before each step.
    """

    def __init__(self, log: Log, part: str) -> None:
        self._log, self._part = log, part

    def stage(self, text: str) -> None:
        """As it is."""
        self._log.stage(text)

    def advance(self, done: int) -> None:
        """As it is."""
        self._log.advance(done)

    def step(self, text: str) -> None:
        """With the part before it."""
        self._log.step(f"{self._part}, {text}")

    def note(self, text: str) -> None:
        """As it is."""
        self._log.note(text)

    def warn(self, text: str) -> None:
        """As it is."""
        self._log.warn(text)
