"""Types: the casts that are made, those that are refused, and values no range can be found for."""

import numpy as np
import pytest

from onnxq.calibrate.data import open_data
from onnxq.errors import DataError, UnsupportedError
from onnxq.types import InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)


def rows(count, *shape, dtype=np.float32):
    return np.arange(count * int(np.prod(shape))).reshape(count, *shape).astype(dtype)


def refusal(source, inputs=X, error=DataError, **options):
    """Return the message with which opening or reading is refused."""
    with pytest.raises(error) as caught:
        list(open_data(source, inputs, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("stored", "wanted", "note"),
    [
        ("float64", "float32", "float64 to float32"),
        ("float16", "float32", "float16 to float32"),
        ("int32", "int64", "int32 to int64"),
        ("int64", "int32", "int64 to int32"),
        ("uint8", "float32", "uint8 to float32, values as stored"),
        ("bool", "int64", "bool to int64"),
        ("int64", "bool", "int64 to bool"),
    ],
)
def test_casts_that_keep_the_values(stored, wanted, note):
    given = np.array([[0, 1, 1]]).astype(stored)
    data = open_data(given, (InputSpec("x", wanted, ("N", 3)),))
    (batch,) = data
    assert batch["x"].dtype == wanted
    assert batch["x"].tolist() == [[0, 1, 1]]
    assert data.provenance["notes"] == {"cast x": note}


def test_another_byte_order_is_no_cast():
    data = open_data(rows(2, 3).astype(">f4"), X)
    (batch,) = data
    assert batch["x"].dtype == np.dtype("=f4")
    assert batch["x"].tolist() == rows(2, 3).tolist()
    assert data.provenance["notes"] == {}


@pytest.mark.parametrize(
    ("value", "stored", "wanted", "said"),
    [
        (1.5, "float32", "int64", "takes int64, the array is float32"),
        (1, "float64", "bool", "takes bool, the array is float64"),
        (1j, "complex64", "float32", "takes float32, the array is complex64"),
        ("a", "<U1", "float32", "takes float32, the array is <U1"),
        (2**31, "int64", "int32", "takes int32, which cannot hold 2147483648 at [0, 0]"),
        (-1, "int64", "uint8", "takes uint8, which cannot hold -1 at [0, 0]"),
        (2**24 + 1, "int64", "float32", "takes float32, which cannot hold 16777217 at [0, 0]"),
        (2, "int64", "bool", "takes bool, which cannot hold 2 at [0, 0]"),
        (1e39, "float64", "float32", "takes float32, which cannot hold 1e+39 at [0, 0]"),
    ],
)
def test_casts_that_would_lose_something(value, stored, wanted, said):
    assert said in refusal(np.array([[value]], stored), (InputSpec("x", wanted, ("N", 1)),))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(tmp_path, value):
    bad = rows(200, 3)
    bad[130, 1] = value
    bad[140, 0] = value
    np.savez(tmp_path / "a.npz", x=bad)
    assert refusal(tmp_path / "a.npz") == (f"a.npz: input 'x' holds {value} at [130, 1]: replace or remove it")


def test_an_input_without_a_numpy_type():
    assert "takes bfloat16" in refusal(rows(1, 3), (InputSpec("x", "bfloat16", (1, 3)),), UnsupportedError)
    assert "no inputs" in refusal(rows(1, 3), (), UnsupportedError)
