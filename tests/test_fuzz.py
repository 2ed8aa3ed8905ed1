"""Random graphs and mutated files: quantized close to float, or refused; never a crash.

ONNXQ_FUZZ multiplies the number of examples.
"""

import importlib
import os
import random
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.bench import gap_in_steps
from onnxq.errors import OnnxqError
from onnxq.pipeline import quantize
from onnxq.pipeline.run import Checks
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Silence

MORE = int(os.environ.get("ONNXQ_FUZZ", "1"))
CNN = Path(__file__).parent.parent / "models" / "digits_cnn.onnx"
ROWS = 7
"""None of fewer than eight is held out: every row that is judged was calibrated on."""
LEAST_DB, MOST_ERROR = 12.0, 0.1
OPTIMIZED, PLAIN = SessionConfig(threads=1), SessionConfig(threads=1, optimize="off")
RELAXED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], print_blob=True
)


class Listening(Silence):
    """Keeps the warnings of a run."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


class Builder:
    """A graph that grows by operators on values of [n, channels, height, width], or [n, features] after a Flatten."""

    def __init__(self, draw, shape):
        self.draw, self.nodes, self.constants = draw, [], {}
        self.shapes = {"x": shape}
        self.opsets = [14, 17, 21]
        self.rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def pick(self, rank=None, like=None):
        """The name of a value of that rank, or of the shape of another; None where there is none."""
        names = [
            name
            for name, shape in self.shapes.items()
            if (rank is None or len(shape) == rank) and (like is None or shape == self.shapes[like])
        ]
        return self.draw(st.sampled_from(names[-6:])) if names else None

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, *shape):
        """Random weights, often those of another node of that shape."""
        same = [name for name, array in self.constants.items() if array.shape == shape]
        if same and self.draw(st.booleans()):
            return self.draw(st.sampled_from(same))
        fan = max(int(np.prod(shape[1:])), 1)
        return self.constant(self.rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(fan)))

    def add(self, op, inputs, shape, **attributes):
        out = f"v{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [out], **attributes))
        self.shapes[out] = tuple(shape)

    def conv(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        kernel, stride, pad = (self.draw(st.integers(*span)) for span in ((1, 3), (1, 2), (0, 1)))
        after = [(size + pad - kernel) // stride + 1 for size in (high, wide)]
        if min(after) < 1 or max(high, wide) + pad < kernel:
            return
        depthwise = self.draw(st.integers(0, 3)) == 0
        made = channels if depthwise else self.draw(st.integers(1, 5))
        inputs = [x, self.weight(made, 1 if depthwise else channels, kernel, kernel)]
        if self.draw(st.booleans()):
            inputs.append(self.weight(made))
        attributes = {"pads": [pad, 0, 0, pad], "strides": [stride] * 2, "group": channels if depthwise else 1}
        self.add("Conv", inputs, (made, *after), **attributes)

    def transposed(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        made = self.draw(st.integers(1, 3))
        self.add("ConvTranspose", [x, self.weight(channels, made, 2, 2)], (made, 2 * high, 2 * wide), strides=[2, 2])

    def norm(self):
        x = self.pick(3)
        channels = self.shapes[x][0]
        scale, bias, mean = (self.rng.normal(size=channels).astype(np.float32) for _ in range(3))
        var = self.rng.uniform(0.2, 2, channels).astype(np.float32)
        names = [self.constant(array) for array in (scale, bias, mean, var)]
        self.add("BatchNormalization", [x, *names], self.shapes[x], epsilon=0.1)

    def activation(self):
        x = self.pick()
        kinds = ["Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Elu", "Identity", "HardSigmoid", "Neg", "Abs"]
        self.add(self.draw(st.sampled_from(kinds)), [x], self.shapes[x])

    def silu(self):
        x, name = self.pick(), f"v{len(self.nodes)}"
        self.add("Sigmoid", [x], self.shapes[x])
        self.add("Mul", self.draw(st.permutations([x, name])), self.shapes[x])

    def gelu(self):
        x = self.pick()
        root, one, half = (self.constant(np.float32(value)) for value in (2**0.5, 1, 0.5))
        for op, second in (("Div", root), ("Erf", None), ("Add", one), ("Mul", x), ("Mul", half)):
            first = x if op == "Div" else f"v{len(self.nodes) - 1}"
            self.add(op, [first, second] if second else [first], self.shapes[x])

    def layer_norm(self):
        x = self.pick()
        wide = self.shapes[x][-1]
        scale, shift = (self.rng.uniform(low, 2, wide).astype(np.float32) for low in (0.1, -2))
        self.opsets = [17, 21]
        self.add("LayerNormalization", [x, self.constant(scale), self.constant(shift)], self.shapes[x], epsilon=0.1)

    def projected(self):
        """The last axis of any value times a matrix, with or without a bias."""
        x = self.pick()
        made = self.draw(st.integers(1, 6))
        shape = (*self.shapes[x][:-1], made)
        self.add("MatMul", [x, self.weight(self.shapes[x][-1], made)], shape)
        if self.draw(st.booleans()):
            operands = [f"v{len(self.nodes) - 1}", self.weight(made)]
            self.add("Add", self.draw(st.permutations(operands)), shape)

    def clip(self):
        x = self.pick()
        low, high = (self.constant(np.float32(value)) for value in (-0.5, 1.5))
        self.add("Clip", [x, low, high], self.shapes[x])

    def binary(self):
        x = self.pick()
        self.add(self.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"])), [x, self.pick(like=x)], self.shapes[x])

    def by_constant(self):
        x = self.pick()
        shape = self.shapes[x]
        sides = [(1, shape[0], *(1,) * (len(shape) - 1)), (1,) * (len(shape) + 1), (1, *shape)]
        array = self.rng.uniform(0.5, 2, self.draw(st.sampled_from(sides))).astype(np.float32)
        operands = [x, self.constant(array)]
        op = self.draw(st.sampled_from(["Add", "Mul", "Sub", "Div"]))
        self.add(op, operands[::-1] if op != "Div" and self.draw(st.booleans()) else operands, shape)

    def concat(self):
        x = self.pick()
        rank, rest = len(self.shapes[x]), self.shapes[x][1:]
        fitting = [name for name, shape in self.shapes.items() if (len(shape), shape[1:]) == (rank, rest)]
        y = self.draw(st.sampled_from(fitting))
        self.add("Concat", [x, y], (self.shapes[x][0] + self.shapes[y][0], *self.shapes[x][1:]), axis=1)

    def pool(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        op = self.draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool"]))
        if op == "GlobalAveragePool":
            self.add(op, [x], (channels, 1, 1))
        elif min(high, wide) >= 2:
            self.add(op, [x], (channels, high // 2, wide // 2), kernel_shape=[2, 2], strides=[2, 2])

    def moved(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        self.add("Transpose", [x], (channels, wide, high), perm=[0, 1, 3, 2])

    def cut(self):
        x = self.pick()
        shape = self.shapes[x]
        if shape[0] > 1:
            ends = [self.constant(np.array([value], np.int64)) for value in (1, 1 << 60, 1)]
            self.add("Slice", [x, *ends], (shape[0] - 1, *shape[1:]))

    def padded(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        pads = self.constant(np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64))
        self.add("Pad", [x, pads], (channels, high + 1, wide + 1))

    def resized(self):
        x = self.pick(3)
        channels, high, wide = self.shapes[x]
        if max(high, wide) <= 8:
            scales = self.constant(np.array([1, 1, 2, 2], np.float32))
            self.add("Resize", [x, "", scales], (channels, 2 * high, 2 * wide), mode="nearest")

    def flattened(self):
        x = self.pick(3)
        self.add("Flatten", [x], (int(np.prod(self.shapes[x])),))

    def linear(self):
        x = self.pick(1)
        if x is None:
            self.flattened()
            return
        wide, made = self.shapes[x][0], self.draw(st.integers(1, 6))
        if self.draw(st.booleans()):
            self.add("MatMul", [x, self.weight(wide, made)], (made,))
        else:
            turned = self.draw(st.booleans())
            weight = self.weight(made, wide) if turned else self.weight(wide, made)
            bias = [self.weight(made)] if self.draw(st.booleans()) else []
            alpha = self.draw(st.sampled_from([1.0, 0.5]))
            self.add("Gemm", [x, weight, *bias], (made,), transB=int(turned), alpha=alpha)

    def softmax(self):
        x = self.pick()
        axis = self.draw(st.sampled_from([1, -1]))
        self.add("Softmax", [x], self.shapes[x], axis=axis)

    def branch(self):
        """An If whose branches capture a value and a weight."""
        x = self.pick()
        bodies = []
        for op, out in (("Relu", "t"), ("Neg", "e")):
            result = onnx.helper.make_tensor_value_info(f"{out}{len(self.nodes)}", 1, None)
            inner = onnx.helper.make_node(op, [x], [result.name])
            bodies.append(onnx.helper.make_graph([inner], out, [], [result]))
        condition = self.constant(np.array(self.draw(st.booleans())))
        self.add("If", [condition], self.shapes[x], then_branch=bodies[0], else_branch=bodies[1])

    STEPS = (
        conv, conv, conv, linear, transposed, norm, activation, activation, clip, binary, by_constant, concat, pool,
        moved, cut, padded, resized, softmax, branch, silu, gelu, layer_norm, projected, projected,
    )  # fmt: skip

    def model(self):
        """The model: what nothing reads is returned, at most three values, and sometimes an inner value, too."""
        read = {name for node in self.nodes for name in node.input}
        ends = [name for name in self.shapes if name not in read and name != "x"][-3:]
        inner = self.pick()
        if inner not in ("x", *ends) and self.draw(st.integers(0, 3)) == 0:
            ends.append(inner)

        def info(name):
            return onnx.helper.make_tensor_value_info(name, 1, ["n", *self.shapes[name]])

        made = onnx.helper.make_graph(self.nodes, "fuzz", [info("x")], [info(name) for name in ends])
        made.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items())
        opsets = [onnx.helper.make_opsetid("", self.draw(st.sampled_from(self.opsets)))]
        return onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)


@st.composite
def models(draw):
    """A model with three to ten random operators, one of them a layer at least."""
    builder = Builder(draw, (draw(st.integers(1, 4)), draw(st.integers(3, 6)), draw(st.integers(3, 6))))
    draw(st.sampled_from([Builder.conv, Builder.linear]))(builder)
    for step in draw(st.lists(st.sampled_from(Builder.STEPS), min_size=2, max_size=9)):
        step(builder)
    builder.linear()
    return builder.model()


def assert_close(wanted, got):
    """Outputs are as near as 8 bits allow; what cancels to nothing beside its inputs is not judged."""
    for name, expected in wanted.items():
        found = got[name]
        assert found.shape == expected.shape
        assert (np.isfinite(found) == np.isfinite(expected)).all(), name
        finite = np.isfinite(expected)
        x, error = expected[finite].astype(np.float64), (found - expected)[finite].astype(np.float64)
        if not x.size or not error.any():
            continue
        decibels = 10 * np.log10(max((x**2).mean(), 1e-30) / (error**2).mean())
        relative = np.abs(error).max() / max(np.ptp(x), np.abs(x).max())
        assert decibels >= LEAST_DB or relative <= MOST_ERROR or np.abs(error).max() < 0.02, (name, decibels, relative)


@pytest.fixture
def unsimplified(monkeypatch):
    """Leaves onnxsim out: a process per example is slow, and its faults are tested elsewhere."""
    prepare = importlib.import_module("onnxq.pipeline.prepare")
    monkeypatch.setattr(prepare.simplifier, "simplify", lambda model, **_: (model.clone(), None))


def outcome(call):
    """What a call returns; None where it refuses as it should, in one line and with the exit code of an input."""
    try:
        return call()
    except OnnxqError as error:
        refusal = error
    assert refusal.exit_code in (3, 4), refusal
    assert "\n" not in str(refusal)
    return None


def is_valid(path):
    """A Gemm may have been given a constant of another type as its C."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@settings(RELAXED, max_examples=8 * MORE)
