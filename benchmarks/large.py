"""What `onnxq quantize` takes for models above 2 GB, for thousands of nodes and for thousands of samples.

    python benchmarks/large.py --out DIR [--gigabytes 1.2 2.4] [--nodes 2100] [--samples 10000]

Models and rows are made here, in DIR: a stack of square Gemms whose weights lie in a file of their own, a chain of
small convolutions with a sum after each, and a small net with many rows. Each is quantized by a child process; printed
are its time, its peak memory, and that memory by the bytes of the model: the factor should not grow with the model.
The outputs are compared with those of the float model by the command itself, and its worst one is printed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from process import run

WIDTH = 4096
"""Rows and columns of a Gemm: 64 MiB of weights."""
MAKE = """
import sys
from pathlib import Path
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

kind, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
nodes, initializers = [], []

def save(shape, last, shape_out, rows):
    ends = (("x", shape), (last, shape_out))
    values = [helper.make_tensor_value_info(name, 1, ["n", *dims]) for name, dims in ends]
    graph = helper.make_graph(nodes, kind, values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if rows:
        np.savez(folder / "data.npz", x=rng.normal(size=(rows, *shape)).astype(np.float32))

if kind == "gemms":  # weights are written one by one, so that this process stays small
    width, offset = int(sys.argv[4]), 0
    with (folder / "weights.bin").open("wb") as file:
        for index in range(count):
            weight = rng.normal(size=(width, width), scale=(2 / width) ** 0.5).astype(np.float32)
            tensor = TensorProto(name=f"w{index}", data_type=1, dims=weight.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.bin"), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            offset += file.write(weight.data)
            initializers.append(tensor)
            source = f"r{index - 1}" if index else "x"
            nodes.append(helper.make_node("Gemm", [source, f"w{index}"], [f"y{index}"]))
            nodes.append(helper.make_node("Relu", [f"y{index}"], [f"r{index}"]))
    save([width], f"r{count - 1}", [width], 8)
elif kind == "nodes":
    last = "x"
    for index in range(count // 3):
        weight = rng.normal(size=(8, 8, 1, 1), scale=8 / count).astype(np.float32)  # sums that do not explode
        initializers.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], name=f"conv{index}"))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"a{index}"], name=f"relu{index}"))
        nodes.append(helper.make_node("Add", [f"a{index}", last], [f"s{index}"], name=f"add{index}"))
        last = f"s{index}"
    save([8, 6, 6], last, [8, 6, 6], 16)
else:
    for index, (inputs, outputs) in enumerate(((3, 16), (16, 32))):
        weight = rng.normal(size=(outputs, inputs, 3, 3), scale=0.2).astype(np.float32)
        initializers.append(numpy_helper.from_array(weight, f"w{index}"))
        source = f"a{index - 1}" if index else "x"
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], strides=[2, 2]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"a{index}"]))
    save([3, 32, 32], "a1", [32, 7, 7], 0)
    (folder / "data").mkdir()
    for index in range(-(-count // 500)):
        rows = rng.normal(size=(min(500, count - 500 * index), 3, 32, 32)).astype(np.float32)
        np.savez(folder / "data" / f"{index:04d}.npz", x=rows)
"""


def make(kind: str, folder: Path, count: int) -> Path:
    """A model of one of the three kinds with rows for it; returns the model's path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = run([sys.executable, "-c", MAKE, kind, str(folder), str(count), str(WIDTH)], folder / "make")
    if made.status:
        raise SystemExit(made.complaint)
    return folder / "model.onnx"


def quantize(label: str, folder: Path, *options: str) -> None:
    """Quantize folder/model.onnx and print what that took."""
    data = folder / "data" if (folder / "data").is_dir() else folder / "data.npz"
    target = folder / "model.int8.onnx"
    command = [sys.executable, "-m", "onnxq", "quantize", str(folder / "model.onnx"), "--data", str(data)]
    done = run([*command, "-o", str(target), "--json", "--no-timing", *options], folder / "quantize")
    if done.status:
        print(f"{label:32} {done.complaint}", flush=True)
        return
    decibels = json.loads(done.stdout)["verdict"]["sqnr_db"].values()
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name in ("model.onnx", "weights.bin"))
    made = sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith(target.name))
    peak = done.cost.peak_mb
    print(
        f"{label:32} {size / 1e6:8.1f} MB -> {made / 1e6:8.1f} MB {done.cost.wall_s:7.1f} s {peak:8.0f} MB peak "
        f"{peak * 1e6 / size:7.2f} x model  worst output {min(decibels):.1f} dB",
        flush=True,
    )


def main() -> None:
    """Print a line per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for models and rows; they are removed")
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1.2, 2.4], help="sizes of the stacks of Gemms")
    parser.add_argument("--nodes", type=int, default=2100, help="nodes of the chain; 0 leaves it out")
    parser.add_argument("--samples", type=int, default=10_000, help="rows of the small net; 0 leaves it out")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB of memory")
    for size in given.gigabytes:
        count = max(1, round(size * 1e9 / (4 * WIDTH * WIDTH)))
        make("gemms", given.out / "gemms", count)
        quantize(f"{count} Gemms", given.out / "gemms")
        shutil.rmtree(given.out / "gemms")
    if given.nodes:
        make("nodes", given.out / "nodes", given.nodes)
        quantize(f"{given.nodes} nodes", given.out / "nodes")
        shutil.rmtree(given.out / "nodes")
    if given.samples:
        make("samples", given.out / "samples", given.samples)
        for count in sorted({min(100, given.samples), given.samples}):
            quantize(f"{count} samples", given.out / "samples", "--samples", str(count))
        shutil.rmtree(given.out / "samples")


if __name__ == "__main__":
    main()
