"""Run onnxq from a checkout: `python cli.py quantize MODEL --data DATA`."""

from onnxq.cli import main

main()
