"""A Pad with zeros in front of a Conv or an AveragePool becomes part of the padding these have themselves.

Both add zeros around their input, so pads simply add up:  pads' = pads(Pad) + pads(node).  An AveragePool
must count the zeros as elements (count_include_pad), as it counted those of the Pad; its own zeros, if any,
must have been counted too. A MaxPool pads with minus infinity, which is not what the Pad did.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxq import graph
from onnxq.passes.base import Pass

_READERS = ("Conv", "AveragePool", "MaxPool")


@dataclass(frozen=True)
class _Fold:
    """The padding a node gets once it reads past the Pad."""

    node: graph.Node
    pads: list[int]


@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold Pad into the Conv and AveragePool nodes that read it."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of Pad nodes removed."""
        folded = 0
        for pad in graph.nodes(model, "Pad"):
            folds = _plan(pad)
            if isinstance(folds, str):
                continue
            for fold in folds:
                _write(fold)
            folded += graph.bypass(pad, model)
        return folded

    def refused(self, model: graph.Model) -> dict[str, str]:
        """Pads in front of a convolution or a pool that stay: node name -> reason."""
        reasons: dict[str, str] = {}
        for pad in graph.nodes(model, "Pad"):
            plan = _plan(pad)
            if isinstance(plan, str) and any(reader.op_type in _READERS for reader in graph.users(pad.outputs[0])):
                reasons[str(pad.name)] = plan
        return reasons


def _plan(pad: graph.Node) -> list[_Fold] | str:
    """The new padding of every reader of `pad`, or why it stays."""
    spatial = _spatial_pads(pad)
    if isinstance(spatial, str):
        return spatial
    output = pad.outputs[0]
    if output.is_graph_output():
        return "its result is an output of the model"
    folds: list[_Fold] = []
    for reader in graph.users(output):
        pads = _pads_of(reader, output, spatial)
        if isinstance(pads, str):
            return pads
        folds.append(_Fold(reader, pads))
    return folds or "nothing reads it"


def _spatial_pads(pad: graph.Node) -> list[int] | str:
    """Begins, then ends, of the axes behind batch and channels; or why it is not zeros around an image."""
    mode = graph.attribute(pad, "mode", "constant")
    if mode != "constant":
        return f"it pads in {mode} mode"
    pads = graph.constant(pad.inputs[1])
    if pads is None:
        return "its pads are computed"
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        value = graph.constant(pad.inputs[2])
        if value is None or value.any():
            return "it pads with something other than zero"
    begins, ends = pads.reshape(2, -1).tolist()
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        axes, shape = (
            graph.constant(pad.inputs[3]),
            pad.inputs[0].shape if pad.inputs[0] is not None else None,
        )
        if axes is None or shape is None:
            return "its axes or the number of its axes are unknown"
        given = {int(axis) % len(shape): index for index, axis in enumerate(axes)}
        begins = [begins[given[axis]] if axis in given else 0 for axis in range(len(shape))]
        ends = [ends[given[axis]] if axis in given else 0 for axis in range(len(shape))]
    if min(*begins, *ends) < 0:
        return "it crops"
    if any((*begins[:2], *ends[:2])):
        return "it pads the batch or the channels"
    return [*begins[2:], *ends[2:]]


def _pads_of(reader: graph.Node, value: graph.Value, extra: list[int]) -> list[int] | str:
    """The padding with which `reader` may read past the Pad, or why it may not."""
    if reader.op_type not in _READERS or reader.domain not in ("", "ai.onnx"):
        return f"{reader.op_type} reads its result"
    if reader.op_type == "MaxPool":
        return "a MaxPool pads with minus infinity, not with zero"
    if value in reader.inputs[1:]:
        return f"it is the weight of {reader.name}"
    auto_pad = graph.attribute(reader, "auto_pad", "NOTSET")
    if auto_pad not in ("NOTSET", "VALID"):
        return f"{reader.name} pads by itself ({auto_pad})"
    own = graph.attribute(reader, "pads", [0] * len(extra)) if auto_pad == "NOTSET" else [0] * len(extra)
    pads = [mine + more for mine, more in zip(own, extra, strict=True)]
    if reader.op_type == "AveragePool":
        if graph.attribute(reader, "ceil_mode", 0):
            return f"{reader.name} rounds its size up"
        if any(own) and not graph.attribute(reader, "count_include_pad", 0):
            return f"{reader.name} does not count its own padding"
        kernel = graph.attribute(reader, "kernel_shape", [1] * (len(extra) // 2))
        if any(amount >= size for amount, size in zip(pads, kernel * 2, strict=True)):
            return f"the window of {reader.name} is not larger than the padding"
    return pads


def _write(fold: _Fold) -> None:
    graph.set_attribute(fold.node, "pads", fold.pads)
    graph.set_attribute(fold.node, "auto_pad", None)
    if fold.node.op_type == "AveragePool":
        graph.set_attribute(fold.node, "count_include_pad", 1)
