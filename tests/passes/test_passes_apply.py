from dataclasses import dataclass

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import onnxq.passes.base
from onnxq import graph, passes
from onnxq.errors import DataError, RewriteError
from onnxq.passes import DropIdentity, FoldBatchNorm, FoldConstants, Pass, apply, difference, rewrites

X = {"x": weights(3, 2, 6, 6, seed=3)}


def network():
    """Something for most passes: a constant chain, a Pad, a BatchNormalization, an Identity, a Gemm."""
    m = model(
        """g (float[N,2,6,6] x, float[4,2,3,3] w, float[4] gamma, float[4] beta, float[4] mean, float[4] var,
              float[5,4] v) => (float[N,5] y) {
            pads = Constant<value = int64[8] {0, 0, 1, 1, 0, 0, 1, 1}>()
            half = Constant<value = float {0.5}>()
            wh = Mul(w, half)
            p = Pad(x, pads)
            c = Conv(p, wh)
            n = BatchNormalization<epsilon = 0.1>(c, gamma, beta, mean, var)
            r = Relu(n)
            i = Identity(r)
            a = GlobalAveragePool(i)
            f = Flatten(a)
            y = Gemm<alpha = 0.5, transB = 1>(f, v)
        }""",
        w=weights(4, 2, 3, 3),
        v=weights(5, 4),
        gamma=weights(4, seed=1),
        beta=weights(4, seed=2),
        mean=weights(4, seed=3),
        var=weights(4, low=0.5, high=2.0),
    )
    next(graph.nodes(m, "BatchNormalization")).name = "norm"
    return m


@dataclass(frozen=True)
class Wrong(Pass):
    """Relu becomes LeakyRelu."""

    def __call__(self, model):
        found = list(graph.nodes(model, "Relu"))
        for node in found:
            node.op_type = "LeakyRelu"
        return len(found)


@dataclass(frozen=True)
class Broken(Pass):
    """Relu becomes an operator that does not exist."""

    def __call__(self, model):
        found = list(graph.nodes(model, "Relu"))
        for node in found:
            node.op_type = "Rolu"
        return len(found)


@pytest.fixture
def inferences(monkeypatch):
    """Counts the runs of the guard."""
    counted = []
    honest = onnxq.passes.base._outputs

    def counting(model, probe, level="off"):
        counted.append(level)
        return honest(model, probe, level)

    monkeypatch.setattr(onnxq.passes.base, "_outputs", counting)
    return counted


def test_the_default_passes_leave_a_plain_network(inferences):
    m = network()
    before = run(m, X)
    applied = apply(m, rewrites(), X)
    assert ops(m) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert [(entry.name, entry.count) for entry in applied if entry.count] == [
        ("FoldConstants", 3),
        ("DropIdentity", 1),
        ("FoldPad", 1),
        ("NormalizeGemm", 1),
        ("FoldBatchNorm", 1),
    ]
    assert all(entry.gap is not None and entry.gap < 1e-5 and not entry.refused for entry in applied)
    assert inferences == ["off", "off"]
    assert_same_outputs(before, run(m, X))
    assert not [entry.count for entry in apply(m, rewrites(), X) if entry.count]


def test_no_rewrite_needs_no_inference(inferences):
    m = network()
    apply(m, rewrites())
    assert [entry.gap for entry in apply(m, rewrites(), X)] == [0.0] * len(rewrites())
    assert inferences == []


def test_without_a_probe_nothing_runs(inferences):
    assert {entry.gap for entry in apply(network(), rewrites())} == {None}
    assert inferences == []


def test_what_nothing_reads_is_removed():
    m = model("g (float[2,3] x, float[3] w) => (float[2,3] y) { d = Neg(x) y = Relu(x) }", w=weights(3))
    apply(m, ())
    assert ops(m) == ["Relu"]
    assert not m.graph.initializers


def test_refusals_are_handed_on():
    m = network()
    next(graph.nodes(m, "Conv")).op_type = "Neg"
    next(graph.nodes(m, "Neg")).resize_inputs(1)
    applied = apply(m, [FoldBatchNorm()])
    assert "a Neg is in front of it" in applied[0].refused["norm"]


@pytest.mark.parametrize("wrong", [Wrong(), Broken()])
def test_a_wrong_pass_is_named_and_undone(wrong):
    m = network()
    before = run(m, X)
    with pytest.raises(RewriteError, match=type(wrong).__name__) as caught:
        apply(m, [FoldConstants(), DropIdentity(), wrong, FoldBatchNorm()], X)
    assert "bug in onnxq" in str(caught.value)
    assert "Identity" not in ops(m)  # the sound passes before it stand
    assert "Relu" in ops(m)
    assert "BatchNormalization" in ops(m)
    assert_same_outputs(before, run(m, X))
    apply(m, rewrites(), X)  # and the model can be worked on
    assert ops(m) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.mark.parametrize("tolerance", [1e-4, np.inf])
