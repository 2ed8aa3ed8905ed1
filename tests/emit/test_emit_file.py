"""The file that is written, tables, and plans that do not fit."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from emitting import assert_good, quantized, stored
from helpers import model, ops, run, weights

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.plan import plan_from_json, plan_to_json
from onnxq.types import TensorGrid, WeightGrid

TEXT = """g (float[2,8] x, float[8,64] w, float[64] b, float[64,4] v) => (float[2,4] y) {
    [one] h = Gemm(x, w, b) r = Relu(h) [two] y = MatMul(r, v)
}"""
CONSTANTS = {"w": weights(8, 64), "b": weights(64), "v": weights(64, 4)}
FEEDS = {"x": weights(2, 8, seed=5)}


def small(opset=17):
    return model(TEXT, opset, **CONSTANTS)


@pytest.mark.parametrize(("opset", "expected"), [(13, 7), (16, 8), (19, 9), (21, 10), (23, 11)])
def test_the_file_format_is_the_oldest_that_goes_with_the_operators(opset, expected):
    m = small(opset)
    _, emitted, ran = assert_good(m, FEEDS)
    assert (emitted.ir_version, graph.opset(emitted)) == (expected, opset)
    assert "QGemm" in ran


def test_provenance_is_written(tmp_path):
    m = small()
    m.metadata_props["author"] = "somebody"
    plan, _ = quantized(m, FEEDS)
    graph.save(emit(m, plan, {"onnxq.version": "1", "onnxq.recipe": "{}"}), tmp_path / "q.onnx")
    made = onnx.load(tmp_path / "q.onnx")
    assert {entry.key: entry.value for entry in made.metadata_props} == {
        "author": "somebody",
        "onnxq.version": "1",
        "onnxq.recipe": "{}",
    }
    assert made.producer_name == "onnxq"
    assert dict(m.metadata_props) == {"author": "somebody"}


def test_float_weights_are_gone():
    m = small()
    _, emitted = quantized(m, FEEDS)
    kinds = {name: value.const_value.dtype.name for name, value in emitted.graph.initializers.items()}
    assert not {"w", "b", "v"} & set(kinds)
    assert graph.nbytes(emitted) < 0.5 * graph.nbytes(m)
    assert max(stored(emitted, name).size for name, kind in kinds.items() if kind == "FLOAT") == 64  # scales


def test_inputs_and_outputs_keep_names_types_and_shapes():
    m = small()
    _, emitted = quantized(m, FEEDS)
    assert graph.input_specs(emitted) == graph.input_specs(m) == [("x", "float32", (2, 8))]
    assert [(value.name, list(value.shape)) for value in emitted.graph.outputs] == [("y", [2, 4])]
    assert graph.value_map(emitted)["r"].shape is None


def test_a_saved_plan_gives_the_same_file():
    m = small()
    plan, emitted = quantized(m, FEEDS)
    assert graph.to_bytes(emit(m, plan_from_json(plan_to_json(plan)))) == graph.to_bytes(emitted)


def test_an_emitted_file_loads_like_any_other(tmp_path):
    m = small()
    _, emitted = quantized(m, FEEDS)
    graph.save(emitted, tmp_path / "q.onnx")
    again = graph.load(tmp_path / "q.onnx")
    assert ops(again) == ops(emitted)
    np.testing.assert_array_equal(run(again, FEEDS)["y"], run(emitted, FEEDS)["y"])
    assert set(graph.node_names(again)) >= {"one", "two"}


def test_a_plan_may_be_edited_by_hand():
    m = small()
    plan, _ = quantized(m, FEEDS)
    coarse = replace(plan.tensors["x"], scale=0.25, zero_point=10)
    emitted = emit(m, replace(plan, tensors={**plan.tensors, "x": coarse}))
    assert stored(emitted, "x_scale") == np.float32(0.25)
    assert stored(emitted, "x_zero_point") == 10
    scale = np.float32(0.25) * stored(emitted, "one.weight_scale")
    np.testing.assert_array_equal(stored(emitted, "one.bias_scale"), scale)


def test_signed_grids_are_written_as_signed_codes():
    m = small()
    plan, _ = quantized(m, FEEDS)
    grid = TensorGrid(0.05, -3, 8, True, False, "by hand")
    emitted = emit(m, replace(plan, tensors={**plan.tensors, "x": grid}))
    codes = run(graph.with_outputs(emitted, ["x_q"]), FEEDS)["x_q"]
    np.testing.assert_array_equal(codes, np.clip(np.rint(FEEDS["x"] / np.float32(0.05)) - 3, -128, 127))
    assert codes.dtype == np.int8


def edits(plan):
    """Plans that do not fit, and what is said about them."""
    weight = plan.weights["one"]
    inputs = {name: grid for name, grid in plan.tensors.items() if name != "x"}
    return {
        "the plan names the node 'nowhere'": replace(plan, weights={**plan.weights, "nowhere": weight}),
        "the plan names the node 'gone'": replace(plan, integer=(*plan.integer, "gone")),
        "the plan names the node 'away'": replace(plan, sums=("away",)),
        "the plan names the node 'left'": replace(plan, tables=("left",)),
        "the plan names the tensor 'q'": replace(plan, tensors={**plan.tensors, "q": plan.tensors["x"]}),
        "the plan names the tensor 'k'": replace(plan, constants={"k": plan.tensors["x"]}),
        "but not its input 'x'": replace(plan, tensors=inputs),
        "Relu has no weights": replace(plan, weights={**plan.weights, "Relu_1": weight}),
        "keeps axis 1 with 64 channels": replace(plan, weights={**plan.weights, "one": replace(weight, axis=0)}),
        "gives 'one' 3 weight scales": replace(plan, weights={**plan.weights, "one": WeightGrid((1, 1, 1), 1)}),
        "along axis None": replace(plan, weights={**plan.weights, "one": WeightGrid((1.0, 1.0), None)}),
    }


@pytest.mark.parametrize("index", range(11))
def test_plans_that_do_not_fit_are_refused(index):
    m = small()
    before = graph.to_bytes(m)
    plan, _ = quantized(m, FEEDS)
    text, bad = list(edits(plan).items())[index]
    with pytest.raises(UnsupportedError) as caught:
        emit(m, bad)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert graph.to_bytes(m) == before


def test_a_wrong_axis_is_refused_even_when_the_sizes_agree():
    text = "g (float[2,8] x, float[8,8] w) => (float[2,8] y) { [n] y = Gemm(x, w) }"
    m = model(text, w=weights(8, 8))
    plan, _ = quantized(m, FEEDS)
    bad = replace(plan, weights={"n": replace(plan.weights["n"], axis=0)})
    with pytest.raises(UnsupportedError, match="along axis 0"):
        emit(m, bad)


TABLE = weights(2048, 8) * np.geomspace(0.01, 100, 2048, dtype=np.float32).reshape(-1, 1)
TABLE[7] = 0


@pytest.mark.parametrize("ids", [[3, -1, 7, 0, 2047], [[1, 7], [2, -2048]], 5], ids=["vector", "matrix", "number"])
@pytest.mark.parametrize("behind", ["", "z = Tanh(y)"])
def test_a_table_is_stored_in_integers_with_a_step_per_row(ids, behind):
    ids = np.asarray(ids)
    dims = f"[{','.join(map(str, ids.shape))}]" if ids.ndim else ""
    m = model(f"g (int64{dims} i, float[2048,8] t) => (float y) {{ [g] y = Gather(t, i) {behind} }}", t=TABLE)
    before = graph.to_bytes(m)
    plan, emitted = quantized(m, {"i": ids})
    assert plan.tables == ("g",)
    assert graph.to_bytes(m) == before
    steps = np.maximum(np.abs(TABLE).max(axis=1, keepdims=True), 1e-8) / 127
    codes = stored(emitted, "g.weight_q")
    assert codes.dtype == np.int8
    assert np.abs(codes - TABLE / steps).max() <= 0.5001
    assert np.abs(codes).max() == 127
    for optimize in ("off", "all"):
        found = run(emitted, {"i": ids}, optimize)["y"]
        assert found.shape == (*ids.shape, 8)
        np.testing.assert_allclose(found, TABLE[ids], atol=0.501 * float(steps[ids].max()))
        np.testing.assert_allclose(found, (codes * steps)[ids], rtol=1e-5)
    assert "t" not in emitted.graph.initializers
    assert graph.nbytes(emitted) < 0.4 * TABLE.nbytes


def test_a_table_may_also_be_the_weight_of_a_layer():
    text = """g (int64[2] i, float[2048,8] t, float[8,8] w) => (float[2,2048] y) {
        [g] e = Gather(t, i) [h] h = MatMul(e, w) [out] y = Gemm<transB = 1>(h, t)
    }"""
    m = model(text, t=weights(2048, 8), w=weights(8, 8))
    plan, emitted, ran = assert_good(m, {"i": np.asarray([3, 9])})
    assert plan.tables == ("g",)
    assert "t" not in emitted.graph.initializers
    assert "Gemm" not in ran
