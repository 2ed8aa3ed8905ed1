"""What runs in integers, and on which grids."""

from onnxq.plan.file import load_plan, plan_from_json, plan_to_json, save_plan
from onnxq.plan.grids import Precision, Range, make_plan
from onnxq.plan.placement import Placement, place
from onnxq.plan.units import Unit, units_of

__all__ = [
    "Placement",
    "Precision",
    "Range",
    "Unit",
    "load_plan",
    "make_plan",
    "place",
    "plan_from_json",
    "plan_to_json",
    "save_plan",
    "units_of",
]
