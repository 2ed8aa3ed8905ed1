import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.migrate import MigrateNorms, Pair, migrate, pairs
from onnxq.passes.migration import repq
from onnxq.passes.readings import Migration

C = 5
X = weights(4, 3, C, low=-1.0, high=3.0)
RATIOS = np.array([0.25, 0.5, 1.0, 3.0, 8.0])
SHIFTS = np.array([0.7, -1.5, 0.0, 2.0, -0.3])
LINEAR = """g (float[4,3,5] x, float[5] gamma, float[5] beta, float[5,7] w, float[7] bias) => (float[4,3,7] y) {
    n = LayerNormalization<epsilon = 0.1>(x, gamma, beta)
    p = MatMul(n, w)
    y = Add(bias, p)
}"""
QKV = """g (float[4,3,5] x, float[5] gamma, float[5] beta, float[5,7] wq, float[5,5] wk, float[5,2] wv, float[2] bv) =>
    (float[4,3,7] q, float[4,3,5] k, float[4,3,2] v, int64[3] s) {
    n = LayerNormalization<epsilon = 0.1>(x, gamma, beta)
    q = MatMul(n, wq)
    k = MatMul(n, wk)
    p = MatMul(n, wv)
    v = Add(p, bv)
    s = Shape(n)
}"""
GEMM = """g (float[12,5] x, float[5] gamma, float[7,5] w) => (float[12,7] y) {
    n = LayerNormalization<epsilon = 0.1>(x, gamma)
    y = Gemm<transB = 1>(n, w)
}"""
GEMM_B = GEMM.replace("float[7,5] w", "float[5,7] w, float[7] bias").replace("<transB = 1>(n, w)", "(n, w, bias)")
CONV = """g (float[2,5,3,4] x, float[5] gamma, float[5] beta, float[6,5,1,1] w) => (float[2,6,a,b] y) {
    n = InstanceNormalization<epsilon = 0.1>(x, gamma, beta)
    y = Conv(n, w)
}"""
PADDED = CONV.replace("Conv(", "Conv<pads = [1, 0, 1, 2]>(")
RMS = """g (float[4,3,5] x, float[5] gamma, float[5,7] w, float eps, float two) => (float[4,3,7] y) {
    sq = Pow(x, two)
    var = ReduceMean<axes = [-1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    d = Div(x, root)
    n = Mul(d, gamma)
    y = MatMul(n, w)
}"""
CHAIN = """g (float[2,5,3] x, float[5,1] gamma, float[5,1] beta, float[6,5,1] w, float eps, float two) =>
    (float[2,6,3] y) {
    mean = ReduceMean<axes = [1]>(x)
    c = Sub(x, mean)
    sq = Pow(c, two)
    var = ReduceMean<axes = [1]>(sq)
    a = Add(var, eps)
    root = Sqrt(a)
    d = Div(c, root)
    m = Mul(d, gamma)
    n = Add(beta, m)
    y = Conv(n, w)
}"""
SHAPES = {
    "gamma": (C,),
    "beta": (C,),
    "w": (C, 7),
    "bias": (7,),
    "wq": (C, 7),
    "wk": (C, C),
    "wv": (C, 2),
    "bv": (2,),
}
SCALARS = {"eps": np.float32(0.1), "two": np.float32(2)}
CASES = {
    "linear": (LINEAR, X, {}, True),
    "qkv": (QKV, X, {}, True),
    "gemm": (GEMM, X.reshape(12, C), {"w": (7, C)}, True),
    "gemm, not transposed": (GEMM_B, X.reshape(12, C), {}, True),
    "conv": (CONV, weights(2, C, 3, 4), {"w": (6, C, 1, 1)}, True),
    "padded conv": (PADDED, weights(2, C, 3, 4), {"w": (6, C, 1, 1)}, False),
    "rms": (RMS, X, {}, False),
    "chain": (CHAIN, weights(2, C, 3), {"w": (6, C, 1), "gamma": (C, 1), "beta": (C, 1)}, True),
}


