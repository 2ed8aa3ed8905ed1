"""Train a small network on scikit-learn's digits with and without R2-Loss, export, quantize, compare.

    pip install 'onnxq[learn]' scikit-learn
    python examples/r2_digits.py [--epochs 20] [--seeds 2]

Prints test accuracy in float and with few-bit weights, for one weight scale per tensor and one per channel.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import onnxq
from onnxq.runtime import Session
from onnxq.train import R2Loss

CASES = [(bits, per_channel) for per_channel in (False, True) for bits in (4, 3, 2)]


def network() -> nn.Sequential:
    """Three convolutions with BatchNorm and a linear layer, for 8x8 images."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = stage(1, 16, 1) + stage(16, 32, 2) + stage(32, 32, 1) + stage(32, 64, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int, strength: float) -> tuple[nn.Module, float]:
    """Train from scratch; `strength` 0 is training without R2. Also the mean max|W|/std of the folded weights."""
    torch.manual_seed(seed)
    net = network()
    r2 = R2Loss(net, "margin", strength=strength, warm_up=0.1)
    optimizer = torch.optim.AdamW([*net.parameters(), *r2.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        r2.step(epoch / epochs)
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows]) + r2()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval(), statistics.mean(entry.per_tensor for entry in r2.ranges())


def accuracy(model: object, x: np.ndarray, y: np.ndarray) -> float:
    """Top-1 in percent of an ONNX model (in memory or a file)."""
    (logits,) = Session(model).run({"image": x}).values()  # type: ignore[arg-type]
    return 100.0 * float((logits.argmax(1) == y).mean())


def export(net: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write an ONNX file that takes any number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer exporter, which needs onnxscript
        torch.onnx.export(
            net, (example,), str(path), input_names=["image"], dynamic_axes={"image": {0: "n"}}, dynamo=False
        )


def scores(net: nn.Module, calibration: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[float]:
    """Accuracy in float and in every case of CASES."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        export(net, torch.from_numpy(x[:2]), path)
        found = [accuracy(path, x, y)]
        for bits, per_channel in CASES:
            settings = {"weight_bits": bits, "first_last": bits, "per_channel": per_channel}
            made = onnxq.quantize(path, {"image": calibration}, checks=onnxq.Checks(verify=False), **settings)
            found.append(accuracy(made.model, x, y))
    return found


def main() -> None:
    """Train both ways with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--strength", type=float, default=0.03)
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    columns: dict[str, list[list[float]]] = {"without": [], "with R2": []}
    widths: dict[str, list[float]] = {"without": [], "with R2": []}
    for seed in range(args.seeds):
        for name, strength in (("without", 0.0), ("with R2", args.strength)):
            net, width = train(torch.from_numpy(x), torch.from_numpy(y), args.epochs, seed, strength)
            columns[name].append(scores(net, x[:256], test_x, test_y))
            widths[name].append(width)
    titles = ["float", *(f"W{bits}A8 per {'channel' if channel else 'tensor'}" for bits, channel in CASES)]
    print(f"{'':20}" + "".join(f"{name:>16}" for name in columns))
    print(f"{'max|W|/std':20}" + "".join(f"{statistics.mean(widths[name]):16.2f}" for name in columns))
    for index, title in enumerate(titles):
        cells = ([run[index] for run in columns[name]] for name in columns)
        print(f"{title:20}" + "".join(f"{statistics.mean(cell):9.1f} ± {_spread(cell):4.1f}" for cell in cells))


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
