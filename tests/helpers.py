"""Small models from ONNX text, and running them."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from onnxq import graph
from onnxq.runtime import Session, SessionConfig


def proto(text, opset=17, **constants):
    """The ModelProto of an ONNX text graph, such as `g (float[1,4] x, float[4,2] w) => (float[1,2] y) {...}`.

    Inputs of the graph that `constants` names become initializers. Unnamed nodes stay unnamed.
    """
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    inputs = [value for value in made.graph.input if value.name not in constants]
    unknown = set(constants) - {value.name for value in made.graph.input}
    assert not unknown, f"no such inputs: {unknown}"
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    for name, array in constants.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return made


def model(text, opset=17, **constants):
    """Like `proto`, but loaded the way a user's file is: checked, every node named."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto(text, opset, **constants), path)
        return graph.load(path)


def weights(*shape, seed=0, low=None, high=None):
    """Random float32 values: normal, or uniform in [low, high)."""
    generator = np.random.default_rng([seed, *shape])
    if low is None or high is None:
        return generator.normal(size=shape).astype(np.float32)
    return generator.uniform(low, high, size=shape).astype(np.float32)


def run(model, feeds, optimize="off"):
    """Outputs by name, as onnxruntime computes them without its own optimiser."""
    return Session(model, SessionConfig(threads=1, optimize=optimize)).run(feeds)


def ops(model):
    """Operator types of the main graph, in order."""
    return [node.op_type for node in model.graph]


def assert_same_outputs(before, after, rtol=1e-4, atol=1e-5):
    """Same names, shapes and types; values equal up to float32 rounding."""
    assert list(before) == list(after)
    for name, expected in before.items():
        assert after[name].dtype == expected.dtype
        np.testing.assert_allclose(after[name], expected, rtol=rtol, atol=atol, err_msg=name)