def made(text, shapes=None):
    known = {**SHAPES, **(shapes or {})}
    signature = text[: text.index("=>")]
    constants = {n: weights(*known[n], seed=len(n)) for n in known if f" {n}," in signature or f" {n})" in signature}
    constants |= {n: v for n, v in SCALARS.items() if f" {n}," in signature or f" {n})" in signature}
    m = model(text, **constants)
    graph.infer_shapes(m)
    return m


def inner(m, x):
    name = only_pair(m).name
    return run(graph.with_outputs(m, [name], keep=False), {"x": x})[name]


def only_pair(m):
    ((_, found),) = pairs(m)
    return found


@pytest.mark.parametrize(("text", "x", "shapes", "shifts"), CASES.values(), ids=CASES)
def test_the_model_stays_and_the_tensor_is_rescaled(text, x, shapes, shifts):
    m = made(text, shapes)
    pair = only_pair(m)
    assert pair.shifts is shifts
    before, old = run(m, {"x": x}), inner(m, x)
    moved = SHIFTS if shifts else np.zeros(C)
    axis, old_name = pair.norm.axis, pair.name
    migrate(m, pair, RATIOS, moved)
    again = only_pair(m)
    assert again.name != old_name
    along = (slice(None),) + (None,) * (-axis - 1)
    assert np.abs(inner(m, x) - (old / RATIOS[along] - moved[along])).max() < 1e-4
    assert_same_outputs(before, run(m, {"x": x}), rtol=1e-5, atol=3e-5)


def test_no_bias_is_made_without_a_shift():
    m = made(GEMM, {"w": (7, C)})
    migrate(m, only_pair(m), RATIOS, np.zeros(C))
    assert len(m.graph[1].inputs) == 2
    assert len(m.graph[0].inputs) == 2
    m = made(QKV)
    migrate(m, only_pair(m), RATIOS, SHIFTS)
    assert ops(m).count("Add") == 3


def test_other_readers_of_the_same_constants_keep_them():
    text = QKV.replace("float[4,3,7] q,", "float[4,3,7] q, float[5] z,")
    text = text.replace("s = Shape(n)", "s = Shape(n)\n z = Add(gamma, beta)")
    m = made(text)
    before = run(m, {"x": X})
    migrate(m, only_pair(m), RATIOS, SHIFTS)
    assert_same_outputs(before, run(m, {"x": X}), atol=3e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans())
def test_codes_on_one_grid_are_those_of_the_channels(seed, bits, signed):
    """METHODS: any integer layer-wise zero point keeps every code; float64, so that ties cannot differ."""
    random = np.random.default_rng(seed)
    y = random.normal(size=(50, 8)) * np.exp(random.normal(size=8) * 2) + random.normal(size=8) * 3
    low, high = np.percentile(y, [1, 99], axis=0)
    found = repq(low, high, bits, signed)
    levels = 2**bits - 1
    qmin = -(2 ** (bits - 1)) if signed else 0
    steps = (high - low) / levels
    codes = np.clip(np.rint(y / steps + np.rint(qmin - low / steps)), qmin, qmin + levels)
    moved = y / found.ratios - found.shifts
    ours = np.clip(np.rint(moved / found.scale + found.zero_point), qmin, qmin + levels)
    assert found.zero_point == (0 if signed else 2 ** (bits - 1))
    np.testing.assert_allclose(found.ratios * found.scale, steps, rtol=1e-12)
    assert found.scale == pytest.approx(steps.mean())
    assert np.mean(codes != ours) <= 1e-3  # ties only
    w = random.normal(size=(8, 3))
    same = moved @ (w * found.ratios[:, None]) + found.shifts @ (w * found.ratios[:, None])
    assert np.abs(same - y @ w).max() <= 1e-13 * np.abs(y).max() * np.abs(w).sum()
    second = repq(low / found.ratios - found.shifts, high / found.ratios - found.shifts, bits, signed)
    np.testing.assert_allclose(second.ratios, 1.0, rtol=1e-9)
    assert np.abs(second.shifts).max() <= 1e-9 * np.abs(y).max()


