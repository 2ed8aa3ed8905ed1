"""`quantize` from Python on small models: every kind of input, and what happens when a stage fails."""

import dataclasses

import numpy as np
import onnx
import pytest
from helpers import proto, weights

import onnxq
from onnxq import graph, simplifier
from onnxq.errors import DataError, UnsupportedError, UsageError
from onnxq.pipeline import run as story
from onnxq.pipeline import verify as judge

CONV_NET = """
g (float[N,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8,4] w3) => (float[N,4] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  r = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(r, w2)
  e = Relu(c)
  s = Add(e, r)
  t = Relu(s)
  p = GlobalAveragePool(t)
  f = Flatten(p)
  y = Gemm(f, w3)
}
"""
TWO_INPUTS = """
g (int64[N,T] ids, float[N,T,1] mask, float[40,16] table, float[16,16] w, float[16] b) => (float[N,T,16] y) {
  e = Gather(table, ids)
  m = Mul(e, mask)
  h = MatMul(m, w)
  y = Add(h, b)
}
"""
ROWS = {"x": np.random.default_rng(5).normal(size=(40, 3, 8, 8)).astype(np.float32)}


def conv_net(folder, **changes):
    sizes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (8, 4)}
    constants = {name: weights(*shape, seed=1) * 0.3 for name, shape in sizes.items()}
    path = folder / "net.onnx"
    onnx.save(proto(CONV_NET, **(constants | changes)), path)
    return path


def quantize(path, data=ROWS, **options):
    return onnxq.quantize(path, data, checks=onnxq.Checks(time_it=False), **options)


def test_a_small_network_runs_whole_in_integers(tmp_path):
    path = conv_net(tmp_path)
    before = path.read_bytes()
    found = quantize(path)
    assert found.verdict.coverage.share == 1.0
    assert found.verdict.coverage.kernels["QLinearAdd"] == 1
    assert found.verdict.fidelity.sqnr_db["y"] > 30
    assert found.verdict.optimized_gap <= 1
    assert not found.simulated
    assert found.rows == 35
    assert path.read_bytes() == before
    assert found.save(tmp_path / "q.onnx").stat().st_size == found.verdict.quantized_bytes


@pytest.mark.parametrize("form", ["dict", "iterable", "function", "folder"])
def test_data_in_every_form_gives_the_same_model(form, tmp_path):
    path = conv_net(tmp_path)
    parts = [{"x": ROWS["x"][start : start + 10]} for start in range(0, 40, 10)]
    folder = tmp_path / "rows"
    folder.mkdir()
    for index, part in enumerate(parts):
        np.savez(folder / f"{index}.npz", **part)
    data = {"dict": ROWS, "iterable": parts, "function": lambda: iter(parts), "folder": folder}[form]
    wanted = quantize(path, ROWS, batch=10).plan
    assert quantize(path, data, batch=10).plan == wanted


def test_two_inputs_with_dynamic_lengths(tmp_path):
    constants = {"table": weights(40, 16), "w": weights(16, 16, seed=2), "b": weights(16, seed=3)}
    onnx.save(proto(TWO_INPUTS, **constants), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    batches = [
        {"ids": rng.integers(0, 40, (6, length)), "mask": np.ones((6, length, 1), np.float32)} for length in (3, 9, 5)
    ]
    found = quantize(tmp_path / "m.onnx", batches)
    assert found.verdict.coverage.share == 1.0
    assert found.verdict.fidelity.agreement is None
    assert found.verdict.fidelity.sqnr_db["y"] > 30


def test_a_fixed_batch_is_respected(tmp_path):
    text = CONV_NET.replace("float[N,3,8,8] x", "float[4,3,8,8] x").replace("float[N,4] y", "float[4,4] y")
    sizes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (8, 4)}
    onnx.save(proto(text, **{name: weights(*shape, seed=1) for name, shape in sizes.items()}), tmp_path / "m.onnx")
    found = quantize(tmp_path / "m.onnx")
    assert found.verdict.coverage.share == 1.0
    assert found.verdict.fidelity.rows == 4


