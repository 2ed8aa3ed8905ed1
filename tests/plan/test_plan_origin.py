import json
import math
from dataclasses import replace

import pytest

from onnxq.errors import EnvironmentFault, InputError
from onnxq.plan import Origin, load_plan, load_with_origin, plan_from_json, plan_to_json, save_with_origin
from onnxq.types import BlockGrid, QuantPlan, TensorGrid, WeightGrid

PLAN = QuantPlan(
    target="tensorrt",
    source="abc",
    tensors={"x": TensorGrid(0.1, 0, 8, True, False)},
    weights={"n": WeightGrid((0.1,), None)},
    integer=("n",),
    skipped={},
    blocks={"m": BlockGrid(4, 32)},
    half=("h", "i"),
)
ORIGIN = Origin(
    model="../net.onnx",
    sha256="f" * 64,
    simplified=True,
    rewritten=False,
    without=("MergeGroups",),
    equalize=True,
    migrations={"t": {"ratios": [1.0, 0.1], "shifts": [0.0, 3.0], "scale": 0.5, "zero_point": 3}},
    packed=False,
    learned=True,
    metadata={"onnxq.version": "1", "onnxq.recipe": '{"target": "tensorrt"}'},
    ranges={"x": (-0.1, 0.30000000000000004), "y": (0.0, 0.0)},
)


def test_a_plan_and_its_origin_come_back(tmp_path):
    path = tmp_path / "plan.json"
    save_with_origin(PLAN, ORIGIN, path)
    assert load_with_origin(path) == (PLAN, ORIGIN)
    assert load_plan(path) == PLAN
    assert plan_from_json(plan_to_json(PLAN)) == PLAN


def edited(tmp_path, change):
    path = tmp_path / "plan.json"
    save_with_origin(PLAN, ORIGIN, path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        load_with_origin(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("origin"), "does not say which model it is for"),
        (lambda d: d["origin"].pop("sha256"), "origin lacks the key 'sha256'"),
        (lambda d: d["origin"].update(modle="x"), "unknown key 'modle'. Did you mean 'model'?"),
        (lambda d: d["origin"].update(simplified=1), "simplified holds a value of the wrong kind: 1"),
        (lambda d: d["origin"].update(without="x"), "without holds a value of the wrong kind"),
        (lambda d: d.update(origin=3), "must be objects"),
        (lambda d: d.update(ranges=[1]), "must be objects"),
        (lambda d: d["ranges"].update(x=[1.0, 0.0]), "range of x: it must be two numbers, the smaller one first"),
        (lambda d: d["ranges"].update(x=[1.0]), "range of x"),
        (lambda d: d["ranges"].update(x=[0.0, math.inf]), "range of x"),
        (lambda d: d["ranges"].update(x=["0", "1"]), "range of x"),
        (lambda d: d["blocks"]["m"].update(bits=3), "block m: a block has 4 or 8 bits"),
        (lambda d: d["blocks"]["m"].update(block=8), "block m"),
        (lambda d: d["blocks"]["m"].update(size=8), "unknown key 'size'"),
        (lambda d: d.update(half="h"), "half must be a list of names"),
    ],
)
def test_a_damaged_origin_is_refused_in_one_line(tmp_path, change, message):
    assert message in edited(tmp_path, change)


def test_a_file_that_is_not_there_or_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_with_origin(tmp_path / "gone.json")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        save_with_origin(PLAN, replace(ORIGIN, ranges={}), tmp_path / "gone" / "plan.json")
