"""Calibration: data in, ranges out."""

from onnxq.calibrate.auto import choose
from onnxq.calibrate.data import (
    PREPROCESS,
    LabelledDataset,
    Preprocess,
    open_data,
    open_labelled,
    split,
)
from onnxq.calibrate.extremes import Extremes, extremes
from onnxq.calibrate.grams import grams
from onnxq.calibrate.observe import has_free_rows, observe, probe_shapes
from onnxq.calibrate.outliers import find_outliers
from onnxq.calibrate.ranges import RULES, RangeRule, register_rule
from onnxq.calibrate.saturation import saturating
from onnxq.types.outliers import Outlier, TensorOutliers

__all__ = [
    "PREPROCESS",
    "RULES",
    "Extremes",
    "LabelledDataset",
    "Outlier",
    "Preprocess",
    "RangeRule",
    "TensorOutliers",
    "choose",
    "extremes",
    "find_outliers",
    "grams",
    "has_free_rows",
    "observe",
    "open_data",
    "open_labelled",
    "probe_shapes",
    "register_rule",
    "saturating",
    "split",
]
