"""The operator cases that ONNX itself publishes, each through a slice."""

import warnings

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from onnxq import graph
from onnxq.errors import OnnxqError, UnsupportedError
from onnxq.runtime import Session, SessionConfig
from onnxq.torch_exec import extract, supported_ops
from onnxq.torch_exec.tensors import DTYPES, from_numpy, to_numpy

REFUSED = {
    "test_batchnorm_epsilon_training_mode": "statistics of the batch",
    "test_batchnorm_example_training_mode": "statistics of the batch",
    "test_training_dropout": "random",
    "test_training_dropout_default": "random",
    "test_training_dropout_default_mask": "random",
    "test_training_dropout_mask": "random",
    "test_training_dropout_zero_ratio": "random",
    "test_training_dropout_zero_ratio_mask": "random",
    "test_not_2d": "operator set 1",
    "test_not_3d": "operator set 1",
    "test_not_4d": "operator set 1",
}
"""Refused for another reason than an element type. Everything refused is an UnsupportedError when the slice is made
or, where an input of the case decides, when it runs."""

LIKE_ONNXRUNTIME = {
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
}
"""The cases divide by the size before rounding, onnxruntime by the size itself, which is what models are run with."""

NO_CASES = {"GlobalLpPool"}
ROUNDING = {"float16": 2**-9, "bfloat16": 2**-6}
"""Twice the relative distance of neighbouring numbers."""


def array_of(value):
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def outside_torch(model):
    """Whether an input or output has an element type that is refused."""
    types = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    return any(onnx.helper.tensor_dtype_to_np_dtype(kind).name not in DTYPES for kind in types - {0})


def run_case(case, folder):
    path = folder / "case.onnx"
    path.write_bytes(case.model.SerializeToString())
    made = extract(
        graph.load(path),
        [value.name for value in case.model.graph.input if value.name],
        [value.name for value in case.model.graph.output if value.name],
    )
    names = [value.name for value in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        feeds = {name: from_numpy(array_of(value)) for name, value in zip(names, inputs, strict=True) if name}
        for (name, value), expected in zip(made(feeds).items(), map(array_of, outputs), strict=True):
            assert str(value.dtype) == f"torch.{expected.dtype.name}", name
            found = to_numpy(value)
            assert found.shape == expected.shape, name
            rtol = max(case.rtol, ROUNDING.get(expected.dtype.name, 0))
            np.testing.assert_allclose(found, expected.astype(found.dtype), rtol=rtol, atol=case.atol, err_msg=name)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(operators, None or what went wrong) of each case all of whose operators are supported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    folder = tmp_path_factory.mktemp("cases")
    found = {}
    for case in cases:
        ops = {node.op_type for node in case.model.graph.node}
        if not ops <= set(supported_ops()) or case.name in LIKE_ONNXRUNTIME:
            continue
        try:
            run_case(case, folder)
            found[case.name] = (ops, None, case.model)
        except (OnnxqError, AssertionError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            found[case.name] = (ops, error, case.model)
    return found


@pytest.mark.parametrize("op", supported_ops())
def test_the_cases_of(op, outcomes):
    mine = {name: error for name, (ops, error, _) in outcomes.items() if op in ops}
    wrong = {name: str(error) for name, error in mine.items() if not isinstance(error, UnsupportedError | None)}
    assert not wrong
    assert (None in mine.values()) == (op not in NO_CASES)


def test_only_these_are_refused(outcomes):
    refused = {name for name, (_, error, _) in outcomes.items() if isinstance(error, UnsupportedError)}
    types = {name for name, (_, _, model) in outcomes.items() if outside_torch(model)}
    assert refused == types | (REFUSED.keys() & outcomes.keys())


def test_how_many(outcomes):
    assert len(supported_ops()) >= 150
    assert sum(error is None for _, error, _ in outcomes.values()) >= 1000


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_aligned_corners_are_those_of_onnxruntime(mode):
    from helpers import model, weights

    made = model(
        "g (float[1,1,3,7] x, float[4] s) => (float[1,1,a,b] y) {"
        f' y = Resize<mode="{mode}", coordinate_transformation_mode="align_corners">(x, , s) }}',
        s=np.array([1, 1, 1.9, 0.6], np.float32),
    )
    x = weights(1, 1, 3, 7)
    expected = Session(made, SessionConfig(optimize="off")).run({"x": x})["y"]
    found = extract(made, ["x"], ["y"])({"x": from_numpy(x)})["y"]
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-4, atol=1e-5)
