import os

import numpy as np
import onnx
import pytest
from helpers import model, ops, proto, run, weights

from onnxq import graph
from onnxq.errors import EnvironmentFault, ModelError, UnsupportedError

CONV = "g (float[2,3,6,6] x, float[4,3,3,3] w) => (float[2,4,4,4] y) { y = Conv(x, w) }"
W = weights(4, 3, 3, 3)


def external(folder, length=True):
    """Writes m.onnx with its weight in w.bin; without `length` the file's end is the weight's."""
    path = folder / "m.onnx"
    onnx.save(proto(CONV, w=W), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    if not length:
        made = onnx.load(path, load_external_data=False)
        entries = made.graph.initializer[0].external_data
        for entry in [entry for entry in entries if entry.key != "location"]:
            entries.remove(entry)
        onnx.save(made, path)
    return path


def refusal(path, kind=ModelError):
    """The message with which `path` is refused; always one line."""
    with pytest.raises(kind) as caught:
        graph.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_a_missing_file_is_refused_and_a_near_name_suggested(tmp_path):
    onnx.save(proto(CONV, w=W), tmp_path / "resnet50.onnx")
    assert f"Did you mean {tmp_path / 'resnet50.onnx'}?" in refusal(tmp_path / "resnet5O.onnx")
    assert "Did you mean" not in refusal(tmp_path / "entirely_different_thing.onnx")
    assert "does not exist" in refusal(tmp_path / "no" / "such" / "folder.onnx")


def test_a_folder_is_refused(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be read" in refusal(tmp_path / "file" / "m.onnx")


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refusal(tmp_path / "pipe.onnx")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").touch()
    assert "is empty" in refusal(tmp_path / "m.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(proto(CONV, w=W), path)
    path.chmod(0)
    assert "permission" in refusal(path, EnvironmentFault)


@pytest.mark.parametrize("name", ["m.onnx", "m.json", "m.onnxtxt", "m.textproto", "m"])
@pytest.mark.parametrize("content", [b"garbage", b'{"x": ', b"\x00\x01\x02", "gärbage".encode("latin-1"), b"\n\n\n"])
def test_garbage_is_refused_whatever_it_is_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refusal(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    whole = proto(CONV, w=W).SerializeToString()
    for length in (1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        refusal(tmp_path / "m.onnx")


def test_a_model_without_outputs_is_refused(tmp_path):
    made = proto(CONV, w=W)
    del made.graph.output[:]
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert "has no outputs" in refusal(tmp_path / "m.onnx")


def test_a_model_without_a_graph_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx.ModelProto(ir_version=8, producer_name="x").SerializeToString())
    assert "holds no graph" in refusal(tmp_path / "m.onnx")


def test_an_invalid_graph_is_refused(tmp_path):
    made = proto(CONV, w=W)
    made.graph.node[0].input[0] = "nowhere"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert "is not a valid ONNX model" in refusal(tmp_path / "m.onnx")


def test_an_unknown_operator_is_refused(tmp_path):
    made = proto(CONV, w=W)
    made.graph.node[0].op_type = "Convolve"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    assert "Convolve" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize("length", [True, False])
def test_external_weights_are_read(tmp_path, length):
    loaded = graph.load(external(tmp_path, length))
    np.testing.assert_array_equal(graph.constant(graph.value_map(loaded)["w"]), W)


def test_missing_external_weights_are_refused(tmp_path):
    path = external(tmp_path)
    (tmp_path / "w.bin").unlink()
    text = refusal(path)
    assert "'w.bin'" in text
    assert "not beside the model" in text


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("missing", [1, 100, W.nbytes])
def test_external_weights_that_are_cut_off_are_refused(tmp_path, missing, length):
    path = external(tmp_path, length)
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(whole[: len(whole) - missing])
    assert "w.bin is too short for the weights of 'w'" in refusal(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "x"), ("length", "many"), ("offset", "-4"), ("length", "-1")])
def test_malformed_external_entries_are_refused(tmp_path, key, value):
    path = external(tmp_path)
    made = onnx.load(path, load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    onnx.save(made, path)
    refusal(path)


def test_external_weights_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    path = external(tmp_path / "inner")
    (tmp_path / "inner" / "w.bin").rename(tmp_path / "w.bin")
    made = onnx.load(path, load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../w.bin"
    onnx.save(made, path)
    refusal(path)


def test_initializers_are_dropped_from_the_inputs(tmp_path):
    made = proto("g (float[2,4] x, float[4,3] w) => (float[2,3] y) { y = MatMul(x, w) }")
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights(4, 3), "w"))
    onnx.save(made, tmp_path / "m.onnx")
    loaded = graph.load(tmp_path / "m.onnx")
    assert [spec[0] for spec in graph.input_specs(loaded)] == ["x"]
    assert [value.name for value in loaded.graph.inputs] == ["x"]
    assert graph.constant(graph.value_map(loaded)["w"]) is not None
    x = weights(2, 4, seed=1)
    np.testing.assert_allclose(run(loaded, {"x": x})["y"], x @ weights(4, 3), rtol=1e-5)


def test_functions_are_inlined(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2,4] x) => (float[2,4] y) { h = local.twice(x) y = local.twice(h) }
    <domain: "local", opset_import: ["" : 17]> twice (a) => (b) { c = Relu(a) b = Add(c, c) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    loaded = graph.load(tmp_path / "m.onnx")
    assert ops(loaded) == ["Relu", "Add", "Relu", "Add"]
    x = weights(2, 4)
    np.testing.assert_array_equal(run(loaded, {"x": x})["y"], 4 * np.maximum(x, 0))


def test_every_node_gets_a_unique_name():
    loaded = model(
        """g (float[4] x) => (float[4] y) {
            [same] a = Relu(x)
            [same] b = Neg(a)
            [d] c = Neg(b)
            d = Neg(c)
            [y] y = Neg(d)
        }"""
    )
    names = [node.name for node in loaded.graph]
    assert names[0] == "same"
    assert names[3].startswith("Neg")
    assert len(set(names)) == 5
    assert list(graph.node_names(loaded)) == names


def test_loading_twice_gives_the_same_names_and_bytes(tmp_path):
    onnx.save(proto(CONV, w=W), tmp_path / "m.onnx")
    first, second = graph.load(tmp_path / "m.onnx"), graph.load(tmp_path / "m.onnx")
    assert graph.to_bytes(first) == graph.to_bytes(second)
    assert graph.digest(first) == graph.digest(second)


@pytest.mark.parametrize(("opset", "read"), [(6, False), (7, True), (8, True)])
def test_the_oldest_opset_is_the_one_that_the_refusal_names(tmp_path, opset, read):
    made = proto(
        "g (float[2,4] x, float[4,3] w) => (float[2,3] y) { c = MatMul(x, w) y = Relu(c) }", opset, w=weights(4, 3)
    )
    made.ir_version = 3
    made.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3]))
    path = tmp_path / "old.onnx"
    onnx.save(made, path)
    if read:
        assert graph.opset(graph.load(path)) == 13
    else:
        assert "onnxq reads opset 7 and newer" in refusal(path, UnsupportedError)
