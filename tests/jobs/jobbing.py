"""Functions that workers import by name."""

import os
import signal
import time
from pathlib import Path

from onnxq.jobs import Task, results
from onnxq.jobs.local import Local


def total(argument, folder):
    """The sum of what is in the task's files, times the argument; and who computed it."""
    return argument * sum(int((folder / f"{name}.txt").read_text()) for name in ("a", "sub/b")), os.getpid()


def refuse(argument, folder):
    """One argument is refused."""
    if argument == 2:
        raise ValueError(f"not {argument}")
    return argument


def die_once(argument, folder):
    """One job kills its worker, the first time."""
    number, flag = argument
    time.sleep(0.05)
    if number == 3 and not Path(flag).exists():
        Path(flag).write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return total(number, folder)


def die(argument, folder):
    """One job always kills its worker."""
    if argument == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return argument


def together(argument, folder):
    """How many jobs of this process run at once."""
    flag = Path(argument) / str(os.getpid())
    with flag.open("x"):
        time.sleep(0.05)
    flag.unlink()
    return 1


def divide(argument, folder):
    """A job that makes jobs of itself."""
    if argument < 2:
        return argument
    parts = [Task(f"part {part}", part, folder) for part in (argument // 2, argument - argument // 2)]
    with Local(1) as backend:
        return sum(answer for _, answer in results(backend, divide, parts))
