from collections import Counter

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.fuse_layer_norm import FuseLayerNorm
from onnxq.passes.norms import norms, per_channel

X = weights(2, 3, 5, low=-1.0, high=3.0)
GAMMA, BETA = weights(5, seed=1), weights(5, seed=2)
EPS, TWO, ONE = np.float32(0.1), np.float32(2.0), np.float32(1.0)
HEAD = "g (float[2,3,5] x, float[5] gamma, float[5] beta, float eps, float two, float one) => (float[2,3,5] y)"

TORCH = """{
    mean = ReduceMean<axes = [-1]>(x)
    d = Sub(x, mean)
    sq = Pow(d, two)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    n = Div(d, root)
    m = Mul(n, gamma)
    y = Add(m, beta)
}"""
SWAPPED = """{
    mean = ReduceMean<axes = [2], keepdims = 1>(x)
    d = Sub(x, mean)
    sq = Mul(d, d)
    var = ReduceMean<axes = [2]>(sq)
    a = Add(eps, var)
    root = Sqrt(a)
    n = Div(d, root)
    m = Mul(gamma, n)
    y = Add(beta, m)
}"""
TWICE = """{
    mean2 = ReduceMean<axes = [-1]>(x)
    d2 = Sub(x, mean2)
    mean = ReduceMean<axes = [-1]>(x)
    d = Sub(x, mean)
    sq = Pow(d, two)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    n = Div(d2, root)
    m = Mul(gamma, n)
    y = Add(m, beta)
}"""
RECIPROCAL = """{
    mean = ReduceMean<axes = [-1]>(x)
    d = Sub(x, mean)
    sq = Mul(d, d)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    inv = Reciprocal(root)
    n = Mul(d, inv)
    m = Mul(n, gamma)
    y = Add(m, beta)
}"""
ONE_OVER = RECIPROCAL.replace("Reciprocal(root)", "Div(one, root)").replace("Mul(d, inv)", "Mul(inv, d)")
TENSORFLOW = """{
    mean = ReduceMean<axes = [-1]>(x)
    d = Sub(mean, x)
    sq = Mul(d, d)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    inv = Reciprocal(root)
    s = Mul(inv, gamma)
    xs = Mul(x, s)
    ms = Mul(mean, s)
    shift = Sub(beta, ms)
    y = Add(xs, shift)
}"""
VAR = "var = ReduceMean<axes = [-1]>(sq)"
FORMS = {
    "torch": TORCH,
    "swapped": SWAPPED,
    "twice": TWICE,
    "reciprocal": RECIPROCAL,
    "one over": ONE_OVER,
    "tensorflow": TENSORFLOW,
}
RMS = """{
    sq = Pow(x, two)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    inv = Div(one, root)
    n = Mul(x, inv)
    y = Mul(gamma, n)
}"""
RMS_MULTIPLIED = RMS.replace("n = Mul(x, inv)", "n = Mul(inv, gamma)").replace("Mul(gamma, n)", "Mul(x, n)")


def chain(body, opset=17, gamma=GAMMA, beta=BETA, head=HEAD):
    return shaped(model(f"{head} {body}", opset, gamma=gamma, beta=beta, eps=EPS, two=TWO, one=ONE))


def shaped(m):
    graph.infer_shapes(m)
    return m


def layer_norm(x, gamma=GAMMA, beta=BETA, axis=-1):
    centred = x - x.mean(axis, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(axis, keepdims=True) + 0.1) + beta


def only_norm(m):
    ((_, found),) = norms(m)
    return found


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS)
def test_every_form_of_the_chain_becomes_one_layer_norm(body):
    m = chain(body)
    assert apply(m, [FuseLayerNorm()], {"x": X})[0].count == 1
    assert ops(m) == ["LayerNormalization"]
    np.testing.assert_allclose(run(m, {"x": X})["y"], layer_norm(X), rtol=1e-4, atol=1e-5)
    assert FuseLayerNorm()(m) == 0
    assert FuseLayerNorm().refused(m) == {}


@pytest.mark.parametrize("body", [*FORMS.values(), RMS, RMS_MULTIPLIED])
def test_what_is_found_in_a_chain(body):
    m = chain(body)
    found = only_norm(m)
    layer = body not in (RMS, RMS_MULTIPLIED)
    assert (found.kind, found.axis, found.source.name, found.output.name) == ("layer" if layer else "rms", -1, "x", "y")
    assert found.epsilon == pytest.approx(0.1)
    np.testing.assert_array_equal(found.gamma, GAMMA)
    node, index = found.gamma_at
    assert node.inputs[index].name == "gamma"
    assert found.nodes[-1].outputs[0] is found.output
    assert Counter(found.nodes) == Counter(m.graph)
    if layer:
        np.testing.assert_array_equal(found.beta, BETA)
        node, index = found.beta_at
        assert node.inputs[index].name == "beta"
    else:
        assert found.beta is None
        assert found.beta_at is None
        assert FuseLayerNorm()(m) == 0
        assert FuseLayerNorm().refused(m) == {}


@pytest.mark.parametrize("opset", [13, 16])
def test_before_opset_17_each_chain_is_refused(opset):
    m = chain(TORCH, opset)
    assert FuseLayerNorm()(m) == 0
    assert list(FuseLayerNorm().refused(m).values()) == [f"LayerNormalization needs opset 17; the model has {opset}"]


