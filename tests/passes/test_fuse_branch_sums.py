"""Sums of many branches, of sequences inside branches and of what is no branch, in onnxruntime."""

import pytest
from branching import NORM, check, statistics
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes.base import apply
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from onnxq.passes.fuse_branches import FuseBranches


def block(body, channels, size=(7, 6), **shapes):
    """A model from x [N, channels[0], *size] to y, with random constants of the given shapes."""
    constants = {name: weights(*shape, seed=len(name)) for name, shape in shapes.items()}
    inputs = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    space = ",".join(map(str, size))
    text = f"g (float[N,{channels[0]},{space}] x{inputs}) => (float[N,{channels[1]},A,B] y) {{ {body} }}"
    m = model(text, **constants)
    return m, {"x": weights(2, channels[0], *size, seed=9)}


PAD = "pads = [1, 1, 1, 1]"


def test_a_sum_of_many_operands():
    """MobileOne: several 3x3, a 1x1 and the identity, in one Sum."""
    body = f"""
      a = Conv<{PAD}>(x, k)
      b = Conv<{PAD}>(x, kk, bias)
      c = Conv(x, one)
      y = Sum(a, b, x, c)
    """
    m, feeds = block(body, (4, 4), k=(4, 4, 3, 3), kk=(4, 4, 3, 3), one=(4, 4, 1, 1), bias=(4,))
    check(m, feeds, ["Conv"], 3)


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        ("y = Sum(r, a, b)", ["Relu", "Conv", "Add"]),
        ("s = Add(a, r) y = Add(s, b)", ["Relu", "Conv", "Add"]),
        ("s = Add(r, b) y = Add(a, s)", ["Relu", "Conv", "Add"]),
        ("s = Sum(a, b) y = Add(r, s)", ["Relu", "Conv", "Add"]),
        ("s = Sum(r, a, r) t = Add(b, r) y = Add(t, s)", ["Relu", "Conv", "Add", "Add", "Add"]),
        ("s = Add(a, shift) t = Add(s, b) y = Add(r, t)", ["Relu", "Conv", "Add", "Add"]),
        ("s = Add(r, shift) t = Add(a, b) y = Add(s, t)", ["Relu", "Add", "Conv", "Add"]),
    ],
)
def test_terms_that_are_no_branches_stay_in_the_sum(total, expected):
    body = f"r = Relu(x) a = Conv<{PAD}>(x, k, bias) b = Conv(x, one) {total}"
    m, feeds = block(body, (4, 4), k=(4, 4, 3, 3), one=(4, 4, 1, 1), bias=(4,), shift=(4, 1, 1))
    before = run(m, feeds)
    assert FuseBranches()(m) == 1
    assert sorted(ops(m)) == sorted(expected)
    assert_same_outputs(before, run(m, feeds), rtol=1e-4, atol=1e-4)
    assert FuseBranches()(m) == 0


def test_a_sum_that_somebody_else_reads_stays():
    body = f"a = Conv<{PAD}>(x, k) b = Conv(x, one) r = Relu(x) s = Add(a, r) t = Add(s, b) z = Relu(s) y = Sub(t, z)"
    m, feeds = block(body, (4, 4), k=(4, 4, 3, 3), one=(4, 4, 1, 1))
    before = run(m, feeds)
    assert FuseBranches()(m) == 0
    assert_same_outputs(before, run(m, feeds), rtol=0, atol=0)


def test_branches_of_most_work_meet_first():
    """A dense 1x1 of 8 channels, 64 products, goes together with neither depthwise 3x3, 72 each; those two do."""
    body = f"""
      a = Conv(x, one) b = Conv<{PAD}, group = 8>(x, deep) c = Conv<{PAD}, group = 8>(x, depth)
      y = Sum(a, b, c)
    """
    m, feeds = block(body, (8, 8), one=(8, 8, 1, 1), deep=(8, 1, 3, 3), depth=(8, 1, 3, 3))
    check(m, feeds, ["Conv", "Conv", "Add"], 1)


