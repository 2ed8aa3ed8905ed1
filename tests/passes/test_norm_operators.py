import numpy as np
from helpers import model, weights

from onnxq import graph
from onnxq.passes.norms import norm_at, norms

GAMMA = weights(5, seed=1)


def shaped(m):
    graph.infer_shapes(m)
    return m


def only_norm(m):
    ((_, found),) = norms(m)
    return found


def operator(op, opset=17, source="float[2,4,3,3] x", size=4, attributes=""):
    text = (
        f"g ({source}, float[{size}] gamma, float[{size}] beta) => (float y) {{ y = {op}{attributes}(x, gamma, beta) }}"
    )
    return model(text, opset, gamma=weights(size, seed=1), beta=weights(size, seed=2))


def test_operators_are_found_with_their_channel_axis():
    found = only_norm(operator("LayerNormalization", source="float[2,4] x", attributes="<epsilon = 0.5>"))
    assert (found.kind, found.axis, found.epsilon) == ("layer", -1, 0.5)
    assert [index for _, index in (found.gamma_at, found.beta_at)] == [1, 2]
    found = only_norm(operator("InstanceNormalization"))
    assert (found.kind, found.axis) == ("instance", -3)
    found = only_norm(operator("GroupNormalization", 21, attributes="<num_groups = 2>"))
    assert (found.kind, found.axis) == ("group", -3)
    np.testing.assert_array_equal(found.beta, weights(4, seed=2))


def test_operators_over_other_axes_are_refused():
    m = operator("LayerNormalization", source="float[2,4,3] x", size=3, attributes="<axis = 1>")
    assert only_norm(m) == "it normalises over more than the last axis"


def test_rms_normalization_has_no_shift():
    m = model("g (float[2,5] x, float[5] gamma) => (float[2,5] y) { y = RMSNormalization(x, gamma) }", 23, gamma=GAMMA)
    found = only_norm(m)
    assert (found.kind, found.beta, found.beta_at, found.axis) == ("rms", None, None, -1)
    m.graph[0].op_type = "SimplifiedLayerNormalization"  # the runtime's own name for it
    assert only_norm(m).kind == "rms"


def torch_group_norm(mul="Mul"):
    m = model(
        f"""g (float[2,4,3,3] x, int64[3] split, int64[4] join, float[2] ones, float[2] zeros, float[4,1,1] gamma,
              float[4,1,1] beta) => (float[2,4,3,3] y) {{
            r = Reshape(x, split)
            i = InstanceNormalization(r, ones, zeros)
            b = Reshape(i, join)
            m = {mul}(b, gamma)
            y = Add(m, beta)
        }}""",
        split=np.array([0, 2, -1]),
        join=np.array([2, 4, 3, 3]),
        ones=np.ones(2, np.float32),
        zeros=np.zeros(2, np.float32),
        gamma=weights(4, 1, 1, seed=1),
        beta=weights(4, 1, 1, seed=2),
    )
    return shaped(m)


def test_torch_group_norm_takes_its_scale_from_the_mul_behind_it():
    found = only_norm(torch_group_norm())
    assert (found.kind, found.axis, found.source.name, found.output.name) == ("group", -3, "x", "y")
    np.testing.assert_array_equal(found.gamma, weights(4, 1, 1, seed=1).reshape(-1))
    assert len(found.nodes) == 5
    assert only_norm(torch_group_norm("Add")) == "its scale is one value per group, not per channel"


def test_other_nodes_are_no_head():
    m = model("g (float[2,5] x) => (float[2,5] y) { y = Relu(x) }")
    assert norm_at(m.graph[0]) == ""
