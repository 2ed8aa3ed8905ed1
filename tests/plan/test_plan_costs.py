"""Costs and budgets: figures counted by hand, and what is refused."""

import numpy as np
import pytest
from helpers import model, weights
from planning import planned

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import InputError, UsageError
from onnxq.plan import budgets, place
from onnxq.plan.costs import average_bits, bit_operations, read_costs, size_costs
from onnxq.types.mixed import FLOAT

OPTIONS = ((8, 8), (6, 8), (4, 8), (3, 4), FLOAT)


def chain():
    text = """g (float[n,3,8,8] x, float[5,3,3,3] w, float[5] b, float[7,5,1,1] u) => (float[n,7,6,6] y) {
        [a] h = Conv(x, w, b) i = Relu(h) [c] y = Conv(i, u)
    }"""
    return model(text, w=weights(5, 3, 3, 3), b=weights(5), u=weights(7, 5, 1, 1))


def stored(count, bits, steps):
    return -(-count * bits // 8)


def test_sizes_are_those_of_the_file(tmp_path):
    net = chain()
    placement = place(net)
    path = tmp_path / "base.onnx"
    graph.save(emit(net, planned(net, {"x": weights(2, 3, 8, 8)})), path)
    costs = size_costs(placement, OPTIONS, path.stat().st_size, stored)
    assert costs.layers["a"] == {(8, 8): 135, (6, 8): 102, (4, 8): 68, (3, 4): 51, FLOAT: 540 - 9 * 5}
    assert costs.layers["c"][FLOAT] == 140 - 9 * 7
    assert costs.total({"a": (8, 8), "c": (8, 8)}) == path.stat().st_size
    assert costs.total({"a": (4, 8), "c": (3, 4)}) == path.stat().st_size - (135 - 68) - (35 - 14)
    assert size_costs(placement, OPTIONS, 1000, stored, per_channel=False).layers["c"][FLOAT] == 140 - 9


def test_average_bits_weigh_layers_by_their_weights():
    costs = average_bits(place(chain()), OPTIONS)
    assert costs.total({"a": (8, 8), "c": (8, 8)}) == pytest.approx(8)
    assert costs.total({"a": (4, 8), "c": (8, 8)}) == pytest.approx((4 * 135 + 8 * 35) / 170)


def test_bit_operations_multiply_work_by_both_bits():
    costs = bit_operations({"a": 1000, "c": 10}, place(chain()), OPTIONS)
    assert costs.total({"a": (3, 4), "c": FLOAT}) == 1000 * 12 + 10 * 1024


TABLE = "layer,weight_bits,activation_bits,cost\na,8,8,2.5\na,4,8,1.25\n,,,10\nc,8,8,1\nc,32,32,7\n"


def test_a_vendors_table(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text(TABLE)
    costs = read_costs(path, "energy")
    assert (costs.name, costs.constant) == ("energy", 10)
    assert costs.layers == {"a": {(8, 8): 2.5, (4, 8): 1.25}, "c": {(8, 8): 1, FLOAT: 7}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,weight_bits,cost\n", "lacks the column 'activation_bits'"),
        (TABLE + "a,4,8,3\n", r"line 7: 'a' at 4/8 bits stands there twice"),
        (TABLE + "d,4,8,much\n", "line 7: 'much' is not a number"),
        (TABLE + "d,4,8,nan\n", "line 7: 'nan' is not a number"),
        (TABLE + "d,4.5,8,1\n", "bits are whole numbers, not '4.5'"),
        (TABLE + "d,4\n", "line 7: None is not a number"),
    ],
)
def test_a_table_with_something_wrong_is_refused(tmp_path, text, message):
    path = tmp_path / "costs.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_costs(path)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        read_costs(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "limit"), [("0.15x", 150), ("2MB", 2e6), ("800 kb", 8e5), ("1.5KiB", 1536), ("4096", 4096), (".5X", 500)]
)
def test_sizes_as_users_write_them(text, limit):
    assert budgets.read_size(text).of(1000) == limit


@pytest.mark.parametrize("text", ["", "x", "2TBx", "-1MB", "1,5MB", "2 MB 3", "0", "0x", "1.5x", "0.4B", "15%"])
def test_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(UsageError, match="--max-size takes a share of the float file's size such as"):
        budgets.read_size(text)


def test_latencies_as_users_write_them():
    assert budgets.read_latency("0.6x").of(5.0) == 3.0
    assert budgets.read_latency("1.5ms").of(5.0) == 1.5
    for text in ("1.5", "2s", "0ms", "1.2x", "fast"):
        with pytest.raises(UsageError, match="--max-latency takes"):
            budgets.read_latency(text)


def test_wishes():
    found = budgets.read_wishes(max_size="0.5x", avg_bits="4", max_drop="0.005")
    assert (found.avg_bits, found.max_drop, found.max_latency) == (4.0, 0.005, None)
    assert found.max_size.of(10) == 5
    assert found
    assert not budgets.read_wishes()
    assert budgets.read_wishes(max_drop=0.0)
    for text in ("1", "-0.1", "half", "nan"):
        with pytest.raises(UsageError, match=r"--max-drop takes a fraction of the metric.*0.005 is half a point"):
            budgets.read_wishes(max_drop=text)
    for text in ("1.9", "8.5", "four"):
        with pytest.raises(UsageError, match="--avg-bits takes 2 to 8 bits"):
            budgets.read_wishes(avg_bits=text)


def test_bits_as_users_write_them():
    assert budgets.read_bits("4, 3/6,4,4/8") == ((4, 8), (3, 6))
    for text in ("", "9", "4/", "1", "4;3", "4/16", "w4a8"):
        with pytest.raises(UsageError, match="--bits takes bits from 2 to 8"):
            budgets.read_bits(text)


def test_a_relative_limit_is_exact():
    assert budgets.read_size("0.13x").of(1119021) == pytest.approx(145472.73)
    assert np.isfinite(budgets.read_size("1x").of(3))
