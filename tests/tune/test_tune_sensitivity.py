"""Arrays in files, under any names."""

import numpy as np
from helpers import weights

from onnxq.tune.sensitivity import read_arrays, write_arrays


def test_arrays_of_any_name_come_back(tmp_path):
    arrays = {"/a:0/x.y": weights(2, 3), "file": np.arange(3), "names": np.float32(2)}
    write_arrays(tmp_path / "0.npz", arrays)
    found = read_arrays(tmp_path / "0.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
