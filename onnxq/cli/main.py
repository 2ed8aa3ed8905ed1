"""The group of commands, and the one place where errors become exit codes.

0 done; 1 a bug of ours; 2 usage; 3 the model or the data cannot be read; 4 nothing can be quantized; 5 the target
cannot be met; 6 the environment; 130 SIGINT; 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from onnxq.cli.benchmark import benchmark
from onnxq.cli.common import forget_outputs, printable, written_outputs
from onnxq.cli.compare import compare
from onnxq.cli.doctor import doctor
from onnxq.cli.emit import emit
from onnxq.cli.evaluate import evaluate
from onnxq.cli.harden import harden
from onnxq.cli.inspect import inspect
from onnxq.cli.quantize import quantize
from onnxq.cli.reparam import reparam
from onnxq.cli.sensitivity import sensitivity
from onnxq.cli.simplify import simplify
from onnxq.cli.sweep import sweep
from onnxq.errors import OnnxqError, lacks_memory
from onnxq.runlimit import is_running
from onnxq.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="onnxq")
def group() -> None:
    r"""Quantize ONNX models so that they are small, fast in onnxruntime, and still right.

    \b
    onnxq quantize model.onnx --data calibration/ -o model.int8.onnx
    onnxq benchmark model.onnx model.int8.onnx
    """


COMMANDS = (
    quantize, emit, benchmark, evaluate, compare, inspect, simplify, reparam, sensitivity, sweep, harden, doctor,
)  # fmt: skip
for command in COMMANDS:
    group.add_command(command)


class _Terminated(BaseException):
    """SIGTERM arrived; raised so that temporary files are removed on the way out."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    code = _run(args)
    if is_running():  # native code that nothing stops: no time for goodbyes
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(_number: int, _frame: object) -> NoReturn:
    raise _Terminated


def _run(args: Sequence[str] | None) -> int:
    forget_outputs()
    try:
        group.main(args=args, prog_name="onnxq", standalone_mode=False)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        _say(error.format_message())
        return 2
    except (click.Abort, KeyboardInterrupt):
        _say(f"interrupted; {_what_was_written()}")
        return 130
    except _Terminated:
        _say(f"terminated; {_what_was_written()}")
        return 143
    except OnnxqError as error:
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("ONNXQ_DEBUG"):
            raise
        if lacks_memory(error):
            _say("out of memory; use fewer --samples or a smaller --batch")
            return 6
        text = " ".join(str(error).split())
        _say(f"internal error: {type(error).__name__}: {text}. Run with ONNXQ_DEBUG=1 and report the traceback.")
        return 1
    return 0


def _what_was_written() -> str:
    names = ", ".join(path.name for path in written_outputs())
    return f"{names} had been written" if names else "nothing was written"


def _say(text: str) -> None:
    click.echo(f"onnxq: error: {printable(' '.join(text.split()))}", err=True)
