import numpy as np
import onnx
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.errors import EnvironmentFault

TEXT = "g (float[2,8] x, float[8,16] w, float[16] b) => (float[2,16] y) { h = MatMul(x, w) y = Add(h, b) }"


def small():
    return model(TEXT, w=weights(8, 16), b=weights(16))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("external", [None, False, True])
def test_what_is_saved_loads_again(tmp_path, external):
    m = small()
    before = graph.to_bytes(m)
    graph.save(m, tmp_path / "m.onnx", external=external)
    assert files(tmp_path) == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])
    assert graph.to_bytes(m) == before
    x = weights(2, 8, seed=1)
    loaded = graph.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(loaded, {"x": x})["y"], run(m, {"x": x})["y"])
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


def test_external_weights_may_be_moved_together(tmp_path):
    graph.save(small(), tmp_path / "m.onnx", external=True)
    (tmp_path / "other").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).rename(tmp_path / "other" / name)
    loaded = graph.load(tmp_path / "other" / "m.onnx")
    np.testing.assert_array_equal(graph.constant(graph.value_map(loaded)["w"]), weights(8, 16))


def test_a_model_with_external_weights_can_replace_itself(tmp_path):
    path = tmp_path / "m.onnx"
    graph.save(small(), path, external=True)
    loaded = graph.load(path)
    matmul = next(graph.nodes(loaded, "MatMul"))
    graph.replace_constant(loaded, matmul, 1, 2 * weights(8, 16))
    graph.save(loaded, path, external=True)
    assert files(tmp_path) == ["m.onnx", "m.onnx.1.data"]
    again = graph.load(path)
    np.testing.assert_array_equal(graph.constant(graph.value_map(again)["w"]), 2 * weights(8, 16))


def test_external_weights_become_internal_ones(tmp_path):
    graph.save(small(), tmp_path / "m.onnx", external=True)
    loaded = graph.load(tmp_path / "m.onnx")
    graph.save(loaded, tmp_path / "whole.onnx")
    (tmp_path / "m.onnx.data").unlink()
    np.testing.assert_array_equal(
        graph.constant(graph.value_map(graph.load(tmp_path / "whole.onnx"))["w"]), weights(8, 16)
    )


@pytest.mark.parametrize("external", [False, True])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, external):
    path = tmp_path / "m.onnx"
    graph.save(small(), path, external=external)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    other = model(TEXT, w=weights(8, 16, seed=5), b=weights(16))

    synced = []

    def full(*_):
        synced.append(1)
        if len(synced) == (2 if external else 1):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentFault, match=r"m\.onnx cannot be written: No space left on device\.$"):
        graph.save(other, path, external=external)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("external", [False, True])
def test_an_interruption_leaves_no_file(tmp_path, monkeypatch, external):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graph.save(small(), tmp_path / "m.onnx", external=external)
    assert files(tmp_path) == []


@pytest.mark.parametrize("external", [False, True])
def test_a_folder_that_is_not_there_is_named(tmp_path, external):
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        graph.save(small(), tmp_path / "nowhere" / "m.onnx", external=external)


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    graph.save(small(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_equal_models_give_equal_bytes(tmp_path):
    first, second = small(), small()
    assert graph.to_bytes(first) == graph.to_bytes(second)
    assert graph.to_bytes(first) == graph.to_bytes(first.clone())
    for name in ("a.onnx", "b.onnx"):
        graph.save(first, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_digest_tells_models_apart():
    plain = graph.digest(small())
    assert plain == graph.digest(small())
    assert plain != graph.digest(model(TEXT, w=weights(8, 16, seed=1), b=weights(16)))
    assert plain != graph.digest(model(TEXT.replace("y = Add", "y = Sub"), w=weights(8, 16), b=weights(16)))
    # the same numbers in another shape
    text = "g (float[1,N,M] x, float[2,3] w) => (float[1,N,K] y) { y = MatMul(x, w) }"
    wide = model(text, w=weights(6).reshape(2, 3))
    tall = model(text.replace("[2,3]", "[3,2]"), w=weights(6).reshape(3, 2))
    assert graph.digest(wide) != graph.digest(tall)


def test_bytes_of_weights():
    assert graph.nbytes(small()) == 4 * (8 * 16 + 16)


def test_models_that_are_too_large_for_one_message_go_into_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxq.graph.files.SINGLE_FILE_LIMIT", 100)
    with pytest.raises(ValueError, match="too large"):
        graph.to_bytes(small())
    graph.save(small(), tmp_path / "m.onnx")
    assert files(tmp_path) == ["m.onnx", "m.onnx.data"]