def test_dead_channels_move_to_zero():
    found = repq([0.0, -1.0, 2.5], [0.0, 3.0, 2.5], 8, False)
    np.testing.assert_array_equal(found.ratios, 1.0)
    assert found.shifts[0] == 0.0
    assert found.shifts[2] == 2.5
    assert found.scale == pytest.approx(4 / 255)
    all_dead = repq([1.5, 0.0], [1.5, 0.0], 8, True)
    np.testing.assert_array_equal(all_dead.ratios, 1.0)
    np.testing.assert_array_equal(all_dead.shifts, [1.5, 0.0])


def test_the_spread_of_steps_can_be_limited():
    found = repq([-1.0, -1e-3, -0.5], [1.0, 1e-3, 0.5], 8, False, spread=4.0)
    assert found.ratios.max() / found.ratios.min() == pytest.approx(4.0)
    np.testing.assert_allclose(found.ratios * found.scale * 255, [2.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="spread must be 1 or more"):
        repq([-1.0], [1.0], 8, False, spread=0.5)


def test_without_a_shift_the_channels_grids_are_symmetric():
    found = repq([-1.0, 0.0], [4.0, 0.5], 8, True, shift=False)
    assert not found.shifts.any()
    np.testing.assert_allclose(found.ratios * found.scale, [4 / 127, 0.5 / 127])


def test_the_pass_applies_choices_once():
    m = made(LINEAR)
    before, old = run(m, {"x": X}), inner(m, X)
    chosen = repq(old.min((0, 1)), old.max((0, 1)), 8, False)
    rewrite = MigrateNorms({"n": chosen, "unknown": chosen})
    found = apply(m, [rewrite], {"x": X})[0]
    assert (found.count, found.refused) == (1, {})
    new = inner(m, X)
    lows, highs = new.min((0, 1)), new.max((0, 1))
    np.testing.assert_allclose(highs - lows, 255 * chosen.scale, rtol=1e-4)
    assert np.abs(lows + 128 * chosen.scale).max() <= 0.501 * chosen.scale
    assert rewrite(m) == 0
    assert_same_outputs(before, run(m, {"x": X}), atol=3e-5)
    nothing = Migration(np.ones(C), np.zeros(C), 1.0, 0)
    assert MigrateNorms({only_pair(m).name: nothing})(m) == 0


INSTANCE = "InstanceNormalization<epsilon = 0.1>(x, gamma, beta)"
PRODUCT = "p = MatMul(n, w)"
NEW_OUTPUT = ("float[4,3,7] y)", "float[4,3,7] y, float[4,3,5] n)")


@pytest.mark.parametrize(
    ("text", "change", "reason"),
    [
        (LINEAR, (PRODUCT, "r = Add(n, x)\n p = MatMul(r, w)"), "is no linear layer (Add)"),
        (LINEAR, (PRODUCT, "r = MatMul(n, v)\n p = MatMul(n, w)"), "computed at run time"),
        (LINEAR, (PRODUCT, "p = MatMul(x, w)"), "no linear layer reads its result"),
        (CONV, (INSTANCE, "LayerNormalization(x, ones, zeros)"), "another axis"),
    ],
)
def test_refusals(text, change, reason):
    assert change[0] in text
    text = text.replace(*change)
    if " v)" in text:
        text = text.replace("float[5] beta", "float[5] beta, float[5,5] v")
    if "ones" in text:
        text = text.replace("float[5] gamma, float[5] beta", "float[4] ones, float[4] zeros")
        m = model(text, ones=np.ones(4, np.float32), zeros=np.zeros(4, np.float32), w=weights(6, C, 1, 1))
        graph.infer_shapes(m)
    else:
        m = made(text, {"w": (6, C, 1, 1)} if text.startswith(CONV[:20]) else None)
    (found,) = MigrateNorms().refused(m).values()
    assert reason in found
    assert not any(isinstance(pair, Pair) for _, pair in pairs(m))


SHARED = {
    "an output": (LINEAR, NEW_OUTPUT, X),
    "a residual sum": (LINEAR, ("y = Add(bias, p)", "h = Add(bias, p)\n y = Concat<axis = -1>(h, n)"), X),
    "a moving node": (
        LINEAR,
        (PRODUCT, "t = Transpose<perm = [0, 2, 1]>(n)\n s = ReduceMean(t)\n p = MatMul(n, w)"),
        X,
    ),
    "rms, in small operators": (RMS, ("y = MatMul(n, w)", "h = MatMul(n, w)\n y = Concat<axis = -1>(h, n)"), X),
    "layer, in small operators": (CHAIN, ("float[2,6,3] y) {", "float[2,6,3] y, float[2,5,3] n) {"), weights(2, C, 3)),
    "channels in front": (CONV, ("float[2,6,a,b] y)", "float[2,6,a,b] y, float[2,5,c,d] n)"), weights(2, C, 3, 4)),
}


@pytest.mark.parametrize(("text", "change", "x"), SHARED.values(), ids=SHARED)
def test_what_others_read_stays_and_the_layers_get_their_own(text, change, x):
    assert change[0] in text
    text = text.replace(*change).replace("[4,3,7] y", "[4,3,k] y")
    shapes = {3: {"w": (6, C, 1), "gamma": (C, 1), "beta": (C, 1)}, 4: {"w": (6, C, 1, 1)}} if len(x) == 2 else {}
    m = made(text, shapes.get(x.ndim, {}))
    before, count = run(graph.with_outputs(m, ["n"]), {"x": x}), len(ops(m))
    pair = only_pair(m)
    assert pair.shared
    assert not pair.shifts
    along = (slice(None),) + (None,) * (-pair.norm.axis - 1)
    rewrite = MigrateNorms({"n": Migration(RATIOS, np.zeros(C), 1.0, 0)})
    assert rewrite(m) == 1
    assert len(ops(m)) == count + 1
    after = run(graph.with_outputs(m, ["n", "n_scaled"]), {"x": x})
    np.testing.assert_array_equal(after["n"], before["n"])
    np.testing.assert_allclose(after.pop("n_scaled"), before["n"] / RATIOS[along], rtol=1e-6)
    assert_same_outputs(before, after, rtol=1e-5, atol=3e-5)
    assert {node.op_type for node in graph.users(graph.value_map(m)["n_scaled"])} <= {"MatMul", "Conv"}
    assert rewrite(m) == 0


def test_grouped_and_larger_convs_are_refused():
    m = made(CONV.replace("float[6,5,1,1] w", "float[6,5,3,3] w"), {"w": (6, C, 3, 3)})
    assert "is no dense 1x1 Conv" in only_pair(m)
    text = CONV.replace("float[6,5,1,1] w", "float[5,1,1,1] w").replace("Conv(", "Conv<group = 5>(")
    m = made(text.replace("[2,6,a,b]", "[2,5,a,b]"), {"w": (C, 1, 1, 1)})
    assert "is no dense 1x1 Conv" in only_pair(m)


@pytest.mark.parametrize(
    ("ratios", "shifts", "message"),
    [
        (np.ones(4), np.zeros(4), "has 5 channels"),
        (-RATIOS, np.zeros(C), "must be positive"),
        (RATIOS, np.full(C, np.nan), "finite"),
    ],
)
def test_bad_values_are_errors(ratios, shifts, message):
    m = made(LINEAR)
    with pytest.raises(ValueError, match=message):
        migrate(m, only_pair(m), ratios, shifts)


def test_a_shift_that_nothing_can_hold_is_an_error():
    m = made(RMS)
    with pytest.raises(ValueError, match="cannot take a shift"):
        migrate(m, only_pair(m), RATIOS, SHIFTS)