def test_four_groups_meet_two():
    body = f"a = Conv<group = 2>(x, one) b = Conv<{PAD}, group = 4>(x, k) y = Add(a, b)"
    m, feeds = block(body, (8, 12), k=(12, 2, 3, 3), one=(12, 4, 1, 1))
    check(m, feeds, ["Conv"], 1)
    assert graph.attribute(m.graph[0], "group", 1) == 2


def test_sums_of_two_tensors_become_two_convs():
    body = f"""
      r = Relu(x) a = Conv(x, one) b = Conv<{PAD}>(r, k) c = Conv(r, two) d = Conv<{PAD}>(x, kk)
      s = Add(a, b) t = Sum(s, c, d) y = Relu(t)
    """
    m, feeds = block(body, (4, 6), k=(6, 4, 3, 3), kk=(6, 4, 3, 3), one=(6, 4, 1, 1), two=(6, 4, 1, 1))
    check(m, feeds, ["Relu", "Conv", "Conv", "Add", "Relu"], 2)


def test_a_diverse_branch_block():
    """DBB: 3x3, 1x1, 1x1 -> 3x3 and 1x1 -> average pooling, where the 1x1 has no bias."""
    body = f"""
      a = Conv<{PAD}>(x, k, bias)
      b = Conv(x, one)
      c = Conv(x, wide)
      d = Conv<{PAD}>(c, deep, bias)
      e = Conv(x, one)
      f = AveragePool<kernel_shape = [3, 3], {PAD}, count_include_pad = 1>(e)
      s = Add(a, b) t = Add(s, d) y = Add(t, f)
    """
    shapes = {"k": (6, 4, 3, 3), "one": (6, 4, 1, 1), "wide": (5, 4, 1, 1), "deep": (6, 5, 3, 3), "bias": (6,)}
    m, feeds = block(body, (4, 6), **shapes)
    check(m, feeds, ["Conv"], 3)


def test_norms_and_layer_scales_inside_branches():
    body = f"""
      a = Conv<{PAD}>(x, k, bias)
      n = {NORM}(a, gamma, beta, mean, var)
      b = Conv(x, one)
      l = Mul(scale, b)
      m = Div(x, scale)
      o = Sub(bias3, m)
      s = Add(n, l) y = Add(o, s)
    """
    shapes = {"k": (4, 4, 3, 3), "one": (4, 4, 1, 1), "bias": (4,), "scale": (4, 1, 1), "bias3": (1, 4, 1, 1)}
    constants = {name: weights(*shape, seed=len(name)) for name, shape in shapes.items()} | statistics(4)
    inputs = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    m = model(f"g (float[N,4,6,5] x{inputs}) => (float[N,4,A,B] y) {{ {body} }}", **constants)
    check(m, {"x": weights(2, 4, 6, 5)}, ["Conv"], 2)


def test_a_norm_behind_the_sum_goes_into_the_fused_conv():
    """RepViT: depthwise 3x3, depthwise 1x1 and the identity, then a norm."""
    body = f"a = Conv<{PAD}, group = 4>(x, k) b = Conv<group = 4>(x, one, bias) s = Add(a, b) t = Add(s, x) "
    constants = {"k": weights(4, 1, 3, 3), "one": weights(4, 1, 1, 1), "bias": weights(4)} | statistics(4)
    inputs = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    body += f"y = {NORM}(t, gamma, beta, mean, var)"
    m = model(f"g (float[N,4,6,5] x{inputs}) => (float[N,4,A,B] y) {{ {body} }}", **constants)
    feeds = {"x": weights(2, 4, 6, 5)}
    before = run(m, feeds)
    apply(m, [FuseBranches(), FoldBatchNorm()], feeds)
    assert ops(m) == ["Conv"]
    assert graph.attribute(m.graph[0], "group", 1) == 4
    assert_same_outputs(before, run(m, feeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (f"b = Conv(x, one, bias) c = Conv<{PAD}>(b, k)", "padding behind a bias reads zeros"),
        (f"b = Conv<{PAD}>(x, k) c = Conv<{PAD}>(b, k)", "padding between two kernels reads zeros"),
        (f"b = Conv<{PAD}>(x, one) c = Conv(b, k) d = Relu(b)", "is read elsewhere, too"),
        ("b = Conv(x, one) c = Mul(b, plane)", "varies along other axes"),
    ],
)
def test_sequences_that_are_no_convolution_stay(branch, reason):
    shapes = {"k": (4, 4, 3, 3), "one": (4, 4, 1, 1), "bias": (4,), "plane": (7, 6)}
    z = "z = Relu(x)" if "d =" not in branch else "z = Relu(d)"
    constants = {name: weights(*shape) for name, shape in shapes.items()}
    inputs = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    body = f"a = Conv<{PAD}>(x, k) {branch} y = Add(a, c) {z}"
    m = model(f"g (float[N,4,7,6] x{inputs}) => (float[N,4,A,B] y, float[N,4,C,D] z) {{ {body} }}", **constants)
    graph.infer_shapes(m)
    assert FuseBranches()(m) == 0
    assert reason in next(iter(FuseBranches().refused(m).values()))


