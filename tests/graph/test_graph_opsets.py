import numpy as np
import onnx
import pytest
from helpers import assert_same_outputs, proto, run, weights

from onnxq import graph
from onnxq.errors import UnsupportedError
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
