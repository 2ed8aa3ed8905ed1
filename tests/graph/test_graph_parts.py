"""Models whose weights stay apart from their graph."""

import gc
import hashlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import model, proto, run, weights

import onnxq.graph
from onnxq import graph
from onnxq.graph import parts
from onnxq.runtime import Session, SessionConfig, optimized

TEXT = """g (float[n,160] x, float[160,128] w, float[128] b, float[130,128] v, float[130] c) => (float[n,130] y) {
    h = Gemm(x, w, b) r = Relu(h) y = Gemm<transB = 1>(r, v, c)
}"""
X = {"x": weights(3, 160, seed=9)}
ARRAYS = {"w": weights(160, 128), "b": weights(128), "v": weights(130, 128, seed=1), "c": weights(130, seed=2)}


@pytest.fixture
def apart(monkeypatch):
    """Even small models are taken apart."""
    monkeypatch.setattr(onnxq.graph, "WHOLE", 0)
    monkeypatch.setattr("onnxq.graph.files.WHOLE", 0)


def two_layers():
    return model(TEXT, **ARRAYS)


def tensor(m, name):
    return m.graph.initializers[name].const_value


def test_large_weights_are_marks_in_the_message_and_arrays_beside_it():
    m = two_layers()
    before = graph.to_bytes(m)
    data, arrays = graph.to_parts(m)
    assert graph.to_bytes(m) == before
    assert sorted(arrays) == ["v", "w"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    found = {entry.name: entry for entry in onnx.load_from_string(data).graph.initializer}
    assert [name for name, entry in found.items() if entry.external_data] == ["w", "v"]
    assert list(found["v"].dims) == [130, 128]
    assert len(found["b"].raw_data) == 4 * 128
    assert len(data) < 3000


@pytest.mark.parametrize("optimize", ["off", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bfloat16"])
def test_a_session_computes_the_same(dtype, optimize, apart, monkeypatch):
    """Any element type: some as arrays, some inside the message."""
    kind = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    text = f"""g (float[n,160] x, {kind}[160,512] w) => (float[n,512] y) {{ f = Cast<to = 1>(w) y = MatMul(x, f) }}"""
    numpy = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    made = proto(text, w=np.zeros((160, 512), np.uint8))
    array = (20 * weights(160, 512, low=0, high=1)).astype(numpy)
    made.graph.initializer[0].CopyFrom(ir.to_proto(ir.Tensor(array, name="w")))
    m = ir.from_proto(made)
    assert ("w" in graph.to_parts(m)[1]) == (dtype != "bfloat16")
    found = run(m, X, optimize)["y"]
    monkeypatch.undo()
    np.testing.assert_array_equal(found, run(m, X, optimize)["y"])
    assert np.abs(found).max() > 1


def test_arrays_that_begin_anywhere_are_right(tmp_path, apart):
    """External data need not be aligned."""
    made = proto(TEXT, **ARRAYS)
    (tmp_path / "data.bin").write_bytes(b"odd" + ARRAYS["w"].tobytes())
    w = made.graph.initializer[0]
    w.ClearField("raw_data")
    w.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "data.bin"), ("offset", "3"), ("length", str(ARRAYS["w"].nbytes))):
        w.external_data.add(key=key, value=value)
    onnx.save(made, tmp_path / "m.onnx")
    m = ir.load(tmp_path / "m.onnx")
    assert not tensor(m, "w").numpy().flags.aligned
    assert graph.to_parts(m)[1]["w"].flags.aligned
    np.testing.assert_array_equal(run(m, X)["y"], run(two_layers(), X)["y"])


def test_the_graph_that_is_executed_holds_its_weights(apart):
    shown = optimized(two_layers())
    assert any(np.array_equal(value.const_value.numpy(), ARRAYS["w"]) for value in shown.graph.initializers.values())


def test_a_digest_is_over_graph_and_weights():
    m = two_layers()
    whole = ir.to_proto(m)
    del whole.graph.initializer[:]
    state = hashlib.sha256(whole.SerializeToString(deterministic=True))
    for name, value in sorted(m.graph.initializers.items()):
        state.update(f"{name} {value.dtype} {value.shape}".encode() + ARRAYS[name].tobytes())
    assert graph.digest(m) == state.hexdigest()
    graph.set_initializer(m, "v", ARRAYS["v"] + np.float32(1))
    assert graph.digest(m) != state.hexdigest()


def test_a_loaded_weight_is_one_array_and_the_message_is_gone(tmp_path, apart):
    """Reading it from the message would copy it every time."""
    onnx.save(proto(TEXT, **ARRAYS), tmp_path / "m.onnx")
    m = graph.load(tmp_path / "m.onnx")
    assert tensor(m, "w").numpy() is tensor(m, "w").numpy()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensor(m, name).numpy(), array)
    assert graph.to_bytes(m) == graph.to_bytes(two_layers())


