import tempfile

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

import onnxq.simplifier
from onnxq import graph
from onnxq.graph import confine, opsets
from onnxq.simplifier import simplify


def shapes():
    """A constant shape computation, as exporters write it: the batch is dynamic, everything else is known."""
    m = model(
        """g (float[N,3,4] x, float[12,5] w, float[5] b) => (float[N,5] y, float[N,3,4] z) {
            zero = Constant<value = int64[1] {0}>()
            k = Constant<value = int64[1] {12}>()
            s = Shape(x)
            n = Gather(s, zero)
            c = Concat<axis = 0>(n, k)
            f = Reshape(x, c)
            m = MatMul(f, w)
            y = Add(m, b)
            i = Identity(x)
            z = Relu(i)
        }""",
        w=weights(12, 5),
        b=weights(5),
    )
    m.metadata_props["owner"] = "someone"
    return m


X = {"x": weights(2, 3, 4, seed=3)}


def test_folds_a_shape_computation_and_keeps_the_interface():
    m = shapes()
    before, text = ops(m), graph.to_bytes(m)
    simple, reason = simplify(m)
    assert reason is None
    assert simple is not m
    assert sorted(ops(simple)) == ["Add", "MatMul", "Relu", "Reshape"]
    assert (ops(m), graph.to_bytes(m)) == (before, text)
    for side in ("inputs", "outputs"):
        assert [(v.name, str(v.shape), v.dtype) for v in getattr(simple.graph, side)] == [
            (v.name, str(v.shape), v.dtype) for v in getattr(m.graph, side)
        ]
    assert graph.opset(simple) == graph.opset(m)
    assert simple.ir_version == m.ir_version
    assert dict(simple.metadata_props) == {"owner": "someone"}
    assert len(graph.node_names(simple)) == len(simple.graph)
    for rows in (1, 2, 5):
        feeds = {"x": weights(rows, 3, 4, seed=rows)}
        assert_same_outputs(run(m, feeds), run(simple, feeds))


def test_two_runs_give_equal_bytes():
    assert graph.to_bytes(simplify(shapes())[0]) == graph.to_bytes(simplify(shapes())[0])


def test_keeps_linear_layers_of_any_rank_as_matmul_and_add():
    m = model(
        """g (float[N,7,4] x, float[4,5] w, float[5] b) => (float[N,7,5] y) {
            i = Identity(x) m = MatMul(i, w) y = Add(m, b)
        }""",
        w=weights(4, 5),
        b=weights(5),
    )
    assert ops(simplify(m)[0]) == ["MatMul", "Add"]


def test_leaves_batch_normalization_to_its_pass():
    m = model(
        """g (float[N,2,4,4] x, float[2,2,1,1] w, float[2] s, float[2] v) => (float[N,2,4,4] y) {
            i = Identity(x) c = Conv(i, w) y = BatchNormalization(c, s, s, s, v)
        }""",
        w=weights(2, 2, 1, 1),
        s=weights(2),
        v=weights(2, low=1, high=2),
    )
    assert ops(simplify(m)[0]) == ["Conv", "BatchNormalization"]


def test_makes_no_huge_constants():
    m = model(
        """g (float[N,16384] x) => (float[a,b] y) {
            s = Constant<value = int64[2] {16384, 16384}>() z = ConstantOfShape(s) y = Add(x, z)
        }"""
    )
    simple, reason = simplify(m)
    assert reason is None
    assert graph.nbytes(simple) < 1000


def test_an_output_without_a_shape_is_no_obstacle():
    m = shapes()
    m.graph.outputs[0].shape = None
    simple, reason = simplify(m)
    assert reason is None
    assert sorted(ops(simple)) == ["Add", "MatMul", "Relu", "Reshape"]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts another program in the place of the child's."""

    def replace(program):
        (tmp_path / "child.py").write_text(program)
        monkeypatch.setattr(onnxq.simplifier, "CHILD", tmp_path / "child.py")

    return replace


def test_weights_too_large_for_one_file_travel_beside_it(monkeypatch, child, scratch):
    m = shapes()
    program = onnxq.simplifier.CHILD.read_text()
    assert "LIMIT = 1_900_000_000" in program
    child(program.replace("LIMIT = 1_900_000_000", "LIMIT = 100"))
    monkeypatch.setattr(graph.files, "SINGLE_FILE_LIMIT", 100)
    simple, reason = simplify(m)
    monkeypatch.undo()
    assert reason is None
    assert sorted(ops(simple)) == ["Add", "MatMul", "Relu", "Reshape"]
    assert not list(scratch.iterdir())
    np.testing.assert_array_equal(graph.constant(simple.graph.initializers["b"]), weights(5))
    assert_same_outputs(run(m, X), run(simple, X))