def test_branches_of_an_if_stay_float_and_are_said(tmp_path):
    text = """
    g (float[N,6] x, float[6,6] w, float[6,6] v) => (float[N,6] y) {
      h = MatMul(x, w)
      total = ReduceSum<keepdims = 0>(h)
      zero = Constant<value_float = 0.0>()
      positive = Greater(total, zero)
      y = If (positive) <
        then_branch = yes () => (float[N,6] a) { a = MatMul(h, v) },
        else_branch = no () => (float[N,6] b) { b = Neg(h) }
      >
    }
    """
    onnx.save(proto(text, w=weights(6, 6), v=weights(6, 6, seed=1)), tmp_path / "m.onnx")
    rows = {"x": np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32)}
    found = quantize(tmp_path / "m.onnx", rows)
    assert "its branches are left as they are" in found.plan.skipped.values()
    assert len(found.plan.weights) == 1
    assert found.verdict.fidelity.sqnr_db["y"] > 20


def test_a_tensor_with_infinities_stays_float(tmp_path):
    text = """
    g (float[N,6] x, float[6,6] w, float[6,6] v) => (float[N,6] y) {
      h = MatMul(x, w)
      l = Log(h)
      m = MatMul(l, v)
      y = Softmax(m)
    }
    """
    onnx.save(proto(text, w=np.abs(weights(6, 6)), v=weights(6, 6, seed=1)), tmp_path / "m.onnx")
    rows = {"x": np.zeros((24, 6), np.float32)}
    found = quantize(tmp_path / "m.onnx", rows)
    assert len(found.plan.weights) == 1
    assert any("infinities or NaN" in reason for reason in found.plan.skipped.values())


def test_low_bits_are_marked_as_simulated_and_shrink_nothing_but_the_grid(tmp_path):
    path = conv_net(tmp_path)
    found = quantize(path, weight_bits=4, activation_bits=4)
    assert found.simulated
    assert any("simulated" in warning for warning in found.verdict.warnings)
    bits = {name: grid.bits for name, grid in found.plan.weights.items()}
    assert sorted(bits.values()) == [4, 8, 8]
    assert found.verdict.fidelity.sqnr_db["y"] < quantize(path).verdict.fidelity.sqnr_db["y"]


def test_keep_float_is_obeyed_and_unmatched_patterns_are_refused(tmp_path):
    path = conv_net(tmp_path)
    found = quantize(path, keep_float=("*Gemm*",))
    assert "asked to stay in float" in found.plan.skipped.values()
    assert len(found.plan.weights) == 2
    with pytest.raises(UsageError, match="matches no node"):
        quantize(path, keep_float=("nothing*",))


def test_portable_narrows_the_layers_that_saturate(tmp_path):
    extreme = np.ones((8, 8, 3, 3), np.float32)
    path = conv_net(tmp_path, w2=extreme, w1=np.abs(weights(8, 3, 3, 3)), b1=np.full(8, 3.0, np.float32))
    bits = {name: grid.bits for name, grid in quantize(path, portable=True).plan.weights.items()}
    plain = {name: grid.bits for name, grid in quantize(path, target="cpu").plan.weights.items()}
    assert set(plain.values()) == {8}
    assert 7 in bits.values()


def test_a_crashing_simplifier_is_survived(tmp_path, monkeypatch):
    path = conv_net(tmp_path)
    monkeypatch.setattr(simplifier, "simplify", lambda model, **_: (model, "simplification crashed (SIGFPE)"))
    found = quantize(path)
    assert found.prepared.simplified == "simplification crashed (SIGFPE)"
    assert found.verdict.coverage.share == 1.0


def test_a_simplifier_that_changes_the_model_is_found_out(tmp_path, monkeypatch):
    path = conv_net(tmp_path)

    def wrong(model, **_):
        copy = model.clone()
        weight = copy.graph.initializers["w2"]
        doubled = graph.add_constant(copy, "doubled", weight.const_value.numpy() * 2)
        graph.redirect(weight, doubled)
        return copy, None

    monkeypatch.setattr(simplifier, "simplify", wrong)
    found = quantize(path)
    assert "simplification changed the model" in found.prepared.simplified
    assert found.verdict.fidelity.sqnr_db["y"] > 30


def test_a_wrong_rewrite_is_left_out(tmp_path, monkeypatch):
    def wrong(model):
        node = next((node for node in model.graph if node.op_type == "Relu"), None)
        return int(node is not None and graph.bypass(node, model))

    path = conv_net(tmp_path)
    monkeypatch.setattr("onnxq.passes._REGISTERED", {})
    onnxq.register_pass("Wrong", wrong)
    assert quantize(path).verdict.fidelity.sqnr_db["y"] > 30


