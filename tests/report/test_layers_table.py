"""Layers on the terminal."""

import io

import pytest
from pages import details, layer
from rich.console import Console

from onnxq.report import print_layers
from onnxq.report.layers import bar
from onnxq.types.outliers import Outlier, TensorOutliers


def shown(**changes):
    out = io.StringIO()
    print_layers(Console(file=out, width=160), details(**changes))
    return out.getvalue().splitlines()


def test_every_layer_has_its_bits_and_what_rounding_alone_leaves():
    lines = shown()
    assert lines[1].split() == [
        "conv",
        "Conv",
        "w4a8",
        "\N{FULL BLOCK}" * 10,
        "24.5",
        "dB",
        "33.3",
        "dB",
        "41.5",
        "dB",
        "75.0",
        "%",
    ]
    assert lines[2].split()[-6:] == ["float", "-", "-", "-", "25.0", "%"]
    assert len(lines) == 3


def test_outliers_are_named():
    loud = TensorOutliers(
        tuple(Outlier(index, 1.0, 9.0, 9.0) for index in (5, 3, 2, 9, 1)), (Outlier(7, 1.0, 9.0, 9.0),), 16
    )
    quiet = TensorOutliers((), (Outlier(8, 1.0, 9.0, 9.0),), 16)
    assert shown(outliers={"x": loud, "[b]": quiet})[3:] == [
        "  outliers in x: channels 5, 3, 2, 9; samples 7",
        "  outliers in [b]: samples 8",
    ]


@pytest.mark.parametrize(
    ("sqnr", "length"), [(None, 0), (float("nan"), 0), (-5.0, 0), (30.0, 12), (60.0, 24), (float("inf"), 24)]
)
def test_a_bar_is_full_at_sixty_decibels(sqnr, length):
    assert bar(sqnr) == "\N{FULL BLOCK}" * length
    assert shown(layers=(layer(sqnr_db=sqnr),))
