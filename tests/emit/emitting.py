"""Small models quantized, and what must hold for every one of them."""

import numpy as np
import onnx
from helpers import run

from onnxq import graph, runtime
from onnxq.emit import emit
from onnxq.pipeline.verify import kernel_gap
from onnxq.plan import Precision, Range, make_plan, place

EIGHT = Precision()


def quantized(model, feeds, precision=EIGHT, **choices):
    """(plan, emitted model), with the ranges that `feeds` give."""
    placement = place(model, **choices)
    inner = [name for name in placement.tensors if name not in feeds]
    seen = dict(feeds) | run(graph.with_outputs(model, inner), feeds)
    ranges = {name: Range(float(seen[name].min()), float(seen[name].max()), "seen") for name in placement.tensors}
    plan = make_plan(model, placement, ranges, precision)
    return plan, emit(model, plan)


def sqnr(model, emitted, feeds):
    """Signal-to-noise ratio in decibels of the worst output, at full optimisation against the float model."""
    wanted, got = run(model, feeds), run(emitted, feeds, optimize="all")
    assert list(wanted) == list(got)
    ratios = []
    for name, expected in wanted.items():
        assert got[name].shape == expected.shape
        assert got[name].dtype == expected.dtype
        signal, noise = np.square(expected).sum(), np.square(got[name] - expected).sum()
        if noise > 0:
            ratios.append(10 * np.log10(max(signal, 1e-30) / noise))
    return min(ratios, default=np.inf)


def kernels(emitted):
    """Operators of the graph that the runtime executes, in order."""
    return [node.op_type for node in runtime.optimized(emitted).graph]


def restored_constants(emitted):
    """Names of the constants that the runtime dequantizes at every call."""
    return [
        node.inputs[0].name
        for node in runtime.optimized(emitted).graph
        if node.op_type == "DequantizeLinear" and graph.constant(node.inputs[0]) is not None
    ]


def stored(emitted, name):
    """The array of an initializer."""
    return graph.constant(graph.value_map(emitted)[name])


def assert_weights(model, emitted, plan):
    """Stored integers and scales, computed again from the float model with numpy alone."""
    nodes = graph.node_names(model)
    for name, grid in plan.weights.items():
        node = nodes[name]
        weight = graph.constant(node.inputs[1])
        axis = {"Conv": 0, "MatMul": 1, "Gemm": 0 if graph.attribute(node, "transB", 0) else 1}[node.op_type]
        assert grid.axis == axis
        others = tuple(i for i in range(weight.ndim) if i != axis)
        steps = (np.abs(weight).max(axis=others) / 127).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        alive = steps > 0
        codes = np.clip(np.rint(weight / np.where(alive, steps, 1).reshape(shape)), -127, 127)
        np.testing.assert_allclose(stored(emitted, f"{name}.weight_scale")[alive], steps[alive], rtol=1e-6)
        assert (stored(emitted, f"{name}.weight_scale") > 0).all()
        assert stored(emitted, f"{name}.weight_q").dtype == np.int8
        np.testing.assert_array_equal(stored(emitted, f"{name}.weight_q"), codes)
        assert not stored(emitted, f"{name}.weight_zero_point").any()
        restore = graph.node_names(emitted)[f"{name}.weight_dq"]
        assert graph.attribute(restore, "axis", None) == axis


def assert_bias(emitted, name, bias, input_scale):
    """The int32 bias of a layer: its scale is the product of the input's and the weight's."""
    scale = (np.float32(input_scale) * stored(emitted, f"{name}.weight_scale")).astype(np.float32)
    np.testing.assert_array_equal(stored(emitted, f"{name}.bias_scale"), scale)
    codes = stored(emitted, f"{name}.bias_q")
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, np.rint(np.asarray(bias, np.float64).reshape(-1) / scale))


def assert_good(model, feeds, *, least=25.0, precision=EIGHT, restored=(), **choices):
    """Everything that holds for any emitted model; returns (plan, emitted model, kernels)."""
    before = graph.to_bytes(model)
    plan, emitted = quantized(model, feeds, precision, **choices)
    assert graph.to_bytes(model) == before
    assert graph.to_bytes(emit(model, plan)) == graph.to_bytes(emitted)
    onnx.checker.check_model(graph.to_bytes(emitted), full_check=True)
    assert sqnr(model, emitted, feeds) >= least
    assert kernel_gap(emitted, feeds) <= 1
    if precision == EIGHT:
        assert_weights(model, emitted, plan)
        assert sorted(restored_constants(emitted)) == sorted(restored)
    return plan, emitted, kernels(emitted)
