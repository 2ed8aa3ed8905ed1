"""Calibration and evaluation data in whatever form users have it, as batches that a model takes.

`open_data` and `open_labelled` find out the form and check that its beginning fits; iterating then reads
lazily, as often as wanted, holding one batch. `split` sets rows aside to judge the result with.
"""

from onnxq.calibrate.data.dataset import LabelledDataset
from onnxq.calibrate.data.opening import open_data, open_labelled
from onnxq.calibrate.data.preprocess import PREPROCESS, Preprocess
from onnxq.calibrate.data.splitting import split

__all__ = ["PREPROCESS", "LabelledDataset", "Preprocess", "open_data", "open_labelled", "split"]