@given(made=models(), seed=st.integers(0, 99))
def test_a_random_graph_is_quantized_closely_or_refused(made, seed, tmp_path, unsimplified):
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    assume(is_valid(path))
    shape = [dim.dim_value for dim in made.graph.input[0].type.tensor_type.shape.dim][1:]
    feeds = {"x": np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype(np.float32)}
    log = Listening()
    result = outcome(lambda: quantize(path, feeds, checks=Checks(time_it=False), log=log))
    if result is None:
        return
    assert not [text for text in log.warnings if "changed" in text]
    assert result.prepared.gap is not None
    assert result.prepared.gap < 1e-3
    wanted, plain = (Session(path, config).run(feeds) for config in (OPTIMIZED, PLAIN))
    # The runtime's own faults are not ours: it moves a Pad with zeros into a MaxPool, which pads with -infinity.
    own = gap_in_steps(plain, wanted)
    assert result.verdict.optimized_gap <= max(2, 2 * own)
    assert_close(wanted, Session(result.model, OPTIMIZED).run(feeds))
    assert_close(plain, Session(result.model, PLAIN).run(feeds))


def structure(content):
    """Offsets of the bytes of a model file that are not weights."""
    proto = onnx.ModelProto.FromString(content)
    inside = np.zeros(len(content), bool)
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > 16:
            begin = content.find(tensor.raw_data)
            inside[begin : begin + len(tensor.raw_data)] = True
    return np.flatnonzero(~inside).tolist()


CONTENT = CNN.read_bytes()
OFFSETS = structure(CONTENT)
VALUES = (0, 1, 2, 7, 8, 0x0A, 0x12, 0x7F, 0x80, 0xFE, 0xFF)


def mutated(generator):
    """The file with one to four bytes of its structure changed, removed, doubled or moved."""
    content = bytearray(CONTENT)
    for at in sorted(generator.sample(OFFSETS, generator.randint(1, 4)), reverse=True):
        kind = generator.randrange(5)
        if kind == 0:
            content[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[at] = generator.choice(VALUES)
        elif kind == 2:
            del content[at : at + generator.choice((1, 1, 2, 8, 100))]
        elif kind == 3:
            content[at:at] = bytes(generator.choice(VALUES) for _ in range(generator.choice((1, 2, 9))))
        else:
            other = generator.choice(OFFSETS)
            content[at : at + 12] = content[other : other + 12]
    return bytes(content)


@settings(RELAXED, max_examples=60 * MORE)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_is_a_model_or_refused(seed, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(mutated(random.Random(seed)))
    loaded = outcome(lambda: graph.load(path))
    if loaded is not None:
        graph.to_bytes(loaded)
        outcome(lambda: Session(loaded, SessionConfig(threads=1, optimize="off")))
