"""Learned rounding borders, and what absorbs them."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, ops, run, weights
from tuning import EIGHT, FOUR, IMAGE, ROWS, TWO, ahead_of, bare_gemm, clipped, made, mlp, residual

torch = pytest.importorskip("torch")

from onnxq import graph  # noqa: E402
from onnxq.errors import UnsupportedError, UsageError  # noqa: E402
from onnxq.plan import Precision  # noqa: E402
from onnxq.runtime import SessionConfig  # noqa: E402
from onnxq.tune import aquant, block_error  # noqa: E402
from onnxq.tune.adaround import AdaRound  # noqa: E402
from onnxq.tune.aquant import AQuant, Maker, absorbed, maker_of  # noqa: E402
from onnxq.tune.job import quantized  # noqa: E402
from onnxq.types import Silence  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other

KEEP = AQuant(iterations=40, weights="keep")
SIMULATE = SessionConfig(threads=1, simulate=True)


class Notes(Silence):
    def __init__(self):
        self.kept = []

    def note(self, text):
        self.kept.append(text)


def layer(job, name):
    return graph.layer_of(graph.node_names(job.model)[name])


CONV = "h = Conv<pads = [1, 0, 1, 2], strides = [1, 2]>(x, w, b)"
BEHIND = {"nothing": "y = Identity(h)", "relu": "y = Relu(h)", "clip": "y = Clip(h, low, high)"}
EXPLICIT = """g (float[n,7,m,k] y, float s, float zero, float first, float last, float half, float one,
float[7,1,1] level, float[7,1,1] slope) => (float[n,7,m,k] q) {
    u0 = Div(y, s) u = Add(u0, zero) i = Sub(u, first) d = Mul(i, slope) b = Add(d, level)
    v0 = Sub(u, b) v = Add(v0, one) f = Floor(v) q = Clip(f, first, last)
}"""


def absorbing(behind, bits):
    """A Conv, what is behind it, and the rest that reads its quantized result."""
    ends = {"low": np.float32(0), "high": np.float32(3)} if behind == "clip" else {}
    kinds = ", float low, float high" if ends else ""
    line = BEHIND[behind].replace("y = Identity(h)", "")
    result = "y" if line else "h"
    m = model(
        f"""g (float[n,4,12,12] x, float[7,4,3,3] w, float[7] b, float[3,7,1,1] v{kinds}) => (float[n,3,12,6] z) {{
            [a] {CONV} {line} [b] z = Conv({result}, v)
        }}""",
        w=weights(7, 4, 3, 3) / 4,
        b=weights(7),
        v=weights(3, 7, 1, 1),
        **ends,
    )
    precision = Precision(weight_bits=4, activation_bits=bits, first_last=8, residual_bits=bits)
    job, tuned = made(m, (40, 4, 12, 12), precision, batches=7, shrink=0.9)
    plan = replace(tuned.plan, tensors={**tuned.plan.tensors, result: replace(tuned.plan.tensors[result], bits=bits)})
    if bits != 8:
        grid = tuned.plan.tensors[result]
        if grid.bits == 8:
            zero = round(grid.zero_point * (2**bits - 1) / 255)
            grid = replace(grid, scale=grid.scale * 255 / (2**bits - 1), zero_point=zero, bits=bits)
        plan = replace(plan, tensors={**plan.tensors, result: grid})
    return job, replace(tuned, plan=plan), result


def lines(job, tuned, result, *, straight):
    """Borders whose shifts are whole steps of the int32 bias, so that nothing is rounded twice."""
    grid, data = tuned.plan.tensors[result], tuned.plan.tensors["x"]
    last = 2**grid.bits - 1
    units = np.asarray(tuned.plan.weights["a"].scales) * data.scale
    slope = np.zeros(7) if straight else 0.7 * weights(7, seed=3, low=-1, high=1).astype(np.float64)
    wanted = np.where(slope < 0, 0.92, 0.08) if not straight else weights(7, seed=4, low=0.06, high=0.94)
    shift = grid.scale * (0.5 - wanted - slope / last * grid.zero_point)
    unit = (1 - slope / last) * units
    level = 0.5 - np.rint(shift / unit) * unit / grid.scale - slope / last * grid.zero_point
    line = np.stack([level, level + slope])
    assert line.min() > 0.04
    assert line.max() < 0.96
    return line


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize(("behind", "bits"), [("relu", 8), ("relu", 4), ("relu", 2), ("nothing", 4), ("clip", 4)])
def test_absorbed_borders_give_the_codes_of_explicit_ones(behind, bits, straight):
    job, tuned, result = absorbing(behind, bits)
    grid = tuned.plan.tensors[result]
    assert grid.bits == bits
    assert (grid.zero_point > 0) == (behind == "nothing")
    assert isinstance(maker_of(job.model, tuned.plan, result, curved=False), Maker)
    line = lines(job, tuned, result, straight=straight)
    after = absorbed(tuned, layer(job, "a"), grid, line)
    assert ops(quantized(job, after)) == ops(quantized(job, tuned))
    last = 2**bits - 1
    constants = {"s": grid.scale, "zero": grid.zero_point, "first": 0, "last": last, "half": 0.5, "one": 1}
    explicit = model(
        EXPLICIT,
        **{name: np.float32(value) for name, value in constants.items()},
        level=line[0].astype(np.float32).reshape(-1, 1, 1),
        slope=((line[1] - line[0]) / last).astype(np.float32).reshape(-1, 1, 1),
    )
    count = wrong = moved = 0
    before, folded = quantized(job, tuned), quantized(job, after)
    made_by = {"clip": "Clip", "relu": "Relu", "nothing": "Conv"}[behind]
    floats = next(graph.name_of(node.outputs[0]) for node in graph.nodes(before, made_by))
    codes = next(graph.name_of(n.outputs[0]) for n in graph.nodes(folded, "QuantizeLinear") if n.name == f"{result}_q")
    for feeds in job.feeds:
        value = run(graph.with_outputs(before, [floats], keep=False), feeds)[floats]
        wanted = run(explicit, {"y": value})["q"]
        plain, found = (run(graph.with_outputs(m, [codes], keep=False), feeds)[codes] for m in (before, folded))
        place = value.astype(np.float64) / grid.scale + grid.zero_point
        low, high = line.reshape(2, 1, 7, 1, 1)
        raised = place + 1 - low - (high - low) * place / last
        clear = np.abs(raised - np.rint(raised)) > 1e-4  # from where one code ends and the next begins
        count, moved = count + wanted.size, moved + int((plain != found).sum())
        wrong += int((wanted != found)[clear].sum())
    assert count > 100_000
    assert moved > 0.02 * count
    assert wrong == 0


def test_a_constant_border_needs_no_step_of_its_own():
    whole = Precision(weight_bits=8, activation_bits=4, first_last=4, per_channel=False)
    job, tuned = made(residual(), IMAGE, whole)
    maker = maker_of(job.model, tuned.plan, "i", curved=False)
    assert maker.single
    assert maker.border("affine").terms.shape == (1, 6)
    after = absorbed(tuned, maker.layer, tuned.plan.tensors["i"], np.full((2, 6), 0.3))
    assert after.plan.weights == tuned.plan.weights
    unit = tuned.plan.tensors["x"].scale * tuned.plan.weights["a"].scales[0]
    shift = after.layers["a"].bias - maker.layer.bias
    np.testing.assert_allclose(shift, 0.2 * tuned.plan.tensors["i"].scale, atol=0.51 * unit)


def deeper():
    """The residual block with a Conv behind."""
    text = """g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b, float[6,6,3,3] v, float[6] c, float[6,4,1,1] u,
    float[3,6,1,1] t) => (float[n,3,6,6] z) {
        [a] h = Conv<pads = [1, 1, 1, 1]>(x, w, b) i = Relu(h) [b] j = Conv<pads = [1, 1, 1, 1]>(i, v, c)
        [s] k = Conv(x, u) l = Add(j, k) y = Relu(l) [t] z = Conv(y, t)
    }"""
    constants = {"w": weights(6, 4, 3, 3) / 4, "b": weights(6), "v": weights(6, 6, 3, 3) / 5, "c": weights(6, seed=1)}
    return model(text, **constants, u=weights(6, 4, 1, 1) / 2, t=weights(3, 6, 1, 1))


def reasons(build, shape, precision=EIGHT, **changes):
    job, tuned = made(build(), shape, precision, **changes)
    found, refused = KEEP._makers(job, tuned)
    return set(found), refused


def test_tensors_that_have_a_border():
    found, refused = reasons(deeper, IMAGE)
    assert "i" in found
    assert refused["y"] == "no quantized layer makes it"  # it is made of a sum
    found, refused = reasons(mlp, ROWS)
    assert found | set(refused) >= {"i"}
    found, _ = reasons(bare_gemm, (40, 8))
    assert "i" in found
    assert "x" not in found


def test_a_grid_that_goes_beyond_its_clip_has_none():
    job, tuned = made(clipped(), (8, 4, 7, 7))
    grid = tuned.plan.tensors["i"]
    for top, fine in ((5.9, True), (6.0, True), (6.2, False)):
        tensors = {**tuned.plan.tensors, "i": replace(grid, scale=top / 255, zero_point=0)}
        maker = maker_of(job.model, replace(tuned.plan, tensors=tensors), "i", curved=False)
        assert isinstance(maker, Maker) is fine
        assert fine or maker == "its grid goes beyond its Clip"
    for width, zero, fine in ((5.0, 100, False), (5.0, 104, False), (4.9, 102, True)):  # of the Clip: -2 to 3
        tensors = {**tuned.plan.tensors, "k": replace(grid, scale=width / 255, zero_point=zero)}
        maker = maker_of(job.model, replace(tuned.plan, tensors=tensors), "k", curved=False)
        assert isinstance(maker, Maker) is fine


def test_why_other_tensors_have_none():
    job, tuned = made(residual(), IMAGE)
    inside = {**tuned.plan.tensors, "i": replace(tuned.plan.tensors["i"], everywhere=False)}
    refused = maker_of(job.model, replace(tuned.plan, tensors=inside), "i", curved=False)
    assert refused == "float operators read it before it is rounded"
    both = {**tuned.plan.tensors, "h": tuned.plan.tensors["i"]}
    refused = maker_of(job.model, replace(tuned.plan, tensors=both), "i", curved=False)
    assert refused == "its layer's result is read in front of the activation, too"
    floats = {name: grid for name, grid in tuned.plan.weights.items() if name != "a"}
    assert maker_of(job.model, replace(tuned.plan, weights=floats), "i", curved=False) == "no quantized layer makes it"
    text = """g (float[n,8] x, float[8,6] w, float[6,3] v) => (float[n,3] z) {
        [a] h = MatMul(x, w) y = Relu(h) [b] z = MatMul(y, v)
    }"""
    job, tuned = made(model(text, w=weights(8, 6), v=weights(6, 3)), (40, 8))
    assert maker_of(job.model, tuned.plan, "y", curved=False) == "its MatMul has no Add to hold a bias"


def test_curved_borders_pass_sums():
    job, tuned = made(deeper(), IMAGE)
    maker = maker_of(job.model, tuned.plan, "y", curved=True)
    assert maker.layer.node.name == "b"
    border = maker.border("quadratic")
    assert border.terms.shape == (3, 6)
    assert maker.with_border(tuned, "y", border).plan.borders["y"].axis == -3
    job, tuned = made(bare_gemm(), (40, 8))
    border = maker_of(job.model, tuned.plan, "i", curved=True).border("quadratic")
    assert border.found(255).axis == -1
    assert len(border.found(255).terms) == 10


@pytest.mark.parametrize("kind", ["constant", "affine", "quadratic"])
def test_borders_on_top_of_given_weights_never_make_held_rows_worse(kind):
    job, tuned = made(residual(), IMAGE, FOUR, batches=6, shrink=0.8)
    found = replace(KEEP, kind=kind)(job, tuned)
    assert block_error(job, found) < block_error(job, tuned)
    assert block_error(job, found, job.train) < block_error(job, tuned, job.train)
    assert found.plan.tensors == tuned.plan.tensors
    for name, learned in found.layers.items():
        np.testing.assert_array_equal(learned.codes, aquant.weight_codes(layer(job, name), tuned.plan.weights[name]))
    assert bool(found.plan.borders) == (kind == "quadratic")
    if kind == "constant":
        assert found.plan.weights == tuned.plan.weights


def test_nothing_learned_is_nothing_kept():
    job, tuned = made(residual(), IMAGE, FOUR)
    assert AQuant(iterations=0, weights="keep")(job, tuned) is tuned


def test_weights_come_first_or_together():
    job, tuned = made(residual(), IMAGE, FOUR, batches=6, shrink=0.7, alike=True)
    rounded = AdaRound(iterations=40)(job, tuned)
    base = min(block_error(job, rounded), block_error(job, tuned))
    first = AQuant(iterations=40)(job, tuned)
    assert block_error(job, first) <= base
    joint = AQuant(iterations=40, weights="joint")(job, tuned)
    assert set(joint.layers) == {"a", "b", "s"}
    assert joint.plan.tensors != tuned.plan.tensors
    assert block_error(job, joint, job.train) < block_error(job, tuned, job.train)


def test_each_border_is_kept_or_dropped_by_itself(monkeypatch):
    job, tuned = made(residual(), IMAGE, FOUR)
    makers, _ = KEEP._makers(job, tuned)
    names = list(makers)
    assert len(names) > 1
    borders = dict.fromkeys(names)
    good = {names[-1]}
    monkeypatch.setattr(
        Maker, "with_border", lambda self, state, name, border: replace(state, layers={**state.layers, name: None})
    )
    monkeypatch.setattr(aquant, "block_error", lambda job, state: 5 + sum(-1 if n in good else 1 for n in state.layers))
    for weights_, start in (("keep", {}), ("joint", {})):
        kept = replace(KEEP, weights=weights_)._kept(job, replace(tuned, layers=start), makers, borders)
        assert set(kept.layers) == good
    monkeypatch.setattr(aquant, "block_error", lambda *_: 5)
    for weights_, names in (("keep", set()), ("joint", set(borders))):  # what makes no difference stays as it was
        assert set(replace(KEEP, weights=weights_)._kept(job, tuned, makers, borders).layers) == names


def test_skipped_tensors_are_noted():
    job, tuned = made(deeper(), IMAGE, FOUR)
    log = Notes()
    AQuant(iterations=0, weights="keep")(replace(job, log=log), tuned)
    assert any("no rounding border for" in note and "no quantized layer makes it" in note for note in log.kept)
    assert all(note.startswith("block block: ") for note in log.kept)


def test_unknown_words_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="one of constant, affine, quadratic, not 'cubic'"):
        AQuant(kind="cubic")
    with pytest.raises(UsageError, match="one of first, joint, keep, not 'last'"):
        AQuant(weights="last")
    job, tuned = made(residual(), IMAGE)

    def refuse(*_):
        raise UnsupportedError("another result")

    monkeypatch.setattr(aquant, "require_agreement", refuse)
    with pytest.raises(UnsupportedError, match="another result"):
        KEEP(job, tuned)


def test_the_stage_counts_where_asked():
    job, tuned = made(residual(), IMAGE, TWO)
    asked = []
    given = replace(job, rest=lambda reach: (asked.append(reach), ahead_of(job))[1])
    replace(KEEP, iterations=1, stage=0.5, reach=3)(given, tuned)
    assert asked == [3]
    replace(KEEP, iterations=1)(given, tuned)
    assert asked == [3]