@st.composite
def topologies(draw):
    """A sum of random branches of x: its text, and the shapes of its weights."""
    group = draw(st.sampled_from([1, 2, 4]))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    body, shapes, terms = [], {}, []
    for index in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "sequence", "pool", "scaled"]))
        groups = draw(st.sampled_from(sorted({1, group})))
        attributes = f"pads = [{low}, {high}, {high}, {low}], strides = [{stride}, {stride}]"
        last, name = f"t{index}", f"w{index}"
        biased = draw(st.booleans())
        shapes[name] = (4, 4 // groups, 3, 3)
        if biased:
            shapes[f"b{index}"] = (4,)
        conv = f"Conv<{attributes}, dilations = [{dilation}, {dilation}], group = {groups}>"
        bias = f", b{index}" if biased else ""
        if kind == "conv":
            body.append(f"{last} = {conv}(x, {name}{bias})")
        elif kind == "sequence":
            shapes[f"v{index}"] = (4, 4 // group, 1, 1)
            body.append(f"s{index} = Conv<group = {group}>(x, v{index}) {last} = {conv}(s{index}, {name}{bias})")
        elif kind == "scaled":
            shapes[f"l{index}"] = (1, 4, 1, 1)
            body.append(f"s{index} = {conv}(x, {name}{bias}) {last} = Mul(l{index}, s{index})")
        else:
            body.append(
                f"{last} = AveragePool<kernel_shape = [3, 3], {attributes}, dilations = [{dilation}, {dilation}],"
                f" count_include_pad = 1>(x)"
            )
        terms.append(last)
    if draw(st.booleans()):
        body.append(f"y = Sum({', '.join(terms)})")
    else:
        body += [f"u{i} = Add({terms[0] if i == 1 else f'u{i - 1}'}, {terms[i]})" for i in range(1, len(terms))]
        body.append(f"y = Neg(u{len(terms) - 1})")
    pools = sum("AveragePool" in line for line in body)
    return " ".join(body), shapes, len(terms), pools


@given(topologies())
@settings(max_examples=40, deadline=None)
def test_any_sum_of_branches_keeps_its_value(topology):
    body, shapes, terms, pools = topology
    used = {name: shape for name, shape in shapes.items() if f", {name}" in body or f"({name}," in body}
    constants = {name: weights(*shape, seed=index) for index, (name, shape) in enumerate(used.items())}
    inputs = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    m = model(f"g (float[N,4,11,12] x{inputs}) => (float[N,4,A,B] y) {{ {body} }}", opset=19, **constants)
    feeds = {"x": weights(2, 4, 11, 12)}
    before = run(m, feeds)
    (applied,) = apply(m, [FuseBranches()], feeds)
    assert applied.gap is not None
    assert applied.gap <= 1e-5
    if pools < terms:
        assert applied.count == terms - 1
        assert "Add" not in ops(m)
        assert "Sum" not in ops(m)
    assert_same_outputs(before, run(m, feeds), rtol=1e-3, atol=1e-3)
    assert FuseBranches()(m) == 0
