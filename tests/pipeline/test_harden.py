"""Hardening as a whole: what is kept, what is reported, what is refused."""

import sys

import numpy as np
import pytest
from helpers import model, weights

torch = pytest.importorskip("torch")

from onnxq import bench, graph  # noqa: E402
from onnxq.errors import EnvironmentFault, UnsupportedError, UsageError  # noqa: E402
from onnxq.pipeline import Checks, quantize, simplify  # noqa: E402
from onnxq.pipeline import harden as module  # noqa: E402
from onnxq.pipeline.harden import HardenSettings, harden  # noqa: E402
from onnxq.runtime import Session  # noqa: E402
from onnxq.types import Fidelity, Interval  # noqa: E402

torch.set_num_threads(1)

CNN = """
g (float[n,3,8,8] x, float[8,3,3,3] w, float[8] s, float[8] o, float[8] m, float[8] v, float[16,8,3,3] w2, float[16] b2,
   float[16,10] h, float[10] hb) => (float[n,10] y) {
  a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w)
  c = BatchNormalization<epsilon=0.1>(a, s, o, m, v)
  r = Relu(c)
  d = Conv<pads=[1,1,1,1]>(r, w2, b2)
  e = Relu(d)
  p = GlobalAveragePool(e)
  f = Flatten(p)
  y = Gemm(f, h, hb)
}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A CNN whose weights have outliers, and rows for it."""
    w2 = weights(16, 8, 3, 3)
    w2.reshape(-1)[::90] *= 4
    made = model(
        CNN,
        w=weights(8, 3, 3, 3),
        s=weights(8, low=0.5, high=2.0),
        o=weights(8),
        m=weights(8, seed=1),
        v=weights(8, low=0.5, high=2.0, seed=1),
        w2=w2 * np.float32(0.2),
        b2=weights(16),
        h=weights(16, 10),
        hb=weights(10),
    )
    path = tmp_path_factory.mktemp("harden") / "cnn.onnx"
    graph.save(made, path)
    return path, {"x": weights(96, 3, 8, 8, seed=5)}


SETTINGS = HardenSettings(iterations=60, rate=2e-2, strength=0.1, batch=16, device="cpu", per_channel=False)