def test_axes_as_an_input_from_opset_18_on():
    body = TORCH.replace("<axes = [-1]>(x)", "(x, axes)").replace("<axes = [-1]>(sq)", "(sq, axes)")
    head = HEAD.replace("float one", "float one, int64[1] axes")
    text = f"{head} {body}"
    axes = np.array([2])
    m = shaped(model(text, 18, gamma=GAMMA, beta=BETA, eps=EPS, two=TWO, one=ONE, axes=axes))
    assert FuseLayerNorm()(m) == 1
    np.testing.assert_allclose(run(m, {"x": X})["y"], layer_norm(X), rtol=1e-4, atol=1e-5)


def test_a_lone_number_is_a_scale_or_shift_of_every_channel():
    head = HEAD.replace("float[5] gamma", "float gamma").replace("float[5] beta", "float[1,1,5] beta")
    m = chain(TORCH, gamma=np.float32(-1.5), beta=BETA.reshape(1, 1, 5), head=head)
    assert FuseLayerNorm()(m) == 1
    np.testing.assert_allclose(run(m, {"x": X})["y"], layer_norm(X, np.float32(-1.5)), rtol=1e-4, atol=1e-5)


def test_without_a_shift_it_is_zero():
    m = chain(TORCH.replace("m = Mul(n, gamma)", "y = Mul(n, gamma)").replace("y = Add(m, beta)", ""))
    found = only_norm(m)
    assert found.beta is None
    assert found.beta_at is None
    assert FuseLayerNorm()(m) == 1
    np.testing.assert_allclose(run(m, {"x": X})["y"], layer_norm(X, beta=0), rtol=1e-4, atol=1e-5)


def test_channels_first_is_found_but_not_fused():
    gamma, beta = weights(3, 1, seed=1), weights(3, 1, seed=2)
    body = TORCH.replace("[-1]", "[1]")
    head = HEAD.replace("float[5]", "float[3,1]")
    m = chain(body, gamma=gamma, beta=beta, head=head)
    found = only_norm(m)
    assert (found.axis, found.gamma.shape) == (-2, (3,))
    np.testing.assert_array_equal(per_channel(found.gamma, found), gamma)
    assert list(FuseLayerNorm().refused(m).values()) == ["it normalises over axis -2, not over the last"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (VAR, "var = ReduceMean<axes = [1]>(sq)", "its two means are over"),
        (VAR, "var = ReduceMean<axes = [1, 2]>(sq)", "its mean is not over one known"),
        ("d = Sub(x, mean)", "d = Sub(mean, x)", "what it divides is not what it squares"),
        ("n = Div(d, root)", "n = Div(x, root)", "what it divides is not what it squares"),
        ("n = Div(d, root)", "n = Div(root, d)", "its root is read by something other"),
        ("m = Mul(n, gamma)", "m = Mul(n, x)", "it is not followed by a scale per channel"),
        ("m = Mul(n, gamma)", "m = Mul(n, root)", "its root is read by something other"),
    ],
)
def test_near_misses_have_a_reason(old, new, reason):
    assert old in TORCH
    m = chain(TORCH.replace(old, new))
    before = run(m, {"x": X})
    assert FuseLayerNorm()(m) == 0
    assert reason in next(iter(FuseLayerNorm().refused(m).values()))
    assert_same_outputs(before, run(m, {"x": X}))


@pytest.mark.parametrize(
    "change",
    [
        ("Pow(d, two)", "Pow(d, one)"),
        ("Sqrt(a)", "Exp(a)"),
        ("ReduceMean<axes = [-1]>(sq)", "ReduceMax<axes = [-1]>(sq)"),
    ],
)
def test_other_chains_are_no_normalisation(change):
    m = chain(TORCH.replace(*change))
    assert list(norms(m)) == []
    assert FuseLayerNorm().refused(m) == {}


def test_a_chain_with_keepdims_0_stays():
    body = TORCH.replace("ReduceMean<axes = [-1]>(sq)", "ReduceMean<axes = [-1], keepdims = 0>(sq)")
    m = chain(body, head=HEAD.replace("[2,3,5]", "[5,5,5]"))
    assert "with that axis kept" in next(iter(FuseLayerNorm().refused(m).values()))


def test_an_inner_value_read_elsewhere_is_refused():
    m = chain(
        TORCH.replace("y = Add(m, beta)", "y = Add(m, beta)\n    z = Relu(d)"),
        head=HEAD.replace("[2,3,5] y)", "[2,3,5] y, float[2,3,5] z)"),
    )
    assert list(FuseLayerNorm().refused(m).values()) == ["d inside it is read elsewhere, too"]


@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        (TWICE, "mean2 = ReduceMean<axes = [-1]>", "mean2 = ReduceMean<axes = [1]>"),
        (ONE_OVER, "Div(one, root)", "Div(two, root)"),
    ],
)
def test_near_misses_of_other_forms_stay(body, old, new):
    assert old in body
    m = chain(body.replace(old, new))
    assert FuseLayerNorm()(m) == 0
    assert len(FuseLayerNorm().refused(m)) == 1


def test_a_scale_along_another_axis_is_none_per_channel():
    head = HEAD.replace("[2,3,5]", "[2,5,5]").replace("float[5]", "float[1,5]")
    m = chain(TORCH.replace("[-1]", "[1]"), gamma=GAMMA.reshape(1, 5), beta=BETA.reshape(1, 5), head=head)
    assert only_norm(m) == "it is not followed by a scale per channel"
