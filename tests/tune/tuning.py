"""Jobs of small models."""

import numpy as np
from helpers import model, run, weights

from onnxq import graph
from onnxq.plan import Block, Precision, Range, make_plan, place
from onnxq.tune import Job
from onnxq.tune.job import Rest
from onnxq.types import Tuned

FOUR = Precision(weight_bits=4, activation_bits=4, first_last=4)
MIXED = Precision(weight_bits=4, activation_bits=4)
TWO = Precision(weight_bits=2, activation_bits=8, first_last=2)
EIGHT = Precision()


def plan_of(m, batches, precision=EIGHT, shrink=1.0, **choices):
    """The plan of a model, with the ranges that `batches` give times `shrink`."""
    placement = place(m, **choices)
    inner = [name for name in placement.tensors if name not in batches[0]]
    ends = dict.fromkeys(placement.tensors, (0.0, 0.0))
    for feeds in batches:
        seen = dict(feeds) | run(graph.with_outputs(m, inner), feeds)
        for name, (low, high) in ends.items():
            ends[name] = min(low, float(seen[name].min())), max(high, float(seen[name].max()))
    ranges = {name: Range(low * shrink, high * shrink, "seen") for name, (low, high) in ends.items()}
    return make_plan(m, placement, ranges, precision)


def job_of(m, batches, *, train=None, held=None, seed=0):
    """All of `m` as one block; by default its last batch judges."""
    named = [str(node.name) for node in m.graph]
    layers = [name for name, node in graph.node_names(m).items() if not isinstance(graph.layer_of(node), str)]
    inputs, outputs = ([value.name for value in side] for side in (m.graph.inputs, m.graph.outputs))
    block = Block("block", tuple(inputs), tuple(outputs), tuple(named), tuple(layers), 0)
    part = graph.sub_model(m, inputs, outputs)
    targets = [run(part, feeds) for feeds in batches]
    last = len(batches) - 1
    train = tuple(range(last)) if train is None else train
    return Job(block, part, batches, batches, targets, train, (last,) if held is None else held, seed)


def made(m, shape, precision=EIGHT, *, batches=3, shrink=1.0, seed=0, alike=False, **choices):
    """(job, tuned) of a model with the input x, fed with random rows; or with `alike` ones, of correlated values."""
    feeds = [{"x": weights(*shape, seed=100 * seed + index)} for index in range(batches)]
    if alike:
        common = [weights(len(feed["x"]), *[1] * (len(shape) - 1), seed=index) for index, feed in enumerate(feeds)]
        feeds = [{"x": 0.3 * feed["x"] + one + 1} for feed, one in zip(feeds, common, strict=True)]
    plan = plan_of(m, feeds, precision, shrink, **choices)
    return job_of(m, feeds, seed=seed), Tuned(plan)


def ahead_of(job, seed=0):
    """A float Conv behind the output y of a job, and what it needs."""
    text = """g (float[n,6,6,6] y, float[n,2,6,6] r, float[2,6,1,1] t) => (float[n,2,6,6] e)
    { [t] d = Conv(y, t) e = Add(d, r) }"""
    m = model(text, t=weights(2, 6, 1, 1, seed=seed))
    floats = [{**targets, "r": weights(8, 2, 6, 6, seed=i)} for i, targets in enumerate(job.targets)]
    return Rest(m, ("y", "r"), ("e",), floats, [run(m, feeds) for feeds in floats])


RESIDUAL = """g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b, float[6,6,3,3] v, float[6] c, float[6,4,1,1] u)
=> (float[n,6,6,6] y) {
    [a] h = Conv<pads = [1, 1, 1, 1]>(x, w, b) i = Relu(h) [b] j = Conv<pads = [1, 1, 1, 1]>(i, v, c)
    [s] k = Conv(x, u) l = Add(j, k) y = Relu(l)
}"""


