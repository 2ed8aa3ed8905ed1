"""A call into native code that leaves this thread free for signals and the clock."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import TypeVar

_PATIENCE_S = 2.0
"""How long a call that was given up may take to end; between two operators it does at once."""
_START_S = 60.0
"""How long a thread may take to start; without memory for it, it never does."""
_RUNNING: set[threading.Event] = set()

T = TypeVar("T")


def limited(call: Callable[[], T], limit_s: float, give_up: Callable[[], None]) -> T:
    """What `call()` returns, made in another thread.

    Args:
        call: May take long in code that no signal interrupts.
        limit_s: Seconds it may take.
        give_up: Asks the call to end; called after the limit and on an interruption.

    Raises:
        TimeoutError: It took longer.
        MemoryError: There is none for another thread.
        BaseException: What `call` raised.
    """
    found: list[T] = []
    failed: list[BaseException] = []
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        _RUNNING.add(ended)
        begun.set()
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)
        finally:
            _RUNNING.discard(ended)
            ended.set()

    _thread.start_new_thread(work, ())  # Thread.start waits forever where there is no memory for the thread
    try:
        if not begun.wait(_START_S):
            raise MemoryError
        in_time = ended.wait(limit_s)
    finally:
        if begun.is_set() and not ended.is_set():
            give_up()
            ended.wait(_PATIENCE_S)
    if found:
        return found[0]
    if in_time:
        raise failed[0]
    raise TimeoutError


def is_running() -> bool:
    """Whether a call that was given up has not ended: the process can then only be left at once."""
    return bool(_RUNNING)
