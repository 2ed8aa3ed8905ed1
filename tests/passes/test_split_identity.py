import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights

from onnxq import graph
from onnxq.passes import FLOOR_DB, FuseBranches, SplitIdentity, rewrites

TEXT = """g (float[N,C,9,7] x, float[O,C,3,3] w, float[O] b) => (float[N,O,h,v] y) {
    h = Conv<ATTRIBUTES>(x, w, b) y = Relu(h)
}"""


def made(identity=3.0, channels=24, outputs=24, attributes="pads = [1, 1, 1, 1]", seed=0):
    kernel = 0.02 * weights(outputs, channels, 3, 3, seed=seed)
    both = min(channels, outputs)
    kernel[range(both), range(both), 1, 1] += identity * (0.5 + np.random.default_rng(seed).random(both))
    text = TEXT.replace("C,", f"{channels},").replace("O,", f"{outputs},").replace("[O]", f"[{outputs}]")
    m = model(text.replace("ATTRIBUTES", attributes), w=kernel.astype(np.float32), b=weights(outputs, seed=1))
    graph.infer_shapes(m)
    return m


def feeds(channels=24):
    return {"x": weights(3, channels, 9, 7, seed=5)}


@pytest.mark.parametrize("attributes", ["pads = [1, 1, 1, 1]", "pads = [2, 2, 2, 2], dilations = [2, 2]"])
def test_an_identity_in_the_middle_goes_beside_the_kernel(attributes):
    m = made(attributes=attributes)
    before, kept = run(m, feeds()), next(graph.nodes(m, "Conv")).name
    assert SplitIdentity(FLOOR_DB)(m) == 1
    alone, rest = graph.nodes(m, "Conv")
    assert rest.name == kept  # patterns of names still hold
    kernel, factors = graph.constant(rest.inputs[1]), graph.constant(alone.inputs[1])
    assert not kernel[range(24), range(24), 1, 1].any()
    assert kernel[0, 1, 1, 1] != 0
    assert factors.shape == (24, 1, 1, 1)
    assert graph.attribute(alone, "group", 1) == 24
    assert len(alone.inputs) == 2  # the bias stays with the kernel
    assert_same_outputs(before, run(m, feeds()), rtol=1e-5, atol=1e-5)
    assert SplitIdentity(FLOOR_DB)(m) == 0
    assert FuseBranches(FLOOR_DB)(m) == 0  # which undid it else


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": 0.1},
        {"outputs": 25},
        {"attributes": "pads = [1, 1, 1, 1], strides = [2, 2]"},
        {"attributes": "pads = [0, 0, 2, 2]"},
        {"attributes": "pads = [1, 1, 1, 1], dilations = [2, 2]"},
        {"attributes": 'auto_pad = "SAME_UPPER"'},
    ],
)
def test_what_stays(changed):
    m = made(**changed)
    assert SplitIdentity(FLOOR_DB)(m) == 0
    assert SplitIdentity(None)(made()) == 0


def test_a_kernel_that_no_split_helps_stays():
    m = made()
    conv = next(graph.nodes(m, "Conv"))
    kernel = graph.constant(conv.inputs[1]).copy()
    kernel[:, 0, 0, 0] = 3.0  # as large as the identity, elsewhere
    graph.replace_constant(m, conv, 1, kernel)
    assert SplitIdentity(FLOOR_DB)(m) == 0


def test_a_result_of_the_model_keeps_its_name():
    m = made()
    relu = next(graph.nodes(m, "Relu"))
    graph.bypass(relu, m)
    before = run(m, feeds())
    assert SplitIdentity(FLOOR_DB)(m) == 1
    assert_same_outputs(before, run(m, feeds()), rtol=1e-5, atol=1e-5)


def test_it_is_among_the_rewrites_where_kernels_have_to_fit_a_grid():
    for floor in (20.0, None):
        assert [each.floor_db for each in rewrites(floor) if isinstance(each, SplitIdentity)] == [floor]
