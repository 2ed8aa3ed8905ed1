import runpy
import sys

import numpy as np
import onnx
import pytest
from helpers import assert_same_outputs, proto, run, weights

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import opsets
from onnxq.runtime import Session, SessionConfig

X = weights(2, 3, 4, 4)
SPACE = "float[2,3,4,4] x"
# Operators whose meaning or form changed between opset 9 and 13.
CHANGED = {
    "softmax over the rest": (f"g ({SPACE}) => (float[2,3,4,4] y) {{ y = Softmax<axis = 1>(x) }}", 9, 12),
    "softmax": (f"g ({SPACE}) => (float[2,3,4,4] y) {{ y = LogSoftmax<axis = -1>(x) }}", 11, 12),
    "squeeze": (
        f"g ({SPACE}, int64[1] a, int64[1] b, int64[1] c) => (float[3,4,4] y) "
        "{ s = Slice(x, a, b, c) y = Squeeze<axes = [0]>(s) }",
        10,
        12,
    ),
    "unsqueeze": (f"g ({SPACE}) => (float[1,2,3,4,4] y) {{ y = Unsqueeze<axes = [0]>(x) }}", 9, 12),
    "sum": (f"g ({SPACE}) => (float[2,3,1,1] y) {{ y = ReduceSum<axes = [2, 3], keepdims = 1>(x) }}", 9, 12),
    "clip": (f"g ({SPACE}) => (float[2,3,4,4] y) {{ y = Clip<min = -0.5, max = 0.25>(x) }}", 9, 10),
    "pad": (f"g ({SPACE}) => (float[2,3,6,6] y) {{ y = Pad<pads = [0,0,1,1,0,0,1,1], value = 2.0>(x) }}", 9, 10),
    "slice": (
        f"g ({SPACE}) => (float[1,3,4,2] y) {{ y = Slice<axes = [0,3], starts = [1,1], ends = [2,3]>(x) }}",
        9,
        9,
    ),
    "split": (
        f"g ({SPACE}) => (float[2,1,4,4] y, float[2,2,4,4] z) {{ y, z = Split<axis = 1, split = [1, 2]>(x) }}",
        9,
        12,
    ),
    "dropout": (f"g ({SPACE}) => (float[2,3,4,4] y) {{ y = Dropout<ratio = 0.3>(x) }}", 10, 11),
    "norm": (
        f"g ({SPACE}, float[3] a, float[3] b, float[3] m, float[3] v) => (float[2,3,4,4] y) "
        "{ y = BatchNormalization<epsilon = 0.1>(x, a, b, m, v) }",
        9,
        12,
    ),
    "upsample": (f'g ({SPACE}, float[4] s) => (float[2,3,8,8] y) {{ y = Upsample<mode = "nearest">(x, s) }}', 9, 9),
    "resize": (f'g ({SPACE}, float[4] s) => (float[2,3,8,8] y) {{ y = Resize<mode = "nearest">(x, s) }}', 10, 10),
}
CONSTANTS = {
    "squeeze": {"a": np.asarray([1]), "b": np.asarray([2]), "c": np.asarray([0])},
    "norm": {name: weights(3, seed=n, low=0.5, high=2.0) for n, name in enumerate("abmv")},
    "upsample": {"s": np.asarray([1, 1, 2, 2], np.float32)},
    "resize": {"s": np.asarray([1, 1, 2, 2], np.float32)},
}


