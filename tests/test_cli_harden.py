"""`onnxq harden` as users call it."""

import json
import sys

import numpy as np
import onnx
import pytest
from helpers import model, weights

from onnxq import graph
from onnxq.cli.main import _run as run

MLP = """
g (float[n,12] x, float[12,24] a, float[24] ab, float[24,24] b, float[24] bb, float[24,6] c, float[6] cb)
=> (float[n,6] y) { p = Gemm(x, a, ab)  q = Relu(p)  r = Gemm(q, b, bb)  s = Relu(r)  y = Gemm(s, c, cb) }
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of three layers and a file with rows for it."""
    folder = tmp_path_factory.mktemp("harden")
    biases = {name: weights(size) for name, size in (("ab", 24), ("bb", 24), ("cb", 6))}
    made = model(MLP, a=weights(12, 24), b=weights(24, 24), c=weights(24, 6), **biases)
    graph.save(made, folder / "mlp.onnx")
    np.savez(folder / "rows.npz", x=weights(64, 12, seed=3))
    return folder / "mlp.onnx", folder / "rows.npz"


def arguments(files, output, *more):
    return ["harden", str(files[0]), "--data", str(files[1]), "-o", str(output), "--iterations", "20", *more]


def test_one_document_says_what_was_done(files, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "hard.onnx"
    more = ["--kind", "linf", "--strength", "0.5", "--per-tensor", "--batch", "8", "--seed", "3", "--device", "cpu"]
    assert run(arguments(files, out, *more, "--rate", "0.01", "--json")) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["kind"] == "harden"
    assert document["output"] == str(out)
    assert document["rows"] == 56
    assert document["fidelity"]["rows"] == 8
    assert document["fidelity"]["agreement"]["value"] > 0.5
    settings = document["settings"]
    assert (settings["kind"], settings["strength"], settings["per_channel"]) == ("linf", 0.5, False)
    assert (settings["iterations"], settings["rate"], settings["batch"], settings["seed"]) == (20, 0.01, 8, 3)
    assert [layer["per_tensor"][1] < layer["per_tensor"][0] for layer in document["layers"]] == [True] * 3
    assert len(document["low_bits"]) == 6
    onnx.checker.check_model(str(out), full_check=True)


def test_the_terminal_shows_ranges_and_errors(files, tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "hard.onnx"
    assert run(arguments(files, out)) == 0
    captured = capsys.readouterr()
    for text in ("held-out rows", "W4 per channel", "W2 per tensor", "max|W|/std", "kept", f"wrote {out}"):
        assert text in captured.out
    assert "Training" in captured.err
    assert "20 iterations" in captured.err


def test_contradictions_and_gaps_are_one_line(files, tmp_path, capsys):
    out = tmp_path / "hard.onnx"
    assert run(arguments(files, out, "--epochs", "3")) == 2
    assert run(arguments(files, out, "--kind", "l2")) == 2
    assert run(arguments(files, files[0])) == 2
    assert run(["harden", str(tmp_path / "none.onnx"), "--data", "x", "-o", str(out)]) == 3
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 4
    assert "--epochs or --iterations" in said[0]
    assert not list(tmp_path.iterdir())


def test_operators_that_torch_lacks_are_declined(tmp_path, files, capsys):
    pytest.importorskip("torch")
    text = "g (float[n,12] x, float[12,4] w) => (float[n,4] y, float[k] u) { y = MatMul(x, w)  u = Unique(y) }"
    path = tmp_path / "odd.onnx"
    graph.save(model(text, w=weights(12, 4)), path)
    assert run(arguments((path, files[1]), tmp_path / "out.onnx", "-q")) == 4
    assert "Unique" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_without_torch_the_environment_is_at_fault(files, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("onnxq.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(arguments(files, tmp_path / "hard.onnx", "-q")) == 6
    said = capsys.readouterr().err
    assert "PyTorch" in said
    assert "pip install 'onnxq[learn]'" in said
    assert not list(tmp_path.iterdir())


def test_the_kinds_are_those_of_the_loss():
    pytest.importorskip("torch")
    from onnxq.cli.harden import KINDS
    from onnxq.train import KINDS as KNOWN

    assert KINDS == KNOWN
