"""`quantize` for targets whose providers are not here, and plans emitted again for others."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers import proto, weights

import onnxq
from onnxq import graph
from onnxq.emit import emit, weight_codes
from onnxq.errors import InputError, ModelError, UnsupportedError, UsageError
from onnxq.pipeline import reemit
from onnxq.pipeline.reemit import Emitted
from onnxq.plan import load_learned, load_with_origin
from onnxq.runtime import Session, SessionConfig
from onnxq.types import LearnedLayer

NET = """
g (float[N,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8,4] w3, float[4] b3)
    => (float[N,4] y) {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)  r = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(r, w2)      s = Add(r, c)   t = Relu(s)
  p = GlobalAveragePool(t)  f = Flatten(p)  m = MatMul(f, w3)  n = Add(m, b3)  y = Softmax(n)
}
"""
SIZES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (8, 4), "b3": (4,)}
ROWS = {"x": np.random.default_rng(5).normal(size=(40, 3, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "net.onnx"
    onnx.save(proto(NET, **{name: 0.2 * weights(*shape, seed=1) for name, shape in SIZES.items()}), path)
    return path


@pytest.fixture(scope="module")
def kept(net):
    """A plan for the CPU with learned codes and biases and the ranges that other targets need; (file, result)."""
    found = quantize(net, ranges=True, target="cpu")
    layers = {name: graph.layer_of(graph.node_names(found.prepared.model)[name]) for name in found.plan.weights}
    learned = {}
    for name, layer in layers.items():
        codes = weight_codes(layer, found.plan.weights[name])
        codes.reshape(-1)[::7] -= np.sign(codes.reshape(-1)[::7])
        bias = np.zeros(layer.channels, np.float32) if layer.bias is None else layer.bias
        learned[name] = LearnedLayer(codes, bias + 0.002 * weights(layer.channels, seed=3))
    said = {key: text for key, text in found.model.metadata_props.items() if key.startswith("onnxq.")}
    made = emit(found.prepared.model, found.plan, said, learned, fused=True)
    result = replace(found, learned=learned, model=made)
    result.save_plan(net.with_name("plan.json"))
    result.save(net.with_name("cpu.onnx"))
    return net.with_name("plan.json"), result


def quantize(path, ranges=False, time_it=False, data=ROWS, recipe="fast", **options):
    return onnxq.quantize(path, data, recipe, checks=onnxq.Checks(time_it=time_it, ranges=ranges), **options)


def sqnr(path, made):
    plain = Session(path).run(ROWS)["y"]
    got = Session(made, SessionConfig(simulate=True)).run(ROWS)["y"]
    assert got.dtype == np.float32
    return 10 * np.log10(np.square(plain).sum() / np.square(got - plain).sum())


PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}


@pytest.mark.parametrize("target", PROVIDERS)
def test_what_a_missing_provider_would_show_is_not_claimed(net, target):
    found = quantize(net, time_it=True, target=target)
    verdict = found.verdict
    assert verdict.notes[0] == f"not timed: the provider {PROVIDERS[target]} is not here"
    assert not verdict.latency
    assert math.isnan(verdict.optimized_gap)
    assert verdict.coverage.planned
    assert verdict.coverage.kernels == {}
    assert verdict.coverage.share == (0.0 if target == "cuda" else 1.0)
    assert verdict.fidelity.sqnr_db["y"] > (50 if target == "cuda" else 25)
    assert found.plan.target == target
    assert sqnr(net, found.model) > 25


def test_a_browser_runs_the_cpus_kernels_but_is_not_timed_here(net):
    found = quantize(net, time_it=True, target="web")
    assert found.verdict.notes == ("not timed: the file runs in a browser",)
    assert not found.verdict.coverage.planned
    assert found.verdict.coverage.share == 1.0
    assert found.verdict.optimized_gap <= 1
    assert found.plan.target == "web"


def test_rewrites_that_serve_the_cpu_alone_are_left_out(tmp_path):
    path = tmp_path / "grouped.onnx"
    text = "g (float[N,16,6,6] x, float[16,2,3,3] w) => (float[N,16,4,4] y) { y = Conv<group = 8>(x, w) }"
    onnx.save(proto(text, w=weights(16, 2, 3, 3)), path)
    rows = {"x": weights(16, 16, 6, 6)}
    shapes = {
        target: [graph.constant(node.inputs[1]).shape for node in graph.nodes(found.prepared.model, "Conv")]
        for target in ("cpu", "tensorrt")
        for found in [quantize(path, data=rows, target=target)]
    }
    assert shapes["cpu"] != [(16, 2, 3, 3)]
    assert shapes["tensorrt"] == [(16, 2, 3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "activation_bits": 4}, "--activation-bits 4 is nothing that --target tensorrt has"),
        ({"target": "openvino", "activation_bits": 16}, "--activation-bits 16 .* it takes 8"),
        ({"target": "web", "activation_bits": 16}, "--activation-bits 16"),
        ({"target": "qnn", "activation_bits": 6}, "it takes 8, 16"),
        ({"target": "tensorrt", "residual_bits": 4}, "--residual-bits 4"),
        ({"target": "tensorrt", "attention": "4"}, "--attention 4"),
        ({"target": "cuda", "weight_bits": 3}, "--weight-bits 3 .* it takes 4, 8"),
        ({"target": "cuda", "first_last": 2}, "--first-last 2"),
        ({"target": "qnn", "max_size": "0.2x"}, "budgets are measured on the CPU, not for --target qnn"),
        ({"target": "cuda", "attention": "8"}, "no integer codes to learn"),
        ({"target": "cuda", "reconstruction": "adaquant"}, "no integer codes to learn"),
    ],
)
def test_what_a_target_has_no_kernels_for_is_refused(net, options, message):
    with pytest.raises(UsageError, match=message):
        quantize(net, **options)


def test_four_bits_are_stored_in_blocks_for_gpus(tmp_path):
    path = tmp_path / "linear.onnx"
    text = """g (float[N,128] x, float[128,256] a, float[256,128] b, float[128,5] c) => (float[N,5] y) {
        h = MatMul(x, a)  i = Relu(h)  j = MatMul(i, b)  k = Relu(j)  y = MatMul(k, c) }"""
    onnx.save(proto(text, a=weights(128, 256), b=weights(256, 128), c=weights(128, 5)), path)
    rows = {"x": weights(20, 128)}
    for target, block in (("cuda", 32), ("tensorrt", 128)):
        found = quantize(path, data=rows, target=target, weight_bits=4)
        layers = [str(node.name) for node in graph.nodes(found.prepared.model, "MatMul")]
        assert {name: (grid.bits, grid.block) for name, grid in found.plan.blocks.items()} == {layers[1]: (4, block)}
        assert layers[1] not in found.plan.skipped
        assert list(found.plan.weights) == ([layers[0], layers[2]] if target == "tensorrt" else [])
        assert 10 < found.verdict.fidelity.sqnr_db["y"] < 35


def test_the_plans_own_target_gives_the_same_bytes(net, kept):
    path, result = kept
    found = reemit(path)
    assert isinstance(found, Emitted)
    assert found.changes == ()
    assert found.plan == result.plan
    assert graph.to_bytes(found.model) == net.with_name("cpu.onnx").read_bytes()


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "qnn", "web", "cuda"])
def test_a_plan_for_the_cpu_serves_every_target(net, kept, target):
    path, result = kept
    found = reemit(path, target)
    onnx.checker.check_model(graph.to_bytes(found.model), full_check=True)
    assert found.plan.target == target
    assert json.loads(found.model.metadata_props["onnxq.recipe"])["target"] == target
    assert found.model.metadata_props["onnxq.planned_for"] == "cpu"
    assert sqnr(net, found.model) > (50 if target == "cuda" else 20)
    if target == "cuda":
        assert found.plan.half
        assert "float16" in found.changes[0]
        return
    assert set(found.plan.weights) == set(result.plan.weights)
    said = " | ".join(found.changes)
    assert ("biases are float32" in said) == (target in ("tensorrt", "openvino"))
    if target == "tensorrt":
        assert "tensors change from uint8 to int8, around zero" in said
        for name, grid in found.plan.tensors.items():
            old = result.plan.tensors[name]
            ends = [(code - old.zero_point) * old.scale for code in (0, 255)]
            assert grid.zero_point == 0
            assert grid.scale == pytest.approx(max(map(abs, ends)) / 127, rel=1e-6)
    if target == "qnn":
        assert "1 of 3 weights get other steps, 1 lose learned codes" in said


def test_learned_biases_and_codes_move_to_the_other_target(kept):
    path, result = kept
    learned = load_learned(path.with_suffix(".npz"))
    made = graph.node_names(reemit(path, "tensorrt").model)
    checked = 0
    for name, layer in learned.items():
        if made[name].op_type != "Conv":
            continue
        stored = graph.producer(made[name].inputs[1], "DequantizeLinear").inputs[0]
        np.testing.assert_array_equal(graph.constant(stored), layer.codes)
        np.testing.assert_array_equal(graph.constant(made[name].inputs[2]), layer.bias)
        checked += 1
    assert checked == 2
    assert result.plan.weights


def test_the_way_back_to_the_cpu_uses_what_was_seen(net, tmp_path):
    result = quantize(net, ranges=True, target="tensorrt")
    result.save_plan(tmp_path / "plan.json")
    found = reemit(tmp_path / "plan.json", "cpu")
    assert set(found.plan.tensors) > set(result.plan.tensors)
    seen = load_with_origin(tmp_path / "plan.json")[1].ranges
    grid = found.plan.tensors["x"]
    low, high = (code - grid.zero_point for code in (0, 255))
    assert low * grid.scale == pytest.approx(seen["x"][0], rel=0.05)
    assert high * grid.scale == pytest.approx(seen["x"][1], rel=0.05)
    assert found.plan.tensors["r"].zero_point == 0
    assert sqnr(net, found.model) > 25


def test_without_ranges_of_all_tensors_their_nodes_stay_float_and_that_is_said(net, tmp_path):
    quantize(net, target="tensorrt").save_plan(tmp_path / "plan.json")
    assert load_with_origin(tmp_path / "plan.json")[1].ranges == {}
    found = reemit(tmp_path / "plan.json", "qnn")
    assert 0 < len(found.plan.tensors) < 12
    assert any("quantize --save-plan measures them all" in sentence for sentence in found.changes)
    assert sqnr(net, found.model) > 25


def test_layers_that_were_asked_to_stay_in_float_do(net, tmp_path):
    quantize(net, ranges=True, target="cpu", keep_float=("*MatMul*",)).save_plan(tmp_path / "plan.json")
    for target in ("tensorrt", "qnn"):
        found = reemit(tmp_path / "plan.json", target)
        assert len(found.plan.weights) == 2
        assert "asked to stay in float" in found.plan.skipped.values()


def test_per_tensor_weights_and_equalisation_are_done_again(net, tmp_path):
    result = quantize(net, target="cpu", per_channel=False, without=("FuseActivations",))
    result.save_plan(tmp_path / "plan.json")
    assert graph.to_bytes(reemit(tmp_path / "plan.json").model) == graph.to_bytes(result.model)
    found = reemit(tmp_path / "plan.json", "tensorrt")
    assert {grid.axis for grid in found.plan.weights.values()} == {None}


def test_few_bits_go_where_they_can(net, tmp_path):
    result = quantize(net, ranges=True, target="cpu", weight_bits=4, activation_bits=4)
    result.save_plan(tmp_path / "plan.json")
    assert graph.to_bytes(reemit(tmp_path / "plan.json").model) == graph.to_bytes(result.model)
    found = reemit(tmp_path / "plan.json", "tensorrt")
    assert {grid.bits for grid in found.plan.tensors.values()} == {8}
    assert [grid.bits for grid in found.plan.weights.values()] == [grid.bits for grid in result.plan.weights.values()]
    assert any("from uint8 of 4 bits to int8" in sentence for sentence in found.changes)


def test_migrated_scales_move_again(tmp_path):
    path = tmp_path / "norm.onnx"
    text = """g (float[N,4,8] x, float[8] g, float[8] s, float[8,8] w, float[8] b) => (float[N,4,8] y) {
        n = LayerNormalization(x, g, s)  h = MatMul(n, w)  y = Add(h, b) }"""
    gamma = np.array([0.1, 9, 0.3, 2, 0.2, 5, 1, 0.05], np.float32)
    onnx.save(proto(text, g=gamma, s=weights(8), w=weights(8, 8), b=weights(8)), path)
    rows = {"x": weights(40, 4, 8)}
    result = quantize(path, data=rows, target="cpu", migrate_norms=True, activation_bits=6, weight_bits=4)
    assert result.prepared.migrations
    result.save_plan(tmp_path / "plan.json")
    assert graph.to_bytes(reemit(tmp_path / "plan.json").model) == graph.to_bytes(result.model)


def test_loud_channels_move_again_and_are_worth_it(tmp_path):
    path = tmp_path / "loud.onnx"
    text = """g (float[N,8,6,6] x, float[16,8,3,3] v, float[8,16,3,3] w) => (float[N,8,h,k] y) {
        h = Conv(x, v) r = Relu(h) y = Conv(r, w) }"""
    factors = np.where(np.arange(16) == 5, 50.0, 1.0).astype(np.float32)[:, None, None]
    onnx.save(proto(text, v=weights(16, 8, 3, 3) * factors[..., None], w=weights(8, 16, 3, 3) / factors), path)
    rows = {"x": weights(80, 8, 6, 6)}
    choices = ((), ("MigrateGroups",))
    moved, left = (quantize(path, data=rows, target="cpu", migrate_norms=True, without=names) for names in choices)
    assert list(moved.prepared.migrations) == ["h"]
    assert not left.prepared.migrations
    assert moved.verdict.fidelity.sqnr_db["y"] > left.verdict.fidelity.sqnr_db["y"] + 10.0
    moved.save_plan(tmp_path / "plan.json")
    assert graph.to_bytes(reemit(tmp_path / "plan.json").model) == graph.to_bytes(moved.model)


def test_weights_with_one_step_have_been_equalised_without_rows(net, monkeypatch):
    def never(*given, **options):
        raise AssertionError

    monkeypatch.setattr("onnxq.pipeline.migration.take_down", never)
    assert not quantize(net, target="cpu", migrate_norms=True, per_channel=False).prepared.migrations


def test_a_model_that_returns_as_many_rows_as_it_finds(tmp_path):
    """As detectors do; what rounding finds more or less cannot be compared, neither in tuning nor in the end."""
    path = tmp_path / "finder.onnx"
    text = """g (float[N,3,8,8] x, float[8,3,3,3] w) => (float[K,C] y) {
        h = Conv(x, w) r = Relu(h) t = Constant<value = float[1] {0.8}>() b = Greater(r, t) i = NonZero(b)
        j = Transpose(i) v = GatherND(r, j) a = Constant<value = int64[1] {1}>() u = Unsqueeze(v, a)
        y = Concat<axis = 1>(u, u) }"""
    onnx.save(proto(text, w=0.3 * weights(8, 3, 3, 3)), path)
    found = quantize(path, recipe="balanced", target="cpu")
    assert found.verdict.fidelity.uneven == ("y",)
    assert not found.verdict.fidelity.sqnr_db
    assert found.plan.weights


def test_a_model_in_another_place_is_named_and_another_model_refused(net, kept, tmp_path):
    path, result = kept
    moved = tmp_path / "plan.json"
    moved.write_bytes(path.read_bytes())
    moved.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes())
    with pytest.raises(ModelError, match=r"net\.onnx, which is not there; say where it is with --model"):
        reemit(moved)
    assert graph.to_bytes(reemit(moved, model=net).model) == graph.to_bytes(result.model)
    other = tmp_path / "other.onnx"
    onnx.save(proto(NET, **{name: 0.2 * weights(*shape, seed=2) for name, shape in SIZES.items()}), other)
    with pytest.raises(InputError, match="its SHA-256 is another"):
        reemit(moved, model=other)
    moved.with_suffix(".npz").unlink()
    with pytest.raises(InputError, match=r"plan\.npz is not beside it"):
        reemit(moved, model=net)


def test_a_plan_of_another_preparation_is_refused(net, kept, tmp_path):
    path, _ = kept
    document = json.loads(path.read_text())
    document["source"] = "0" * 64
    document["origin"]["learned"] = False
    edited = tmp_path / "plan.json"
    edited.write_text(json.dumps(document))
    with pytest.raises(InputError, match="becomes another graph"):
        reemit(edited, model=net)


def test_unknown_targets_and_plans_without_an_origin_are_refused(kept, tmp_path):
    path, result = kept
    with pytest.raises(UsageError, match="there is no target 'tpu'; targets: cpu, tensorrt"):
        reemit(path, "tpu")
    from onnxq.plan import save_plan

    save_plan(result.plan, tmp_path / "bare.json")
    with pytest.raises(InputError, match=r"bare\.json does not say which model it is for"):
        reemit(tmp_path / "bare.json")


def test_a_target_without_a_layer_is_refused(net, tmp_path):
    quantize(net, target="cuda").save_plan(tmp_path / "plan.json")
    with pytest.raises(UnsupportedError, match="no layer of this model runs in integers on tensorrt"):
        reemit(tmp_path / "plan.json", "tensorrt")