def test_weights_become_inputs_and_weights_again():
    m = two_layers()
    before = graph.to_bytes(m)
    out = graph.weights_as_inputs(m, 1000)
    assert [value.name for value in out.graph.inputs] == ["x", "w", "v"]
    assert sorted(out.graph.initializers) == ["b", "c"]
    fed = run(out, X | {name: ARRAYS[name] for name in "wv"})["y"]
    np.testing.assert_allclose(fed, run(m, X)["y"], rtol=1e-4, atol=1e-3)  # packed weights are added in another order
    graph.inputs_as_weights(out, m, 1000)
    assert [value.name for value in out.graph.inputs] == ["x"]
    assert tensor(out, "w") is tensor(m, "w")
    assert graph.to_bytes(m) == before
    np.testing.assert_array_equal(run(out, X)["y"], run(m, X)["y"])


def test_a_weight_that_nothing_reads_any_more_does_not_come_back():
    m = two_layers()
    out = graph.weights_as_inputs(m, 1000)
    last = out.graph[-1]
    last.replace_input_with(1, graph.add_constant(out, "other", ARRAYS["v"]))
    graph.inputs_as_weights(out, m, 1000)
    assert [value.name for value in out.graph.inputs] == ["x"]
    assert sorted(out.graph.initializers) == ["b", "c", "other", "w"]


LINUX = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def growth(call):
    """The peak of resident memory during `call` above what was resident before, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


@LINUX
def test_a_session_of_a_large_model_takes_no_more_than_the_runtime_packs():
    """Once the weights; a message, its bytes and what is parsed of them would be three times as much on top."""
    size, names, sources = 1536, "abcd", ("x", "ha", "hb", "hc")
    takes = ", ".join(f"float[{size},{size}] {name}" for name in names)
    body = " ".join(f"h{name} = MatMul({source}, {name})" for source, name in zip(sources, names, strict=True))
    text = f"g (float[n,{size}] x, {takes}) => (float[n,{size}] hd) {{ {body} }}"
    m = model(text, **{name: np.ones((size, size), np.float32) for name in names})
    assert graph.nbytes(m) >= parts.WHOLE
    feeds = {"x": weights(2, size)}
    found = growth(lambda: Session(m, SessionConfig(threads=1)).run(feeds))
    assert found < 1.6 * graph.nbytes(m)


@LINUX
def test_a_large_model_is_read_in_three_times_its_size_and_kept_in_one(tmp_path):
    size = 3072
    text = f"g (float[n,{size}] x, float[{size},{size}] w, float[5] b) => (float[n,{size}] y, float[5] c) "
    body = "{ y = MatMul(x, w) c = Relu(b) }"
    onnx.save(proto(text + body, w=np.ones((size, size), np.float32), b=weights(5)), tmp_path / "m.onnx")
    found = []
    gc.collect()
    before = _status("VmRSS")
    assert growth(lambda: found.append(graph.load(tmp_path / "m.onnx"))) < 3.3 * 4 * size * size
    gc.collect()
    assert _status("VmRSS") - before < 1.5 * 4 * size * size
    assert growth(lambda: graph.digest(found[0])) < 1.3 * 4 * size * size