@pytest.fixture(scope="module")
def hardened(source):
    """Kept, whatever it is worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_verdict", lambda *_: (True, "a test"))
        return harden(*source, SETTINGS)


def test_weights_get_narrower_and_everything_is_reported(hardened):
    report = hardened.report
    assert (report.kept, report.reason, report.rows, report.fidelity.rows) == (True, "a test", 84, 12)
    before, after = (sum(layer.per_tensor[side] for layer in report.layers) for side in (0, 1))
    assert after < 0.9 * before
    assert report.losses["range"][1] < report.losses["range"][0]
    assert [(entry.bits, entry.per_channel) for entry in report.low_bits] == [
        (bits, per_channel) for per_channel in (True, False) for bits in (4, 3, 2)
    ]


def test_the_result_has_the_same_interface_and_the_reported_fidelity(source, hardened, tmp_path):
    report = hardened.save(tmp_path / "hard.onnx")
    assert report.output == str(tmp_path / "hard.onnx")
    loaded, original = graph.load(report.output), graph.load(source[0])
    assert graph.input_specs(loaded) == graph.input_specs(original)
    assert [value.name for value in loaded.graph.outputs] == [value.name for value in original.graph.outputs]
    held = {"x": source[1]["x"][7::8]}
    found = bench.compare(Session(source[0]), Session(tmp_path / "hard.onnx"), [held])
    assert found.sqnr_db["y"] == pytest.approx(report.fidelity.sqnr_db["y"], abs=0.05)
    assert 12 < found.sqnr_db["y"] < 60
    assert loaded.metadata_props["onnxq.source"] == "cnn.onnx"
    assert '"kept": true' in loaded.metadata_props["onnxq.harden"]


def test_the_reported_ranges_are_those_of_the_weights(source, hardened):
    for side, float_model in ((0, simplify(source[0]).model), (1, hardened.model)):
        layers = [graph.layer_of(node) for node in graph.nodes(float_model, "Conv", "Gemm")]
        assert len(layers) == len(hardened.report.layers) == 3
        for layer, entry in zip(layers, hardened.report.layers, strict=True):
            ratio = np.abs(layer.weight).max() / layer.weight.std()
            assert entry.per_tensor[side] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize(("per_channel", "side"), [(True, "before"), (False, "after")])
def test_the_low_bit_errors_are_those_of_quantizing_the_files(source, hardened, tmp_path, per_channel, side):
    hardened.save(tmp_path / "hard.onnx")
    (entry,) = (e for e in hardened.report.low_bits if e.bits == 4 and e.per_channel == per_channel)
    path = source[0] if side == "before" else tmp_path / "hard.onnx"
    settings = {"weight_bits": 4, "per_channel": per_channel, "ranges": "mse"}
    made = quantize(path, source[1], checks=Checks(verify=False), **settings)
    found = bench.compare(Session(source[0]), Session(made.model), [{"x": source[1]["x"][7::8]}])
    assert found.sqnr_db["y"] == pytest.approx(getattr(entry, side).sqnr_db["y"], abs=0.3)


def test_what_moves_too_far_is_put_back(source, monkeypatch):
    monkeypatch.setattr(module, "_low_bits", lambda *_: ())
    settings = HardenSettings(iterations=4, rate=0.5, strength=1.0, device="cpu")
    found = harden(*source, settings)
    assert not found.report.kept
    assert "moved too far" in found.report.reason
    rows = {"x": source[1]["x"][:8]}
    gap = bench.compare(Session(source[0]), Session(found.model), [rows])
    assert gap.sqnr_db["y"] > 80
    assert '"kept": false' in found.model.metadata_props["onnxq.harden"]


def fidelity(db):
    return Fidelity(8, {"y": db}, Interval(1.0, 0.9, 1.0))


@pytest.mark.parametrize(
    ("after", "floats", "per_channel", "kept"),
    [
        ((11.0, 8.9, 2.0), 20.0, True, True),
        ((9.0, 9.0, 2.0), 20.0, True, False),
        ((12.0, 9.0, 3.0), 14.9, True, False),
        ((12.0, 9.0, 3.0), 20.0, False, False),
        ((10.5, 8.7, -9.0), 20.0, True, False),
    ],
)
def test_the_verdict_looks_at_the_granularity_asked_for(after, floats, per_channel, kept):
    before = (10.0, 9.0, 1.0)
    sides = [
        module.LowBits(bits, True, fidelity(a), fidelity(b))
        for bits, a, b in zip((4, 3, 2), before, after, strict=True)
    ] + [module.LowBits(bits, False, fidelity(a), fidelity(a - 0.1)) for bits, a in zip((4, 3, 2), before, strict=True)]
    assert module._verdict(fidelity(floats), sides, HardenSettings(per_channel=per_channel))[0] is kept


def test_a_kind_that_is_none_is_refused(source):
    with pytest.raises(UsageError, match="l2"):
        harden(*source, HardenSettings(kind="l2", device="cpu"))


def test_noise_does_not_count_below_nothing():
    assert module._decibels(fidelity(-9.0)) == 0
    assert module._decibels(Fidelity(8, {"a": 4.0, "b": 8.0}, None)) == 6


def test_epochs_are_rows_seen(source, monkeypatch):
    seen = []
    from onnxq import train

    def distill(student, batches, how, log):
        seen.append((how.iterations, len(batches), how.kind))
        return [(0.0, 0.0)] * how.iterations

    monkeypatch.setattr(train, "distill", distill)
    monkeypatch.setattr(module, "_low_bits", lambda *_: ())
    monkeypatch.setattr(module, "_verdict", lambda *_: (False, ""))
    harden(*source, HardenSettings(epochs=3, batch=16, kind="linf", device="cpu"))
    assert seen == [(18, 6, "linf")]


def test_models_that_torch_cannot_run_are_declined(tmp_path):
    text = "g (float[n,4] x, float[4,4] w) => (float[n,4] y, float[k] u) { y = MatMul(x, w)  u = Unique(y) }"
    path = tmp_path / "m.onnx"
    graph.save(model(text, w=weights(4, 4)), path)
    with pytest.raises(UnsupportedError, match="Unique"):
        harden(path, {"x": weights(16, 4)}, HardenSettings(iterations=1))


def test_a_model_without_float_outputs_is_declined(tmp_path):
    text = "g (float[n,4] x, float[4,4] w) => (int64[n,1] c) { y = MatMul(x, w)  c = ArgMax<axis=1>(y) }"
    path = tmp_path / "m.onnx"
    graph.save(model(text, w=weights(4, 4)), path)
    with pytest.raises(UnsupportedError, match="no output of this model is a float"):
        harden(path, {"x": weights(16, 4)}, HardenSettings(iterations=1, device="cpu"))


def test_a_model_that_torch_computes_otherwise_is_declined(source, monkeypatch):
    from onnxq.train import Imported

    monkeypatch.setattr(Imported, "error", lambda *_: float("nan"))
    with pytest.raises(UnsupportedError, match="otherwise than onnxruntime"):
        harden(*source, HardenSettings(iterations=1))


def test_without_torch_one_line_says_what_to_install(source, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("onnxq.train")]:
        monkeypatch.delitem(sys.modules, name)
    import onnxq

    monkeypatch.delattr(onnxq, "train", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EnvironmentFault, match=r"harden needs PyTorch.*pip install 'onnxq\[learn\]'"):
        harden(*source)


@pytest.mark.parametrize(
    "change",
    [{"strength": -1.0}, {"epochs": 0}, {"iterations": -1}, {"rate": 0.0}, {"rate": float("nan")},
     {"batch": 0}, {"samples": 0}],
)  # fmt: skip
def test_wrong_settings_are_refused(change):
    with pytest.raises(UsageError):
        HardenSettings(**change)