@pytest.fixture
def inline(monkeypatch):
    """The converter in this process: a child per model is slow."""

    def run_program(program, source, destination, **_):
        monkeypatch.setattr(sys, "argv", [str(program), str(source), str(destination)])
        runpy.run_path(str(program), run_name="__main__")

    monkeypatch.setattr(opsets, "run_confined", run_program)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    ("name", "text", "opset"),
    [
        pytest.param(name, text, opset, id=f"{name}-{opset}")
        for name, (text, oldest, newest) in CHANGED.items()
        for opset in range(oldest, newest + 1)
    ],
)
def test_an_old_operator_keeps_its_meaning(tmp_path, name, text, opset):
    made = proto(text, opset, **CONSTANTS.get(name, {}))
    onnx.save(made, tmp_path / "m.onnx")
    loaded = graph.load(tmp_path / "m.onnx")
    assert graph.opset(loaded) == 13
    before = Session(made.SerializeToString(), SessionConfig(threads=1, optimize="off")).run({"x": X})
    assert_same_outputs(before, run(loaded, {"x": X}))


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("ir_version", [3, 4, 6])
def test_an_old_file_format_runs(tmp_path, ir_version):
    """Up to version 3 every initializer had to be an input, too."""
    text = f'<ir_version: {ir_version}, opset_import: ["" : 9]>'
    made = onnx.parser.parse_model(
        f"{text} g (float[2,3,4,4] x, float[5,3,1,1] w) => (float[2,5,4,4] y) {{ y = Conv(x, w) }}"
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(weights(5, 3, 1, 1), "w"))
    onnx.save(made, tmp_path / "m.onnx")
    loaded = graph.load(tmp_path / "m.onnx")
    assert [value.name for value in loaded.graph.inputs] == ["x"]
    expected = np.einsum("nchw,oc->nohw", X, weights(5, 3, 1, 1)[:, :, 0, 0])
    np.testing.assert_allclose(run(loaded, {"x": X})["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_newer_opsets_are_left_alone(tmp_path, opset):
    onnx.save(proto("g (float[4] x) => (float[4] y) { y = Relu(x) }", opset), tmp_path / "m.onnx")
    assert graph.opset(graph.load(tmp_path / "m.onnx")) == opset


def test_opsets_that_are_too_old_are_refused(tmp_path):
    onnx.save(proto("g (float[4] x) => (float[4] y) { y = Relu(x) }", 6), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"uses opset 6.*newer exporter"):
        graph.load(tmp_path / "m.onnx")


def test_old_models_with_external_weights_are_converted(tmp_path):
    made = proto(
        "g (float[2,3,4,4] x, float[5,3,1,1] w) => (float[2,5,4,4] y) { y = Conv(x, w) }", 11, w=weights(5, 3, 1, 1)
    )
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = graph.load(tmp_path / "m.onnx")
    assert graph.opset(loaded) == 13
    np.testing.assert_array_equal(graph.constant(graph.value_map(loaded)["w"]), weights(5, 3, 1, 1))


@pytest.mark.parametrize(("opset", "expected"), [(13, 7), (15, 8), (19, 9), (21, 10), (25, 13)])
def test_the_lowest_file_format_of_an_opset(tmp_path, opset, expected):
    onnx.save(proto("g (float[4] x) => (float[4] y) { y = Relu(x) }", opset), tmp_path / "m.onnx")
    assert graph.lowest_ir_version(graph.load(tmp_path / "m.onnx")) == expected


MLP = "g (float[n,4] x, float[4,5] w, float[5] b) => (float[n,5] y) { m = Gemm(x, w, b) y = Relu(m) }"
PROGRAMS = {
    "crashed (SIGSEGV)": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "took longer than 1 s": "import time; time.sleep(60)",
    "ran out of memory (limit 1.5 GiB)": "bytearray(1 << 31)",
    "failed (RuntimeError: of the converter)": "raise RuntimeError('of the  converter.')",
    "wrote no model": "pass",
}


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Puts another program in the place of the converter, with tight limits."""

    def replace(program):
        (tmp_path / "converter.py").write_text(program)
        monkeypatch.setattr(opsets, "CONVERTER", tmp_path / "converter.py")
        monkeypatch.setattr(opsets, "CONVERT_BYTES", 3 << 29)
        monkeypatch.setattr(opsets, "CONVERT_SECONDS", 1 if "sleep" in program else 60)

    return replace


@pytest.mark.parametrize("reason", PROGRAMS)
def test_operators_that_stay_the_same_do_without_a_converter_that_fails(reason, tmp_path, converter):
    made = proto(MLP, 11, w=weights(4, 5), b=weights(5))
    onnx.save(made, tmp_path / "m.onnx")
    converter(PROGRAMS[reason])
    loaded = graph.load(tmp_path / "m.onnx")
    assert graph.opset(loaded) == 13
    said = "; continuing without it: its operators mean the same there"
    assert graph.note(loaded) == f"conversion from opset 11 to 13 {reason}{said}"
    feeds = {"x": weights(3, 4, seed=2)}
    before = Session(made.SerializeToString(), SessionConfig(threads=1)).run(feeds)
    assert_same_outputs(before, run(loaded, feeds))


@pytest.mark.parametrize("inside", [False, True])
def test_operators_that_change_need_the_converter(inside, tmp_path, converter):
    text = "y = Softmax(x)"
    if inside:
        body = "{ y = Softmax(x) }"
        text = f"y = If(c) <then_branch = t () => (float[n,4] y) {body}, else_branch = e () => (float[n,4] y) {body}>"
    onnx.save(proto(f"g (float[n,4] x, bool c) => (float[n,4] y) {{ {text} }}", 11), tmp_path / "m.onnx")
    assert graph.note(graph.load(tmp_path / "m.onnx")) == ""
    converter("pass")
    with pytest.raises(UnsupportedError, match=r"conversion from opset 11 to 13 wrote no model, and Softmax means"):
        graph.load(tmp_path / "m.onnx")


ALIKE_SINCE = {
    **dict.fromkeys(("Add", "Conv", "MatMul", "Relu", "Reshape", "Concat", "Sigmoid", "ReduceMean", "If", "Loop"), 9),
    "Slice": 10,
    "Pad": 11,
    "Clip": 11,
    "TopK": 11,
    "Dropout": 12,
    "MaxPool": 10,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "Squeeze", "Unsqueeze", "Split", "ReduceSum", "Resize"), 13),
    **dict.fromkeys(("Upsample", "Scatter", "Unknown"), 99),
}


@pytest.mark.parametrize("name", ALIKE_SINCE)
def test_an_operator_is_declared_only_from_where_it_means_the_same(name):
    node = onnx.helper.make_node(name, [], [])
    alike = [old for old in (9, 10, 11, 12) if opsets._same_form(node, old, 13)]
    assert alike == [old for old in (9, 10, 11, 12) if old >= ALIKE_SINCE[name]]
