"""What the scripts of the rivals share: their arguments, the feeds, and the policy of the bits of a layer.

Runs in every rival's own environment: numpy and onnx only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Feed = dict[str, np.ndarray]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Job:
    """One call: what to quantize, with what, to how many bits and how; `first_last` None is the bits of the others."""

    model: Path
    feeds: Path
    out: Path
    weight_bits: int
    activation_bits: int
    first_last: int | None
    settings: Mapping[str, Any]


def job() -> Job:
    """The job on the command line: MODEL FEEDS OUT JSON, with the bits and the rival's settings as JSON.

    The working directory becomes a folder beside the result, since some rivals leave files where they run.
    """
    *paths, document = sys.argv[1:]
    model, feeds, out = (Path(path).absolute() for path in paths)
    scratch = out.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    os.chdir(scratch)
    settings = json.loads(document)
    bits = (settings.pop("weight_bits"), settings.pop("activation_bits"), settings.pop("first_last"))
    return Job(model, feeds, out, *bits, settings)


def batches(folder: Path) -> Iterator[Feed]:
    """The .npz batches of a folder in the order of their names."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as batch:
            yield {name: batch[name] for name in batch.files}


def rows(folder: Path) -> Iterator[Feed]:
    """The same, row by row, as batches of one."""
    for batch in batches(folder):
        for i in range(len(next(iter(batch.values())))):
            yield {name: np.ascontiguousarray(value[i : i + 1]) for name, value in batch.items()}


@dataclass(frozen=True)
class Policy:
    """Names of tensors by the bits they get: everything that is in neither list has 8.

    Attributes:
        few_weights: Weights with the wanted bits; all but, where the first and last layer differ, theirs.
        end_weights: Weights of the first and last layer where those differ from the others.
        few_inputs: What the layers with the wanted bits read, but not the inputs of the first and last layer where
            those differ. Sums and everything else no layer reads stay at 8 bits, as in onnxq.
        end_inputs: What the first and last layer read where those differ.
    """

    few_weights: tuple[str, ...]
    end_weights: tuple[str, ...]
    few_inputs: tuple[str, ...]
    end_inputs: tuple[str, ...]


def transformer(model: onnx.ModelProto) -> bool:
    """Whether the model has attention, for quantizers that want to be told."""
    return any(node.op_type == "Softmax" for node in model.graph.node)


def policy(model: onnx.ModelProto, job: Job) -> Policy:
    """Who gets which bits; layers are convolutions and products with a constant, in the order of the file."""
    constants = {entry.name for entry in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    layers = [node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in constants]
    ends = [layers[0], layers[-1]] if job.first_last else []
    middle = [node for node in layers if not any(node is end for end in ends)]
    end_inputs = {node.input[0] for node in ends}
    return Policy(
        tuple(node.input[1] for node in middle),
        tuple(node.input[1] for node in ends),
        tuple(sorted({node.input[0] for node in middle} - end_inputs)),
        tuple(sorted(end_inputs)),
    )


def save(model: onnx.ModelProto, job: Job) -> None:
    """Write the result as one file."""
    onnx.save(model, str(job.out))
