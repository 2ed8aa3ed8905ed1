"""One product with a constant matrix, x [1, rows, K] times W [K, N] plus a bias, in every form that onnxruntime has.

    python benchmarks/forms.py [--sizes 384x1536 ...] [--rows 1 4 16 64 256] [--threads 1] [--seconds 1]

float: MatMul and Add. static: codes of a fixed grid, as onnxq writes it. pairs: the same in Q/DQ form.
dynamic: the grid is chosen in every run (`quantize_dynamic`). blocks8, blocks4: weights alone (`--weight-only`). All
are called in turns; printed is the median time as a share of the float form's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray
SIZES = ("64x192", "384x384", "384x1536", "1536x384", "768x3072", "2048x2048")
BLOCK = 32


def session(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Array], k: int, threads: int
) -> onnxruntime.InferenceSession:
    """A session of `nodes`, which turn x into y."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", k])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "form", inputs, outputs, held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def forms(k: int, n: int, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    """The product in every form; float comes first."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    weight = rng.normal(size=(k, n)).astype(np.float32)
    steps = (np.abs(weight).max(0) / 127).astype(np.float32)
    bias = {"b": rng.normal(size=n).astype(np.float32)}
    codes = {"w": np.rint(weight / steps).astype(np.int8), "ws": steps}
    grid = {"s": np.float32(0.03), "z": np.uint8(128)}
    rounded = node("QuantizeLinear", ["x", "s", "z"], ["q"])
    add = node("Add", ["p", "b"], ["y"])
    found = {
        "float": session([node("MatMul", ["x", "w"], ["p"]), add], {"w": weight, **bias}, k, threads),
        "static": session(
            [rounded, node("MatMulIntegerToFloat", ["q", "w", "s", "ws", "z", "", "b"], ["y"], domain="com.microsoft")],
            {**codes, **grid, **bias}, k, threads,
        ),
        "pairs": session(
            [
                rounded,
                node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=1),
                node("DequantizeLinear", ["bq", "bs"], ["b"], axis=0),
                node("MatMul", ["d", "v"], ["p"]),
                add,
            ],
            {**codes, **grid, "wz": np.zeros(n, np.int8), "bq": np.ones(n, np.int32), "bs": steps * 0.03}, k, threads,
        ),
        "dynamic": session(
            [
                node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                node("MatMulInteger", ["q", "w", "z"], ["i"]),
                node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                node("Mul", ["s", "ws"], ["m"]),
                node("Mul", ["f", "m"], ["p"]),
                add,
            ],
            {**codes, **bias}, k, threads,
        ),
    }  # fmt: skip
    for bits in (8, 4):
        stored = rng.integers(0, 256, (n, k // BLOCK, BLOCK * bits // 8)).astype(np.uint8)
        sizes = {"K": k, "N": n, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        product = node("MatMulNBits", ["x", "w", "ws", "", "", "b"], ["y"], domain="com.microsoft", **sizes)
        block_steps = np.full(n * k // BLOCK, 0.01, np.float32)
        found[f"blocks{bits}"] = session([product], {"w": stored, "ws": block_steps, **bias}, k, threads)
    return found


def measured(found: Mapping[str, onnxruntime.InferenceSession], rows: int, k: int, seconds: float) -> dict[str, float]:
    """Median seconds of every form."""
    feeds = {"x": np.random.default_rng(1).normal(size=(1, rows, k)).astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in found}
    for one in found.values():
        one.run(None, feeds)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, one in found.items():
            before = time.perf_counter()
            one.run(None, feeds)
            times[name].append(time.perf_counter() - before)
    return {name: float(np.median(samples)) for name, samples in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="KxN", help="K: a multiple of 32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per line (default: 1)")
    args = parser.parse_args()
    print("| matrix | rows | float, us | static | pairs | dynamic | 8-bit blocks | 4-bit blocks |")
    print("| --- " * 8 + "|")
    for size in args.sizes:
        k, n = map(int, size.split("x"))
        found = forms(k, n, args.threads)
        for rows in args.rows:
            times = measured(found, rows, k, args.seconds)
            base = times.pop("float")
            shares = " | ".join(f"{value / base:.2f}" for value in times.values())
            print(f"| {size} | {rows} | {1e6 * base:.1f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
