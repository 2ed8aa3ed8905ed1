"""`--weight-only`: the weights of MatMuls in blocks, floats everywhere else."""

import json
import sys

import numpy as np
import onnx
import pytest
from helpers import proto, weights

import onnxq
from onnxq import calibrate, graph
from onnxq.errors import UnsupportedError, UsageError
from onnxq.pipeline import weight_only
from onnxq.runtime import Session

NET = """
g (float[N,T,48] x, float[48,96] w1, float[96] b1, float[96,40] w2, float[40,16] w3) => (float[N,T,16] y) {
  a = MatMul(x, w1)  b = Add(a, b1)  c = Relu(b)  d = MatMul(c, w2)  e = Relu(d)  y = MatMul(e, w3)
}
"""
SIZES = {"w1": (48, 96), "b1": (96,), "w2": (96, 40), "w3": (40, 16)}
MIX = np.random.default_rng(1).normal(size=(48, 48)).astype(np.float32)
ROWS = {"x": np.random.default_rng(5).normal(size=(60, 7, 48)).astype(np.float32) @ MIX}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("weight-only") / "net.onnx"
    onnx.save(proto(NET, **{name: 0.2 * weights(*shape, seed=1) for name, shape in SIZES.items()}), path)
    return path


def quantized(path, **options):
    options = {"weight_only": True, "first_last": 4, "weight_bits": 4} | options
    return onnxq.quantize(path, ROWS, checks=onnxq.Checks(time_it=False), **options)


@pytest.fixture(scope="module")
def found(net):
    return quantized(net)


def bits(result):
    """Of every product, in order; 32 for those in float."""
    products = [node for node in result.model.graph if node.op_type in ("MatMul", "MatMulNBits")]
    return [graph.attribute(node, "bits", 32) for node in products]


def outputs(model):
    return Session(model).run(ROWS)["y"].astype(np.float64)


def sqnr(wanted, got):
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum())


def test_matmuls_are_stored_in_blocks_and_run_in_integers(net, found):
    assert [node.op_type for node in found.model.graph] == [
        "MatMulNBits",
        "Add",
        "Relu",
        "MatMulNBits",
        "Relu",
        "MatMulNBits",
    ]
    assert bits(found) == [4, 4, 4]
    assert found.verdict.coverage.integer_macs == found.verdict.coverage.total_macs
    assert found.verdict.fidelity.sqnr_db["y"] > 18
    assert quantized(net, weight_bits=8, first_last=8).verdict.fidelity.sqnr_db["y"] > 35


def test_the_first_and_last_layer_have_their_own_bits(net):
    found = quantized(net, first_last=8)
    assert bits(found) == [8, 4, 8]


def test_rounding_with_feedback_brings_the_outputs_nearer(net, found, monkeypatch):
    wanted, learned = outputs(net), found
    assert learned.steps[0].kept
    monkeypatch.setattr(weight_only, "round_with_feedback", lambda weight, steps, *_: np.zeros(weight.shape, np.int8))
    plain = quantized(net)
    assert not plain.steps[0].kept
    assert not plain.learned
    assert sqnr(wanted, outputs(learned.model)) > sqnr(wanted, outputs(plain.model)) + 2


def test_the_report_shows_blocks_as_the_integers_they_are(net):
    run = onnxq.quantize(net, ROWS, weight_only=True, weight_bits=4, first_last=8,
                         checks=onnxq.Checks(time_it=False, explain=True))  # fmt: skip
    layers = run.details.layers
    assert [(layer.integer, layer.weight_bits, layer.input_bits) for layer in layers] == [
        (True, 8, 8), (True, 4, 8), (True, 8, 8)]  # fmt: skip
    # codes of whole blocks of 32 inputs, and a float32 step for each
    assert [layer.stored_bytes for layer in layers] == [96 * 2 * (32 + 4), 40 * 3 * (16 + 4), 16 * 2 * (32 + 4)]
    assert [layer.tuned for layer in layers] == [layer.name in run.learned for layer in layers]
    first, middle, _ = (layer.weight for layer in layers)
    assert first.sqnr_db > 40 > middle.sqnr_db > 15
    assert (len(middle.codes.counts), sum(middle.codes.counts)) == (16, 96 * 40)


