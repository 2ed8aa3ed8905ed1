"""Networks and calibration data with outliers, to see what they cost.

    python benchmarks/outliers.py model MODEL.onnx OUT.onnx [--channels 2] [--factor 32] [--seed 0]
    python benchmarks/outliers.py data FEEDS OUT [--share 0.02] [--factor 8] [--seed 0]

`model` multiplies some output channels of every Conv that has only a Relu and then only Convs behind it, and divides
the input channels of these Convs: the function stays what it is, but some channels of the tensor between need many
times the range of the others. The factor is rounded to a power of two, so that no digit is lost. A network in train
form has to be fused first (`onnxq reparam`). `data` multiplies a share of the rows in a folder of .npz feeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper


def loud_channels(model: onnx.ModelProto, count: int, factor: float, seed: int) -> list[str]:
    """Give `count` channels of each fitting tensor `factor` times their values; returns the names of the tensors."""
    stored = {array.name: array for array in model.graph.initializer}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    generator = np.random.default_rng(seed)
    exact = 2.0 ** round(math.log2(factor))
    changed = []
    for conv, relu, readers in _chains(model):
        parameters = [*conv.input[1:], *(reader.input[1] for reader in readers)]
        if any(name not in stored or uses[name] > 1 for name in parameters):
            continue
        channels = stored[conv.input[1]].dims[0]
        loud = generator.choice(channels, min(count, channels), replace=False)
        for name in conv.input[1:]:
            _multiply(stored[name], 0, loud, exact)
        for reader in readers:
            _multiply(stored[reader.input[1]], 1, loud, 1 / exact)
        changed.append(relu.output[0])
    return changed


def _chains(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, list[onnx.NodeProto]]]:
    """Every Conv with only a Relu behind it whose result goes to ungrouped Convs only; with these."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    returned = {value.name for value in model.graph.output}
    for conv in model.graph.node:
        behind = readers.get(conv.output[0], [])
        if conv.op_type != "Conv" or len(behind) != 1 or behind[0].op_type != "Relu":
            continue
        relu = behind[0]
        last = readers.get(relu.output[0], [])
        groups = [next((a.i for a in node.attribute if a.name == "group"), 1) for node in last]
        fits = all(node.op_type == "Conv" and node.input[0] == relu.output[0] for node in last)
        if last and fits and set(groups) == {1} and not returned & {conv.output[0], relu.output[0]}:
            yield conv, relu, last


def _multiply(array: onnx.TensorProto, axis: int, places: npt.NDArray[np.int64], factor: float) -> None:
    values = onnx.numpy_helper.to_array(array).copy()
    index: list[Any] = [slice(None)] * values.ndim
    index[axis] = places
    values[tuple(index)] *= values.dtype.type(factor)
    array.CopyFrom(onnx.numpy_helper.from_array(values, array.name))


def loud_rows(folder: Path, out: Path, share: float, factor: float, seed: int) -> int:
    """Copy .npz feeds, with `share` of the rows `factor` times as large (integers stay); returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    total = 0
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            feeds = {name: stored[name] for name in stored.files}
        rows = len(next(iter(feeds.values())))
        loud = generator.random(rows) < share
        total += int(loud.sum())
        for values in feeds.values():
            if values.dtype.kind == "f" and len(values) == rows:
                values[loud] *= values.dtype.type(factor)
        np.savez(out / path.name, **feeds)
    return total


def main() -> None:
    """Write the files."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("kind", choices=("model", "data"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--factor", type=float, default=None, help="default: 32 for channels, 8 for rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "data":
        print(f"{loud_rows(args.source, args.out, args.share, args.factor or 8.0, args.seed)} loud rows")
        return
    model = onnx.load(args.source)
    changed = loud_channels(model, args.channels, args.factor or 32.0, args.seed)
    onnx.save(model, args.out)
    print(f"{args.channels} loud channels in each of {len(changed)} tensors")


if __name__ == "__main__":
    main()
