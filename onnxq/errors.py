"""Every deliberate error of onnxq.

OnnxqError
├── UsageError         2  the request contradicts itself
├── InputError         3  what was given cannot be read or is invalid
│   ├── ModelError        the ONNX file
│   └── DataError         the calibration or evaluation data
│       └── NoLabels      it is sound but has no labels, and labels are needed
├── UnsupportedError   4  valid, but nothing here can be quantized, or a feature is in the way
├── TargetNotMet       5  the size, accuracy or latency asked for cannot be reached
├── EnvironmentFault   6  disk, memory, permission, execution provider
└── RewriteError       1  a rewrite changed the model's outputs: a bug of ours

The number is the exit code of the command line. Each message is one line: what is wrong, where, what to do.
"""

from __future__ import annotations


class OnnxqError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(OnnxqError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class InputError(OnnxqError):
    """Something that was given cannot be read or is invalid."""

    exit_code = 3


class ModelError(InputError):
    """The ONNX file cannot be read or is not a valid model."""


class DataError(InputError):
    """The data cannot be read or does not fit the model's inputs."""


class NoLabels(DataError):  # noqa: N818 - says what is missing
    """The data has no labels where labels are needed."""


class UnsupportedError(OnnxqError):
    """The model is valid, but nothing in it can be quantized or an unsupported feature is in the way."""

    exit_code = 4


class TargetNotMet(OnnxqError):  # noqa: N818 - a verdict, not a fault
    """The size, accuracy or latency that was asked for cannot be reached."""

    exit_code = 5


class EnvironmentFault(OnnxqError):  # noqa: N818 - the machine's fault, not the user's
    """Disk, memory, permission or execution provider."""

    exit_code = 6


class RewriteError(OnnxqError):
    """A graph rewrite changed what the model computes; the message names the rewrite."""


_NO_MEMORY = (
    "bad_alloc",
    "Failed to allocate memory",
    "annot allocate memory",
    "pthread_create failed",
    "can't start new thread",
)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether memory, or room for the stack of another thread, ran out: in `error` or in what it came from."""
    while error is not None:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
