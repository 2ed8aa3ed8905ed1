import numpy as np
import pytest
from helpers import model, weights

from onnxq import graph
from onnxq.graph.gates import open_gate, with_gates
from onnxq.grid import Grid, fake_quantize
from onnxq.runtime import Session, SessionConfig

GRIDS = [Grid(8, signed=False, symmetric=False), Grid(4, signed=False, symmetric=False), Grid(5)]
GATED = """g (float[N,6] x, float[6,6] w, float[6,3] v) => (float[N,3] y, float[N,6] s) {
    [first] h = MatMul(x, w)
    [second] y = MatMul(h, v)
    [sum] s = Add(h, x)
}"""


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("optimize", ["off", "all"])
def test_gates_round_one_value_for_some_readers(ir_version, optimize):
    w, v, x = weights(6, 6), weights(6, 3), weights(9, 6, seed=8)
    made = model(GATED, w=w, v=v)
    made.ir_version = ir_version
    names = {node.op_type + str(at): node.name for at, node in enumerate(made.graph)}
    before = graph.to_bytes(made)
    gated = with_gates(made, {"x": [names["MatMul0"]], "h": [names["MatMul1"]]})
    assert graph.to_bytes(made) == before
    session = Session(gated, SessionConfig(threads=1, optimize=optimize))
    assert [spec.name for spec in session.inputs] == ["x"]
    h = x @ w

    def same(found, y, s):
        np.testing.assert_allclose(found["y"], y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["s"], s, rtol=1e-4, atol=1e-5)

    same(session.run({"x": x}), h @ v, h + x)
    for grid in GRIDS:
        step, zero = grid.from_range(-1.5, 2.0)
        feeds = {number: {"x": x} | open_gate(number, step, grid.qmin - zero, grid.qmax - zero) for number in (0, 1)}
        inside = fake_quantize(x, step, zero, grid) @ w
        same(session.run(feeds[0]), inside @ v, inside + x)
        same(session.run(feeds[1]), fake_quantize(h, step, zero, grid) @ v, h + x)
    same(session.run({"x": x}), h @ v, h + x)
