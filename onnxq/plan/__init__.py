"""What runs in integers, and on which grids."""

from onnxq.plan.blocks import Block, find_blocks, layer_slices
from onnxq.plan.file import load_learned, load_plan, plan_from_json, plan_to_json, save_learned, save_plan
from onnxq.plan.grids import Precision, activation_bits, activation_grid, make_plan
from onnxq.plan.groups import Groups, Range
from onnxq.plan.origin import Origin, load_with_origin, save_with_origin
from onnxq.plan.placement import Placement, place
from onnxq.plan.units import Unit, units_of
from onnxq.plan.weights import room_for_bias

__all__ = [
    "Block",
    "Groups",
    "Origin",
    "Placement",
    "Precision",
    "Range",
    "Unit",
    "activation_bits",
    "activation_grid",
    "find_blocks",
    "layer_slices",
    "load_learned",
    "load_plan",
    "load_with_origin",
    "make_plan",
    "place",
    "plan_from_json",
    "plan_to_json",
    "room_for_bias",
    "save_learned",
    "save_plan",
    "save_with_origin",
    "units_of",
]
