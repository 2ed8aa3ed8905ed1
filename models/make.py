"""Make ``models/*.onnx`` and ``calibration_data/`` anew from scikit-learn's handwritten digits.

Run ``python models/make.py`` after ``pip install -e ".[models]"``. It writes the pictures, trains both
networks on one CPU core, exports them with torch's TorchScript-based exporter, and prints the accuracy that
onnxruntime measures with the exported files on the held-out pictures as they lie on disk.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from nets import DigitsCNN, DigitsTransformer
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
SIZE = 32
LEVELS = np.rint(np.linspace(0, 255, 8)).astype(np.uint8)  # the grey levels kept: few, for small files
EVAL_IMAGES = 360
CALIBRATION_IMAGES = 128
MEAN, STD = 0.5, 0.5
BATCH = 64
OPSET = 17


@dataclass(frozen=True)
class Digits:
    """Some digits: indices into LEVELS ([n, 32, 32]), the labels, and the rows of ``load_digits``."""

    indices: NDArray[np.uint8]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """What to train, for how long, and how."""

    name: str
    net: type[nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float


RECIPES = (
    Recipe("digits_cnn", DigitsCNN, epochs=15, learning_rate=4e-3, weight_decay=1e-2),
    Recipe("digits_transformer", DigitsTransformer, epochs=50, learning_rate=2e-3, weight_decay=5e-2),
)


def upsample(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Turn an 8x8 digit with values 0..16 into 32x32 indices into LEVELS."""
    small = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    pixels = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float64)
    return np.rint(pixels * ((len(LEVELS) - 1) / 255)).astype(np.uint8)


def load_splits() -> tuple[Digits, Digits, Digits]:
    """Return the training rows, the calibration rows (some of the training rows) and the held-out rows."""
    source = load_digits()
    indices = np.stack([upsample(digit) for digit in source.images])
    labels = source.target.astype(np.int64)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=EVAL_IMAGES, stratify=labels, random_state=SEED
    )
    _, calibration = train_test_split(train, test_size=CALIBRATION_IMAGES, stratify=labels[train], random_state=SEED)
    splits = (np.sort(rows) for rows in (train, calibration, held_out))
    first, second, third = (Digits(indices[rows], labels[rows], rows) for rows in splits)
    return first, second, third


def clear(folder: Path) -> None:
    """Make the folder and remove the pictures of an earlier run from it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.rglob("*.png"):
        old.unlink()


def write_calibration(digits: Digits, folder: Path) -> None:
    """Write 8-bit greyscale pictures into one flat folder."""
    clear(folder)
    for indices, label, row in zip(digits.indices, digits.labels, digits.rows, strict=True):
        Image.fromarray(LEVELS[indices]).save(folder / f"{row:04d}_label{label}.png", optimize=True)


def write_labelled(digits: Digits, folder: Path) -> None:
    """Write 4-bit palette pictures into one subfolder for each class."""
    clear(folder)
    for indices, label, row in zip(digits.indices, digits.labels, digits.rows, strict=True):
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette(np.repeat(LEVELS, 3).tobytes())
        path = folder / str(label) / f"{row:04d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path, bits=4, optimize=True)


def preprocess(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn grey pixels [n, 32, 32] into the networks' input: RGB, 0..1, then ``(x - MEAN) / STD``."""
    scaled = (grey.astype(np.float32) / 255 - MEAN) / STD
    return np.repeat(scaled[:, None], 3, axis=1).astype(np.float32)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, rotate and shear each image a little; what comes into view is background."""
    limits = torch.tensor([[0.12, 0.15, 0.12], [0.15, 0.12, 0.12]])
    noise = (torch.rand(len(images), 2, 3, generator=generator) * 2 - 1) * limits
    grid = nn.functional.affine_grid(torch.eye(2, 3) + noise, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1


def train(recipe: Recipe, digits: Digits) -> nn.Module:
    """Train a network from its seed and return it in evaluation mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = recipe.net()
    images = torch.from_numpy(preprocess(LEVELS[digits.indices]))
    labels = torch.from_numpy(digits.labels)
    batches = len(images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.epochs * batches, pct_start=0.15
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(1, recipe.epochs + 1):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: batches * BATCH].reshape(batches, BATCH):
            loss = loss_of(net(augment(images[rows], generator)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 5 == 0:
            print(f"{recipe.name}: epoch {epoch}/{recipe.epochs}, loss {total / batches:.3f}", flush=True)
    return net.eval()


def export(net: nn.Module, path: Path) -> None:
    """Export with a dynamic batch and with the BatchNormalization nodes.

    TrainingMode.PRESERVE on a network in eval mode keeps them as they are at inference; with the default,
    TrainingMode.EVAL, the exporter folds each of them into the convolution before it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's age, and folding beside PRESERVE: both are meant
        torch.onnx.export(
            net,
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def measure(model: Path, folder: Path) -> float:
    """Return the accuracy of an ONNX file, run by onnxruntime on a folder of labelled pictures."""
    paths = sorted(folder.glob("*/*.png"))
    grey = np.stack([np.asarray(Image.open(path).convert("L")) for path in paths])
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(["logits"], {"image": preprocess(grey)})[0])
    return float(np.mean(logits.argmax(axis=1) == [int(path.parent.name) for path in paths]))


def main() -> None:
    """Write the pictures, then train, export and measure each network."""
    parser = argparse.ArgumentParser(description="Make the example models and their data anew.")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write to (default: the repository)")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)  # the same sums in the same order on any number of cores
    torch.use_deterministic_algorithms(True)
    training, calibration, held_out = load_splits()
    write_calibration(calibration, out / "calibration_data" / "digits")
    labelled = out / "calibration_data" / "digits_eval"
    write_labelled(held_out, labelled)
    (out / "models").mkdir(exist_ok=True)
    for recipe in RECIPES:
        start = time.perf_counter()
        path = out / "models" / f"{recipe.name}.onnx"
        export(train(recipe, training), path)
        accuracy, size = measure(path, labelled), path.stat().st_size / 1000
        print(f"{path.name}: {accuracy:.2%} right, {size:.0f} kB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
