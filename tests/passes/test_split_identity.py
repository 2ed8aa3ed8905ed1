import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights

import onnxq
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
    rest, alone = graph.nodes(m, "Conv")
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


CHAIN = """g (float[N,24,9,7] x, float[24,24,3,3] u, float[24,24,3,3] v, float[24,24,3,3] w) => (float[N,24,9,7] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, u)
    b = Conv<pads = [1, 1, 1, 1]>(a, v)
    r = Relu(b)
    y = Conv<pads = [1, 1, 1, 1]>(r, w)
}"""


def kernel_with_identity(seed):
    kernel = 0.02 * weights(24, 24, 3, 3, seed=seed)
    kernel[range(24), range(24), 1, 1] += 1.0 + 0.3 * np.random.default_rng(seed).random(24)
    return kernel.astype(np.float32)


def chain():
    m = model(CHAIN, **{name: kernel_with_identity(seed) for seed, name in enumerate("uvw")})
    for name, node in zip(("c1", "c2", "c3"), graph.nodes(m, "Conv"), strict=True):
        node.name = name
    graph.infer_shapes(m)
    return m


def test_neighbours_are_split_and_the_ends_stay_the_ends():
    m = chain()
    before = run(m, feeds())
    assert SplitIdentity(FLOOR_DB)(m) == 3
    assert_same_outputs(before, run(m, feeds()), rtol=1e-4, atol=1e-4)
    names = [node.name for node in graph.nodes(m, "Conv")]
    assert names == ["c1", "c1_identity", "c2_identity", "c2", "c3_identity", "c3"]


def quantized(tmp_path, **changes):
    path = tmp_path / "chain.onnx"
    graph.save(chain(), path)
    return onnxq.quantize(path, {"x": weights(32, 24, 9, 7)}, checks=onnxq.Checks(verify=False), **changes)


def test_bits_of_the_ends_and_layers_in_float_hold_for_what_is_split(tmp_path):
    found = quantized(tmp_path, weight_bits=4, first_last=8).plan
    assert {name: grid.bits for name, grid in found.weights.items() if "identity" not in name} == {
        "c1": 8, "c2": 4, "c3": 8
    }  # fmt: skip
    kept = quantized(tmp_path, keep_float=("c2",)).plan
    assert {"c1", "c3"} <= set(kept.weights)
    assert not {"c2", "c2_identity"} & set(kept.weights)


@pytest.mark.parametrize("changes", [{"target": "cuda"}, {"without": ("SplitIdentity",)}])
def test_where_nothing_is_rounded_nothing_is_split(tmp_path, changes):
    model = quantized(tmp_path, **changes).prepared.model
    assert len(list(graph.nodes(model, "Conv"))) == 3


def test_a_kernel_of_zeros_stays():
    m = made()
    conv = next(graph.nodes(m, "Conv"))
    graph.replace_constant(m, conv, 1, np.zeros((24, 24, 3, 3), np.float32))
    assert SplitIdentity(FLOOR_DB)(m) == 0


def test_it_is_among_the_rewrites_where_kernels_have_to_fit_a_grid():
    for floor in (20.0, None):
        assert [each.floor_db for each in rewrites(floor) if isinstance(each, SplitIdentity)] == [floor]