@pytest.mark.parametrize("failing", [False, True])
def test_large_weights_stay_here(failing, monkeypatch, child):
    """Of a large model; the child sees them as inputs."""
    m = shapes()
    before, whole = graph.to_bytes(m), simplify(m)[0]
    monkeypatch.setattr(onnxq.simplifier, "APART", 200)
    monkeypatch.setattr(onnxq.simplifier, "LARGEST_ALONG", 100)
    monkeypatch.setattr("onnxq.graph.parts.LEAST", 10**9)
    check = "import sys, onnx; m = onnx.load(sys.argv[1]); sizes = {len(t.raw_data) for t in m.graph.initializer};"
    guard = f"{check} assert max(sizes) < 100 and [v.name for v in m.graph.input] == ['x', 'w']\n"
    child(
        guard + ("raise RuntimeError('no')" if failing else onnxq.simplifier.CHILD.read_text().split("annotations")[1])
    )
    simple, reason = simplify(m)
    assert graph.to_bytes(m) == before
    if failing:
        assert simple is m
        assert reason == "simplification failed (RuntimeError: no); continuing without it"
        return
    assert reason is None
    assert simple.graph.initializers["w"].const_value is m.graph.initializers["w"].const_value
    assert ops(simple) == ops(whole)
    assert [value.name for value in simple.graph.inputs] == ["x"]
    assert_same_outputs(run(m, X), run(simple, X))


def test_a_simplifier_that_needs_rich_gets_it(tmp_path, monkeypatch):
    """onnxsim before 0.5 does, later ones start faster without."""
    package = tmp_path / "onnxsim"
    package.mkdir()
    (package / "__init__.py").write_text("from onnxsim.core import simplify")
    (package / "core.py").write_text("""
import onnx
from rich.text import Text
try:
    import torch
except ImportError:
    def simplify(path, **options):
        return onnx.load(path), bool(Text("yes"))
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    m = shapes()
    simple, reason = simplify(m)
    assert reason is None
    assert ops(simple) == ops(m)


EDIT = """
import sys, onnx
m = onnx.load(sys.argv[1])
{}
onnx.save(m, sys.argv[2])
"""
RENAME = """
m.graph.input[0].name = "v"
for node in m.graph.node:
    node.input[:] = ["v" if name == "x" else name for name in node.input]
"""
FAILURES = {
    "crashed (SIGSEGV)": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "crashed (SIGFPE)": "import os, signal; os.kill(os.getpid(), signal.SIGFPE)",
    "failed (RuntimeError: of the child)": "raise RuntimeError('of  the child.')",
    "failed (no message)": "raise SystemExit(3)",
    "wrote no model": "pass",
    "took longer than 1 s": "import time; time.sleep(60)",
    "ran out of memory (limit 1.0 GiB)": "raise MemoryError('std::bad_alloc')",
    "is not an ONNX file": "import sys; open(sys.argv[2], 'wb').write(b'no model')",
    "changed the model's inputs": EDIT.format(RENAME),
    "changed the model's outputs": EDIT.format("m.graph.output.append(m.graph.output[0]); del m.graph.output[0]"),
    "changed the model's operator set": EDIT.format("m.opset_import[0].version = 18"),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_goes_on_without_it(reason, child, scratch):
    m = shapes()
    before = ops(m)
    child(FAILURES[reason])
    result, said = simplify(m, timeout_s=1 if "longer" in reason else 60, memory_bytes=1 << 30)
    assert result is m
    assert ops(m) == before
    assert said.startswith("simplification ")
    assert said.endswith("; continuing without it")
    assert reason in said
    assert "\n" not in said
    assert not list(scratch.iterdir())


def test_a_memory_limit_holds(child):
    program = onnxq.simplifier.CHILD.read_text()
    child(program.replace("    simplified, _ =", "    bytearray(1 << 33)\n    simplified, _ ="))
    m = shapes()
    assert simplify(m, memory_bytes=1 << 32) == (
        m,
        "simplification ran out of memory (limit 4.0 GiB); continuing without it",
    )


def test_a_real_crash_is_survived():
    zero = model(
        "g (float[1,2,4,4] x, float[2,2,1,1] w) => (float[a,b,c,d] y) { y = Conv<strides = [1,1]>(x, w) }",
        w=weights(2, 2, 1, 1),
    )
    graph.set_attribute(next(graph.nodes(zero, "Conv")), "strides", [0, 0])
    result, said = simplify(zero)
    assert result is zero
    assert said == "simplification crashed (SIGFPE); continuing without it"


def test_a_full_disk_is_survived(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    m = shapes()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert simplify(m) == (m, "simplification failed (No space left on device); continuing without it")


def test_the_child_imports_nothing_of_onnxq():
    for path in (onnxq.simplifier.CHILD, confine.LAUNCHER, opsets.CONVERTER):
        source = path.read_text()
        assert "from onnxq" not in source
        assert "import onnxq\n" not in source