def test_the_kernel_gap_sees_a_wrong_weight_axis(tmp_path):
    """The runtime fuses a weight DequantizeLinear whatever its axis; the result is silently wrong."""
    wide = weights(8, 8, 3, 3) * np.geomspace(0.01, 10, 8, dtype=np.float32)[:, None, None, None]
    found = quantize(conv_net(tmp_path, w2=wide))
    feeds = {"x": ROWS["x"][:2]}
    assert judge.kernel_gap(found.model, feeds) <= 1
    broken = found.model.clone()
    for node in broken.graph:
        if node.op_type == "DequantizeLinear" and "axis" in node.attributes and "weight" in node.name:
            shape = node.inputs[0].const_value.shape
            if list(shape[:2]) == [8, 8]:
                graph.set_attribute(node, "axis", 1)
    assert judge.kernel_gap(broken, feeds) > judge.ALLOWED_GAP


def test_models_without_work_are_declined(tmp_path):
    onnx.save(proto("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="nothing to quantize"):
        quantize(tmp_path / "m.onnx", {"x": np.zeros((4, 4), np.float32)})
    onnx.save(proto("g (float[N,4] x) => (float[N,N] y) { t = Transpose(x) y = MatMul(x, t) }"), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="both operands are computed at run time"):
        quantize(tmp_path / "m.onnx", {"x": np.zeros((4, 4), np.float32)})


def test_rows_with_nan_are_refused(tmp_path):
    rows = {"x": np.where(np.arange(40)[:, None, None, None] == 3, np.nan, ROWS["x"]).astype(np.float32)}
    with pytest.raises(DataError, match="x"):
        quantize(conv_net(tmp_path), rows)


def test_evaluate_scores_arrays_with_labels(tmp_path):
    path = conv_net(tmp_path)
    found = quantize(path)
    found.save(tmp_path / "q.onnx")
    labels = np.zeros(40, np.int64)
    scored = onnxq.evaluate(tmp_path / "q.onnx", ROWS | {"label": labels}, reference=path)
    assert scored.rows == 40
    assert 0 <= scored.paired.p_value <= 1
    gain = scored.accuracy.value - scored.reference_accuracy.value
    assert scored.paired.difference.value == pytest.approx(gain)
    assert (scored.paired.gained - scored.paired.lost) / 40 == pytest.approx(gain)
    assert scored.correct.right.count("1") == round(40 * scored.accuracy.value)
    assert scored.fidelity.sqnr_db["y"] > 30
    unlabelled = onnxq.evaluate(tmp_path / "q.onnx", ROWS, reference=path)
    assert unlabelled.accuracy is unlabelled.paired is unlabelled.correct is None
    assert dataclasses.asdict(unlabelled.fidelity) == dataclasses.asdict(scored.fidelity)


def test_inspect_reads_a_float_file(tmp_path):
    found = onnxq.inspect(conv_net(tmp_path))
    assert found.coverage is None
    assert [layer.op_type for layer in found.layers] == ["Conv", "Conv", "Gemm"]
    assert found.layers[0].weight_shape == (8, 3, 3, 3)
    assert found.blocks is None
    blocks = onnxq.inspect(conv_net(tmp_path), blocks=True).blocks
    assert [name for block in blocks for name in block.layers] == [layer.name for layer in found.layers]


def test_public_names_stay_callable_after_use(tmp_path):
    path = conv_net(tmp_path)
    quantize(path)
    for name in ("quantize", "simplify", "inspect", "evaluate", "benchmark", "load"):
        assert callable(getattr(onnxq, name)), name
    assert onnxq.simplify(path).model is not None
    assert story.__name__ == "onnxq.pipeline.run"


@pytest.mark.parametrize("order", ["float t, float[n,3,16] x", "float[n,3,16] x, float t"])
@pytest.mark.parametrize("preset", ["balanced", "fastest"])
def test_an_input_without_axes_is_handed_over_whole(order, preset, tmp_path):
    """A scale, a threshold: batches of such a model cannot be cut into rows."""
    text = f"""g ({order}, float[16,40] w, float[40,8] v) => (float[n,3,8] y) {{
        s = Mul(x, t) a = MatMul(s, w) r = Relu(a) y = MatMul(r, v)
    }}"""
    onnx.save(proto(text, w=weights(16, 40), v=weights(40, 8)), tmp_path / "net.onnx")
    rows = [{"x": weights(1, 3, 16, seed=seed), "t": np.float32(2.0)} for seed in range(16)]
    found = onnxq.quantize(tmp_path / "net.onnx", rows, preset)
    assert found.verdict.fidelity.sqnr_db["y"] > 30
    assert found.verdict.latency
