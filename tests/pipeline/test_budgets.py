"""Budgets inside `quantize`, on the shipped model: what is asked for is what the file is."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import onnxq
from onnxq.errors import TargetNotMet, UsageError
from onnxq.pipeline import budgeting, mixed

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits_cnn.onnx"
FLOAT_BYTES = MODEL.stat().st_size
ALLOCATE = mixed.allocate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(autouse=True)
def few_options(monkeypatch, folder):
    """Three numbers of bits, and one folder of measured errors for all runs."""
    monkeypatch.setattr(budgeting, "OPTIONS", ((8, 8), (4, 8), (2, 8)))
    monkeypatch.setattr(budgeting, "tempfile", SimpleNamespace(TemporaryDirectory=lambda **_: nullcontext(str(folder))))


def quantized(check=True, **changes):
    return onnxq.quantize(
        MODEL,
        ROOT / "calibration_data" / "digits",
        preprocess=onnxq.Preprocess(mean=(0.5,), std=(0.5,)),
        checks=onnxq.Checks(verify=check, time_it=False),
        place=onnxq.Workplace(workers=1),
        samples=16,
        **changes,
    )


def bits(result):
    return {name: grid.bits for name, grid in result.plan.weights.items()}


def average(result):
    sizes = dict.fromkeys(bits(result), result.prepared.model.graph)
    counts = {node.name: node.inputs[1].const_value.size for node in result.prepared.model.graph if node.name in sizes}
    return sum(bits(result)[name] * count for name, count in counts.items()) / sum(counts.values())


def test_the_file_is_as_small_as_asked_for_and_not_much_smaller(tmp_path):
    result = quantized(max_size="0.17x")
    size = result.save(tmp_path / "m.onnx").stat().st_size
    assert 0.9 * 0.17 * FLOAT_BYTES < size <= 0.17 * FLOAT_BYTES
    assert len(set(bits(result).values())) > 1
    assert result.verdict.coverage.share == 1.0
    assert not result.missed


def test_bits_are_as_few_on_average_as_asked_for():
    result = quantized(avg_bits="5", check=False)
    assert 4.5 < average(result) <= 5
    assert len(set(bits(result).values())) > 1


def test_bit_operations_and_a_vendors_table_bind_together(tmp_path):
    free = quantized(max_bops="0.6x", check=False)
    table = tmp_path / "costs.csv"
    names = list(bits(free))
    kept = next(name for name in names if bits(free)[name] < 8)
    lines = ["layer,weight_bits,activation_bits,cost"]
    lines += [f"{name},{w},8,{int(name == kept and w != 8)}" for name in names for w in (8, 4, 2)]
    table.write_text("\n".join(lines))
    bound = quantized(max_bops="0.6x", max_cost=f"{table}=0", check=False)
    assert bits(bound)[kept] == 8
    assert min(bits(bound).values()) < 8


def test_a_budget_that_cannot_be_met_is_refused_and_the_nearest_is_kept_on_request():
    with pytest.raises(TargetNotMet, match="size") as caught:
        quantized(max_size="0.01x")
    nearest = quantized(max_size="0.01x", keep=True, check=False)
    assert nearest.missed == str(caught.value)
    assert set(bits(nearest).values()) == {2}


def test_a_drop_alone_leaves_eight_bits_where_they_keep_it():
    assert set(bits(quantized(max_drop="0.3", check=False)).values()) == {8}


def test_bits_beside_a_budget_that_decides_them_are_refused():
    with pytest.raises(UsageError, match="--max-size decides the bits of every layer: leave --weight-bits out"):
        quantized(max_size="0.2x", weight_bits=4)


def test_a_file_that_tuning_made_too_large_is_said(monkeypatch):
    monkeypatch.setattr(budgeting, "_bytes_of", lambda *_: 0)  # the trial finds it small enough
    assert "the size 0.17x is not met" in quantized(max_size="0.17x", check=False).missed


def test_what_unpacking_takes_is_corrected_in_both_directions(monkeypatch):
    """With files 8 KB smaller than foreseen there is room for more bits; with larger ones for fewer."""
    weight = {}
    for name, off in (("smaller", -8000), ("as foreseen", 0), ("larger", 8000)):
        sized = lambda choice, _, off=off: choice.allocation.costs.get("size", FLOAT_BYTES) + off  # noqa: E731
        monkeypatch.setattr(budgeting, "_bytes_of", sized)
        weight[name] = average(quantized(max_size="0.17x", check=False))
    assert weight["smaller"] > weight["as foreseen"] > weight["larger"]


def test_a_size_that_only_the_file_misses_is_refused_in_the_users_numbers(monkeypatch):
    limit = 0.13 * FLOAT_BYTES
    monkeypatch.setattr(budgeting, "_bytes_of", lambda *_: 10 * FLOAT_BYTES)
    with pytest.raises(TargetNotMet, match=f"the size cannot be {limit:.0f} bytes: the smallest file that was tried"):
        quantized(max_size="0.13x", check=False)


def test_the_smallest_of_all_gets_its_chance_where_the_estimate_is_too_high(monkeypatch):
    """The first file is larger than foreseen, so that the corrected limit is below the least; the least one fits."""
    offs = [FLOAT_BYTES]
    real = budgeting._bytes_of
    monkeypatch.setattr(budgeting, "_bytes_of", lambda *given: real(*given) + (offs.pop() if offs else 0))
    assert not quantized(max_size="0.15x", check=False).missed
    assert not offs


def test_the_programs_choice_has_rivals(monkeypatch):
    asked = []
    monkeypatch.setattr(mixed, "contested", lambda found, known, budgets, *_, log: asked.append(budgets) or ALLOCATE(
        found, known, [replace(budget, limit=3.0) for budget in budgets]
    ))  # fmt: skip
    assert average(quantized(avg_bits="5", check=False)) <= 3
    assert len(asked) == 1