def test_a_plan_brings_the_same_file_back(net, tmp_path):
    from onnxq.pipeline import reemit

    found = onnxq.quantize(net, ROWS, checks=onnxq.Checks(time_it=False, ranges=True), weight_only=True, weight_bits=4)
    found.save_plan(tmp_path / "plan.json")
    again = reemit(tmp_path / "plan.json", model=net)
    np.testing.assert_array_equal(outputs(again.model), outputs(found.model))


def test_layers_stay_in_float_when_asked_to(net, found):
    name = next(str(node.name) for node in graph.nodes(found.prepared.model, "MatMul"))
    kept = quantized(net, keep_float=[name])
    assert bits(kept) == [32, 4, 4]
    assert name in kept.plan.skipped


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "tensorrt"}, "for --target cpu and web, not tensorrt"),
        ({"weight_bits": 5}, "--weight-bits 5 is neither"),
        ({"first_last": 6}, "--first-last 6 is neither"),
        ({"activation_bits": 4}, "leaves activations in float"),
        ({"max_size": "0.2x", "weight_bits": 8}, "neither with budgets"),
        ({"reconstruction": "adaquant"}, "nor with learning"),
        ({"layers": [{"match": "*", "weights": {"bits": 8}}]}, "keep layers in float"),
    ],
)
def test_what_does_not_go_with_it_is_refused(net, options, said):
    with pytest.raises(UsageError, match=said):
        quantized(net, **options)


def test_a_model_without_large_matmuls_is_declined(tmp_path):
    made = proto("g (float[N,8] x, float[8,4] w) => (float[N,4] y) { y = MatMul(x, w) }", w=weights(8, 4))
    onnx.save(made, tmp_path / "small.onnx")
    with pytest.raises(UnsupportedError, match="finds no MatMul"):
        onnxq.quantize(tmp_path / "small.onnx", {"x": weights(20, 8)}, weight_only=True)


def test_infinities_inside_the_network_break_nothing(tmp_path):
    head = "g (float[N,48] x, float[48,40] w, float[40,8] v) => (float[N,8] y)"
    text = head + " { a = MatMul(x, w)  b = Exp(a)  c = MatMul(b, v)  y = Relu(c) }"
    onnx.save(proto(text, w=100 * weights(48, 40), v=weights(40, 8)), tmp_path / "net.onnx")
    found = onnxq.quantize(
        tmp_path / "net.onnx", {"x": ROWS["x"][:, 0]}, weight_only=True, weight_bits=4, first_last=4,
        checks=onnxq.Checks(time_it=False),
    )  # fmt: skip
    assert bits(found) == [4, 4]


@pytest.mark.parametrize("limit", [1, 1 << 29])
def test_second_moments_are_those_of_the_tensors(net, limit, monkeypatch):
    monkeypatch.setattr(sys.modules["onnxq.calibrate.grams"], "LIMIT", limit)
    model = graph.load(net)
    widths = {"x": 48, "d": 40}
    parts = list(calibrate.grams(model, [{"x": ROWS["x"][:20]}, {"x": ROWS["x"][20:]}], widths))
    assert [len(part) for part in parts] == ([1, 1] if limit == 1 else [2])
    found = {name: gram for part in parts for name, gram in part.items()}
    inner = Session(graph.with_outputs(model, ["d"])).run(ROWS)["d"].reshape(-1, 40).astype(np.float64)
    flat = ROWS["x"].reshape(-1, 48).astype(np.float64)
    np.testing.assert_allclose(found["x"], flat.T @ flat, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found["d"], inner.T @ inner, rtol=1e-4, atol=1e-2 * np.abs(inner).max() ** 2)


def test_a_dry_run_and_the_document_name_blocks(net, tmp_path, capsys):
    from onnxq.cli.main import _run as command

    np.savez(tmp_path / "rows.npz", **ROWS)
    options = ["--data", str(tmp_path / "rows.npz"), "--weight-only", "--weight-bits", "4", "--dry-run", "-q"]
    assert command(["quantize", str(net), *options]) == 0
    shown = capsys.readouterr().out
    assert shown.count("blocks of 32") == 3
    assert "0 nodes in integers, 0 quantized tensors, 3 with weights in blocks" in shown
    assert command(["quantize", str(net), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [block["bits"] for block in document["blocks"].values()] == [8, 4, 8]
    assert document["dynamic"] == []
