"""What the package must never do: unpickle, evaluate text, or speak to the network."""

import ast
import socket
import tomllib
from pathlib import Path

import numpy as np
import onnx
from helpers import proto, weights

import onnxq
from onnxq.cli.main import _run as run

ROOT = Path(__file__).parent.parent
SOURCES = sorted(Path(onnxq.__file__).parent.rglob("*.py"))
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "socket", "ssl", "urllib", "http", "requests", "ftplib", "smtplib"}


def test_the_oldest_set_is_the_lower_bounds():
    """.ci/oldest installs what pyproject.toml promises to work."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line for line in lines if not line.startswith("#")}
    extra = {word for word in project["optional-dependencies"]["dev"] if word.startswith(("hypothesis", "pytest"))}
    assert pinned == {word.replace(">=", "==") for word in (*project["dependencies"], *extra)}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def called(tree):
    """(name, keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_nothing_is_unpickled_evaluated_or_fetched():
    assert len(SOURCES) > 100
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        sends = path.parent.name == "jobs"  # to a cluster that the user named, whose schedulers pickle everything
        assert not (FORBIDDEN - ({"pickle", "socket"} if sends else set())) & set(imported(tree)), path
        for name, keywords in called(tree):
            assert name not in ("eval", "exec", "torch.load", "joblib.load"), path
            if name in ("np.load", "np.lib.format.read_array"):
                assert keywords.get("allow_pickle") == "False", path
            assert keywords.get("shell", "False") == "False", path


def test_a_run_opens_no_socket(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    made = proto("g (float[n,5] x, float[5,4] w) => (float[n,4] y) { y = MatMul(x, w) }", w=weights(5, 4))
    onnx.save(made, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=weights(10, 5, seed=1))
    given = ["quantize", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data.npz"), "-q", "--no-timing"]
    assert run([*given, "-o", str(tmp_path / "out.onnx")]) == 0
    assert run(["inspect", str(tmp_path / "out.onnx")]) == 0
