"""ONNX models with the shapes of well-known networks and random weights, for latency and memory.

    python benchmarks/shaped.py --out DIR [--models resnet50 mobilenetv2 efficientnet bert vit] [--samples 16]

Writes DIR/NAME.onnx and DIR/NAME/00000.npz, ...: unit Gaussian feeds of one sample each. The CNNs are in the
form of an exported network with its BatchNormalization folded; BERT-base and ViT-B/16 have two layers of
twelve. Weights are He-normal, N(0, 2 / fan_in); the branches of residual sums are scaled down to keep the
sums in range. Equal seeds give equal files. The outputs mean nothing: use these for time and kernels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR = 17, 8
Shape = Sequence[int | str]
BATCH = "batch"
TOKENS, WIDTH, HEADS, HIDDEN = 128, 768, 12, 3072


class Network:
    """A graph under construction: every method adds nodes and returns the name of its output."""

    def __init__(self, name: str, shape: Shape, seed: int) -> None:
        """Start a graph with one float input `x`."""
        self._name, self._shape = name, shape
        self._random = np.random.default_rng([seed, *name.encode()])
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        """Store an initializer."""
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(value, name))
        return name

    def integers(self, *values: int) -> str:
        """Store an int64 vector."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Store a float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def normal(self, *shape: int, spread: float) -> str:
        """Store Gaussian numbers with this standard deviation."""
        return self.constant(self._random.standard_normal(shape, np.float32) * np.float32(spread))

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        name = f"{op.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def model(self, output: str, shape: Shape) -> onnx.ModelProto:
        """Close the graph with one output."""
        self._nodes[-1].output[0] = output
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self._shape)
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self._nodes, self._name, [x], [y], self._weights)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="shaped")
        onnx.checker.check_model(model, full_check=True)
        return model

    def conv(
        self, x: str, n_in: int, n_out: int, kernel: int, stride: int = 1, group: int = 1, gain: float = 1.0
    ) -> str:
        """Convolution with bias and full padding; the weights are N(0, gain^2 * 2 / fan_in)."""
        fan_in = n_in // group * kernel**2
        weight = self.normal(n_out, n_in // group, kernel, kernel, spread=gain * math.sqrt(2 / fan_in))
        bias = self.normal(n_out, spread=0.05)
        size = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self.node("Conv", x, weight, bias, group=group, **size)

    def linear(self, x: str, n_in: int, n_out: int) -> str:
        """MatMul and Add, as exporters write a linear layer on [batch, tokens, features]."""
        product = self.node("MatMul", x, self.normal(n_in, n_out, spread=math.sqrt(2 / n_in)))
        return self.node("Add", product, self.normal(n_out, spread=0.05))

    def classifier(self, x: str, n_in: int) -> onnx.ModelProto:
        """The last layer, 1000 classes, on [batch, features]."""
        weight = self.normal(1000, n_in, spread=math.sqrt(2 / n_in))
        self.node("Gemm", x, weight, self.normal(1000, spread=0.05), transB=1)
        return self.model("logits", [BATCH, 1000])

    def pooled_classifier(self, x: str, channels: int) -> onnx.ModelProto:
        """Global average pooling and the last layer."""
        return self.classifier(self.node("Flatten", self.node("GlobalAveragePool", x), axis=1), channels)

    def layer_norm(self, x: str) -> str:
        """LayerNormalization over the features."""
        scale = self.constant(1 + 0.1 * self._random.standard_normal(WIDTH, np.float32))
        return self.node("LayerNormalization", x, scale, self.normal(WIDTH, spread=0.05), axis=-1)

    def gelu(self, x: str) -> str:
        """GELU as the chain that exporters write: x * (1 + erf(x / sqrt(2))) * 0.5."""
        erf = self.node("Erf", self.node("Div", x, self.scalar(math.sqrt(2))))
        product = self.node("Mul", x, self.node("Add", erf, self.scalar(1)))
        return self.node("Mul", product, self.scalar(0.5))

    def attention(self, x: str) -> str:
        """Multi-head self-attention with its output projection."""
        parts = []
        for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):  # queries, transposed keys, values
            split = self.node("Reshape", self.linear(x, WIDTH, WIDTH), self.integers(0, 0, HEADS, WIDTH // HEADS))
            parts.append(self.node("Transpose", split, perm=order))
        scores = self.node("Div", self.node("MatMul", parts[0], parts[1]), self.scalar(math.sqrt(WIDTH / HEADS)))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), parts[2])
        mixed = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.linear(self.node("Reshape", mixed, self.integers(0, 0, WIDTH)), WIDTH, WIDTH)

    def feed_forward(self, x: str) -> str:
        """The two linear layers of a transformer layer with GELU between."""
        return self.linear(self.gelu(self.linear(x, WIDTH, HIDDEN)), HIDDEN, WIDTH)


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """ResNet-50 (He et al., arXiv:1512.03385) with the stride in the 3x3 convolution: 25.5 M weights."""
    net = Network("resnet50", [BATCH, 3, 224, 224], seed)
    x = net.node("Relu", net.conv("x", 3, 64, 7, 2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width, wide = 64 << stage, 256 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            branch = net.node("Relu", net.conv(x, channels, width, 1))
            branch = net.node("Relu", net.conv(branch, width, width, 3, stride))
            branch = net.conv(branch, width, wide, 1, gain=0.5)
            shortcut = x if block else net.conv(x, channels, wide, 1, stride, gain=0.7)
            x, channels = net.node("Relu", net.node("Add", branch, shortcut)), wide
    return net.pooled_classifier(x, channels)


def mobilenetv2(seed: int = 0) -> onnx.ModelProto:
    """MobileNetV2 1.0 (Sandler et al., arXiv:1801.04381): 3.5 M weights."""
    net = Network("mobilenetv2", [BATCH, 3, 224, 224], seed)
    low, high = net.scalar(0), net.scalar(6)

    def relu6(x: str) -> str:
        return net.node("Clip", x, low, high)

    x, channels = relu6(net.conv("x", 3, 32, 3, 2)), 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    for expand, wide, depth, first in (*stages, (6, 320, 1, 1)):
        for stride in (first, *[1] * (depth - 1)):
            width = channels * expand
            branch = x if expand == 1 else relu6(net.conv(x, channels, width, 1))
            branch = relu6(net.conv(branch, width, width, 3, stride, group=width))
            branch = net.conv(branch, width, wide, 1, gain=0.7)
            same = stride == 1 and channels == wide
            x, channels = net.node("Add", x, branch) if same else branch, wide
    return net.pooled_classifier(relu6(net.conv(x, channels, 1280, 1)), 1280)


def efficientnet(seed: int = 0) -> onnx.ModelProto:
    """EfficientNet-B0 (Tan and Le, arXiv:1905.11946): 5.3 M weights, SiLU, squeeze and excitation."""
    net = Network("efficientnet", [BATCH, 3, 224, 224], seed)

    def silu(x: str) -> str:
        return net.node("Mul", x, net.node("Sigmoid", x))

    def excited(x: str, width: int, narrow: int) -> str:
        pooled = net.node("GlobalAveragePool", x)
        gate = net.conv(silu(net.conv(pooled, width, narrow, 1)), narrow, width, 1)
        return net.node("Mul", x, net.node("Sigmoid", gate))

    x, channels = silu(net.conv("x", 3, 32, 3, 2)), 32
    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
    for expand, wide, depth, first, kernel in (*stages, (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
        for stride in (first, *[1] * (depth - 1)):
            width = channels * expand
            branch = x if expand == 1 else silu(net.conv(x, channels, width, 1))
            branch = silu(net.conv(branch, width, width, kernel, stride, group=width))
            branch = net.conv(excited(branch, width, channels // 4), width, wide, 1, gain=0.7)
            same = stride == 1 and channels == wide
            x, channels = net.node("Add", x, branch) if same else branch, wide
    return net.pooled_classifier(silu(net.conv(x, channels, 1280, 1)), 1280)


def bert(seed: int = 0, layers: int = 2) -> onnx.ModelProto:
    """Layers of BERT-base (Devlin et al., arXiv:1810.04805) on hidden states [1, 128, 768], norms last."""
    shape = [1, TOKENS, WIDTH]
    net = Network("bert", shape, seed)
    x = "x"
    for _ in range(layers):
        x = net.layer_norm(net.node("Add", net.attention(x), x))
        x = net.layer_norm(net.node("Add", net.feed_forward(x), x))
    return net.model("hidden", shape)


def vit(seed: int = 0, layers: int = 2) -> onnx.ModelProto:
    """Layers of ViT-B/16 (Dosovitskiy et al., arXiv:2010.11929) with stem and head, norms first."""
    net = Network("vit", [BATCH, 3, 224, 224], seed)
    weight = net.normal(WIDTH, 3, 16, 16, spread=math.sqrt(2 / 768))
    patches = net.node("Conv", "x", weight, net.normal(WIDTH, spread=0.05), kernel_shape=[16, 16], strides=[16, 16])
    patches = net.node("Transpose", net.node("Reshape", patches, net.integers(0, WIDTH, -1)), perm=[0, 2, 1])
    batch = net.node("Slice", net.node("Shape", "x"), net.integers(0), net.integers(1))
    shape = net.node("Concat", batch, net.integers(1, WIDTH), axis=0)
    token = net.node("Expand", net.normal(1, 1, WIDTH, spread=1), shape)
    x = net.node("Concat", token, patches, axis=1)
    x = net.node("Add", x, net.normal(1, 197, WIDTH, spread=0.5))
    for _ in range(layers):
        x = net.node("Add", x, net.attention(net.layer_norm(x)))
        x = net.node("Add", x, net.feed_forward(net.layer_norm(x)))
    first = net.node("Gather", net.layer_norm(x), net.constant(np.array(0, np.int64)), axis=1)
    return net.classifier(first, WIDTH)


MODELS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "efficientnet": efficientnet,
    "bert": bert,
    "vit": vit,
}


def write_feeds(model: onnx.ModelProto, folder: Path, samples: int, seed: int = 0) -> None:
    """Write unit Gaussian inputs, one sample in a file."""
    entry = model.graph.input[0]
    shape = [dim.dim_value or 1 for dim in entry.type.tensor_type.shape.dim]
    random = np.random.default_rng([seed, 1, *model.graph.name.encode()])
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npz"):
        stale.unlink()
    for i in range(samples):
        feed: dict[str, Any] = {entry.name: random.standard_normal(shape, np.float32)}
        np.savez(folder / f"{i:05d}.npz", **feed)


def main() -> None:
    """Write the models and their feeds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = MODELS[name](args.seed)
        path = args.out / f"{name}.onnx"
        onnx.save(model, path)
        write_feeds(model, args.out / name, args.samples, args.seed)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(model.graph.node)} nodes")


if __name__ == "__main__":
    main()
