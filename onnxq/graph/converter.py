"""The program of a child process: the onnx version converter on one file. It imports nothing of onnxq.

Usage: converter.py SOURCE DESTINATION; the operator set to convert to is the constant below.
"""

from __future__ import annotations

import sys

import onnx
import onnx.version_converter

OPSET = 13


def main() -> None:
    """Convert the file argv[1] into argv[2]."""
    onnx.save(onnx.version_converter.convert_version(onnx.load(sys.argv[1]), OPSET), sys.argv[2])


if __name__ == "__main__":
    main()
