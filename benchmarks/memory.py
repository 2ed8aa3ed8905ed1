"""Peak memory of `onnxq quantize` against the number of calibration samples.

    python benchmarks/memory.py MODEL.onnx --samples 64 --samples 2048

The rows are random and lie in .npz files of 32 rows each, as many as the largest number of samples needs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from process import run


def write_rows(folder: Path, model: Path, rows: int) -> None:
    """Random rows for the model's inputs; a child writes them, because numpy must not grow this process."""
    program = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "model, folder, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "inputs = ort.InferenceSession(model).get_inputs()\n"
        "random = np.random.default_rng(0)\n"
        "for index in range(-(-rows // 32)):\n"
        "    feeds = {}\n"
        "    for entry in inputs:\n"
        "        shape = [32] + [d if isinstance(d, int) else 64 for d in entry.shape[1:]]\n"
        "        ids = np.ones(shape, 'int64')\n"
        "        floats = random.normal(size=shape).astype('float32')\n"
        "        feeds[entry.name] = floats if entry.type == 'tensor(float)' else ids\n"
        "    np.savez(f'{folder}/{index:05d}.npz', **feeds)\n"
    )
    finished = run([sys.executable, "-c", program, str(model), str(folder), str(rows)], folder / "write")
    if finished.status:
        raise SystemExit(finished.complaint)


def main() -> None:
    """Print one line per number of samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, action="append")
    args = parser.parse_args()
    counts = args.samples or [64, 512, 2048]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows"
        data.mkdir()
        write_rows(data, args.model, max(counts))
        for count in counts:
            command = [sys.executable, "-m", "onnxq", "quantize", str(args.model), "--data", str(data), "-q"]
            out = Path(scratch) / "out.onnx"
            finished = run([*command, "--samples", str(count), "-o", str(out)], Path(scratch) / "quantize")
            if finished.status:
                raise SystemExit(finished.complaint)
            cost = finished.cost
            print(f"{count:6} samples: peak {cost.peak_mb:7.1f} MB, {cost.wall_s:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