def residual():
    """Conv, Relu, Conv, beside a Conv without a bias; Add, Relu."""
    constants = {"w": weights(6, 4, 3, 3) / 4, "b": weights(6), "v": weights(6, 6, 3, 3) / 5, "c": weights(6, seed=1)}
    return model(RESIDUAL, **constants, u=weights(6, 4, 1, 1) / 2)


def concat():
    """Two Convs of one tensor, concatenated; a third one behind."""
    text = """g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b, float[5,6,1,1] v, float[7,6,3,3] u, float[3,12,1,1] t)
    => (float[n,3,6,6] y) {
        [a] h = Conv<pads = [1, 1, 1, 1]>(x, w, b) i = Relu(h) [b] j = Conv(i, v) k = Relu(j)
        [c] l = Conv<pads = [1, 1, 1, 1]>(i, u) m = Relu(l) o = Concat<axis = 1>(k, m) [d] y = Conv(o, t)
    }"""
    constants = {"w": weights(6, 4, 3, 3) / 4, "b": weights(6), "v": weights(5, 6, 1, 1), "u": weights(7, 6, 3, 3) / 5}
    return model(text, **constants, t=weights(3, 12, 1, 1))


def clipped():
    """Relu6 and a Clip around 0 that cut; strided and depthwise Convs."""
    text = """g (float[n,4,7,7] x, float[6,4,3,3] w, float[6] b, float[6,1,3,3] v, float[6] c, float[4,6,1,1] u,
    float z, float six, float lo, float hi) => (float[n,4,1,2] y) {
        [a] h = Conv<strides = [2, 1]>(x, w, b) i = Clip(h, z, six) [b] j = Conv<group = 6, strides = [1, 2]>(i, v, c)
        k = Clip(j, lo, hi) [d] l = Conv(k, u) y = MaxPool<kernel_shape = [1, 1]>(l)
    }"""
    constants = {"w": weights(6, 4, 3, 3), "b": weights(6), "v": weights(6, 1, 3, 3), "c": weights(6, seed=1)}
    ends = {"z": 0.0, "six": 6.0, "lo": -2.0, "hi": 3.0}
    return model(text, **constants, u=weights(4, 6, 1, 1), **{name: np.float32(end) for name, end in ends.items()})


def mlp():
    """MatMul and Add, a float Softmax that reads the same quantized tensor as the next MatMul; Gemm."""
    text = """g (float[n,5,8] x, float[8,12] w, float[12] b, float[12,6] v, float[6] c)
    => (float[n,5,6] y, float[n,5,12] p) {
        [a] h = MatMul(x, w) k = Add(b, h) i = Relu(k) p = Softmax(i) [b] j = MatMul(i, v) y = Add(j, c)
    }"""
    constants = {"w": weights(8, 12), "b": weights(12), "v": weights(12, 6), "c": weights(6)}
    return model(text, **constants)


def bare_gemm():
    """A Gemm without a bias, transposed, and one with."""
    text = """g (float[n,8] x, float[10,8] w, float[10,4] v, float[4] c) => (float[n,4] y) {
        [a] h = Gemm<transB = 1>(x, w) i = Relu(h) [b] y = Gemm(i, v, c)
    }"""
    return model(text, w=weights(10, 8), v=weights(10, 4), c=weights(4))


def handed_on():
    """A quantized tensor that is an output, too, and goes on inside."""
    text = """g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b, float[3,6,1,1] v)
    => (float[n,6,4,4] i, float[n,3,4,4] y) {
        [a] h = Conv(x, w, b) i = Relu(h) [b] y = Conv(i, v)
    }"""
    return model(text, w=weights(6, 4, 3, 3), b=weights(6), v=weights(3, 6, 1, 1))


IMAGE, ROWS = (8, 4, 6, 6), (8, 5, 8)
CASES = {
    "residual": (residual, IMAGE),
    "concat": (concat, IMAGE),
    "clip": (clipped, (8, 4, 7, 7)),
    "mlp": (mlp, ROWS),
    "gemm": (bare_gemm, (40, 8)),
    "output": (handed_on, IMAGE),
}
