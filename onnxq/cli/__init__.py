"""The command line: parse, call, print."""

from onnxq.cli.main import main

__all__ = ["main"]