def test_a_model_that_no_longer_runs_is_never_accepted(tolerance):
    @dataclass(frozen=True)
    class Misfit(Pass):
        """Makes shapes disagree, which only a run shows."""

        def __call__(self, model):
            for node in graph.nodes(model, "Conv"):
                graph.set_attribute(node, "group", 2)
            return 1

    for wrong in (Broken(), Misfit()):
        with pytest.raises(RewriteError, match=type(wrong).__name__):
            apply(network(), [wrong], X, tolerance)


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    @dataclass(frozen=True)
    class Failing(Pass):
        """Renames, then fails."""

        def __call__(self, model):
            next(graph.nodes(model, "Relu")).op_type = "Rolu"
            raise IndexError("of the pass")

    m = network()
    before = run(m, X)
    with pytest.raises(RewriteError, match=r"Failing failed: IndexError\('of the pass'\). This is a bug"):
        apply(m, [DropIdentity(), Failing()], X)
    assert_same_outputs(before, run(m, X))


def test_a_small_error_is_found_too():
    @dataclass(frozen=True)
    class Forgetful(Pass):
        """Loses epsilon."""

        def __call__(self, model):
            for node in graph.nodes(model, "BatchNormalization"):
                graph.set_attribute(node, "epsilon", 0.0999)
            return 1

    with pytest.raises(RewriteError, match="Forgetful"):
        apply(network(), [Forgetful()], X, tolerance=1e-6)
    apply(network(), [Forgetful()], X, tolerance=1e-2)


def rounding(factor):
    """A model whose output is nothing but the rounding error of a layer, made visible."""
    m = model(
        """g (float[N,2,6,6] x, float[4,2,3,3] w, float[4] gamma, float[4] beta, float[4] mean, float[4] var,
              float[3,4,4,4] known, float factor) => (float[N,4,4,4] y) {
            c = Conv(x, w)
            n = BatchNormalization<epsilon = 0.1>(c, gamma, beta, mean, var)
            e = Sub(n, known)
            y = Mul(e, factor)
        }""",
        w=weights(4, 2, 3, 3),
        known=np.zeros((3, 4, 4, 4), np.float32),
        factor=np.float32(factor),
        **{name: weights(4, low=0.5, high=2.0, seed=i) for i, name in enumerate(("gamma", "beta", "mean", "var"))},
    )
    layer = next(graph.nodes(m, "Sub"))
    graph.replace_constant(m, layer, 1, run(graph.with_outputs(m, ["n"]), X)["n"])
    return m


def test_rounding_is_not_blamed_on_a_pass(inferences):
    m = rounding(1e5)
    (applied,) = apply(m, [FoldBatchNorm()], X)
    assert applied.count == 1
    assert applied.gap > 1e-2
    assert inferences == ["off", "off", "all"]


def test_a_probe_that_does_not_fit_is_the_datas_fault():
    with pytest.raises(DataError):
        apply(network(), rewrites(), {"x": weights(1, 3, 6, 6)})


def gap(before, after):
    return difference({"y": np.asarray(before)}, {"y": np.asarray(after)})


F = np.float32


def test_a_difference_is_relative_to_the_range():
    assert gap(F([0, 50, 100]), F([0, 51, 100])) == (0.01, "y")
    assert gap(F([1000, 1000]), F([1000, 1010]))[0] == pytest.approx(0.01)
    assert gap(F([0, 0]), F([0, 0.5]))[0] == 0.5
    assert gap(F([]), F([]))[0] == 0.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (F([1, np.inf]), F([1, -np.inf])),
        (F([1, np.inf]), F([1, 2])),
        (F([1, np.nan]), F([1, 2])),
        (F([1, 2]), F([1, np.nan])),
        (F([1, 2]), F([1, np.inf])),
        (F([1, np.nan]), F([1, np.inf])),
        (F([[1, 2]]), F([1, 2])),
        (F([1, 2]), np.array([1.0, 2.0])),
        (F([np.nan]), F([0])),
    ],
)
def test_a_difference_in_kind_is_infinite(before, after):
    assert gap(before, after)[0] == np.inf


def test_equal_infinities_and_nan_do_not_differ():
    values = F([1, np.inf, -np.inf, np.nan, 2])
    assert gap(values, values)[0] == 0.0
    assert gap(F([np.nan, np.inf]), F([np.nan, np.inf]))[0] == 0.0


def test_integers_and_strings_count_mismatches():
    assert gap([1, 2, 3, 4], [1, 2, 3, 5])[0] == 0.25
    assert gap([True, False], [True, True])[0] == 0.5
    assert gap(np.array(["a", "b"], object), np.array(["a", "b"], object))[0] == 0.0


def test_the_worst_output_is_named():
    before = {"a": F([0, 1]), "b": F([0, 1])}
    assert difference(before, {"a": F([0, 1]), "b": F([0.5, 1])}) == (0.5, "b")


@given(arrays.arrays(np.float32, st.integers(0, 20)))
def test_nothing_differs_from_itself(values):
    assert gap(values, values.copy())[0] == 0.0


def test_defaults_are_values():
    assert rewrites() == rewrites()
    assert hash(rewrites()) == hash(passes.rewrites())
