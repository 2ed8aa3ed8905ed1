"""Moving per-channel scale and zero point out of a normalisation's result into the linear layers behind it.

With y = gamma * n(x) + beta read by linear layers W y + bias, ratios r and shifts b,

    gamma' = gamma / r,    beta' = beta / r - b        gives      y' = y / r - b
    W'[:, c] = W[:, c] * r[c],    bias' = bias + W' b    keeps    W' y' + bias' = W y + bias

exactly, so that one step for the whole of y' serves every channel of y. Without a beta (RMS normalisation), or where a
layer pads with zeros, b = 0. No node is added except a bias where there was none. Where others read y as well (the
residual sum behind a normalisation, as in BERT), y stays for them, b = 0, and a Mul makes y' = y / r for the layers.

Z. Li et al., "RepQ-ViT", arXiv 2212.08254, section 3.2; G. Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value
from onnxq.passes.base import Pass
from onnxq.passes.norms import Norm, norms, per_channel
from onnxq.passes.readings import Migration, Vector
from onnxq.passes.rescale import bias_of, kernel_of, response, scale_inputs, takes_shift, weight_of, write_layer


@dataclass(frozen=True)
class Pair:
    """A normalisation and the linear layers that read its result.

    Attributes:
        norm: The normalisation.
        layers: MatMul, Gemm or 1x1 Conv nodes; they share one r and b.
        shifts: Whether b may differ from 0.
        shared: Whether others read the result, too, so that the layers need a Mul of their own.
    """

    norm: Norm
    layers: tuple[Layer, ...]
    shifts: bool
    shared: bool = False

    @property
    def name(self) -> str:
        """Name of the tensor between them."""
        return graph.name_of(self.norm.output)

    @property
    def weights(self) -> list[npt.NDArray[np.float64]]:
        """The layers' weights, each [channels, outputs]."""
        return [kernel_of(layer)[0, :, :, 0].T for layer in self.layers]


def pairs(model: Model) -> Iterator[tuple[Node, Pair | str]]:
    """The pair at every normalisation, or why there is none, with the node that a report names."""
    for head, norm in norms(model):
        yield head, norm if isinstance(norm, str) else pair_of(norm)


def pair_of(norm: Norm) -> Pair | str:
    """`norm` with its readers, or the reason why its scale cannot move."""
    found = {node: _linear(node, norm) for node in graph.users(norm.output) if node.op_type != "Shape"}
    layers = [layer for layer in found.values() if not isinstance(layer, str)]
    others = {node: reason for node, reason in found.items() if isinstance(reason, str)}
    for node, reason in others.items():
        if not layers or node.op_type in graph.LAYER_OPS:
            return reason
    if not layers:
        return "no linear layer reads its result"
    shared = norm.output.is_graph_output() or bool(others)
    shifts = not shared and norm.beta_at is not None and all(takes_shift(layer) for layer in layers)
    return Pair(norm, tuple(layers), shifts, shared)


def _linear(node: Node, norm: Norm) -> Layer | str:
    """`node` as a layer that mixes the channels of `norm`, or why it is none."""
    if node.graph is not norm.output.graph:
        return f"{node.name} inside a subgraph reads its result"
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return f"{node.name} reads its result and is no linear layer ({node.op_type})"
    layer = graph.layer_of(node)
    if isinstance(layer, str):
        return f"{node.name} reads its result, but {layer}"
    if layer.data is not norm.output or any(value is norm.output for value in node.inputs[1:]):
        return f"{node.name} reads its result as a weight"
    axis = -1
    if node.op_type == "Conv":
        axis = 1 - layer.weight.ndim
        if any(size != 1 for size in layer.weight.shape[2:]) or graph.attribute(node, "group", 1) != 1:
            return f"{node.name} reads its result and is no dense 1x1 Conv"
    if axis != norm.axis:
        return f"{node.name} mixes another axis of its result than the channels"
    return layer


def migrate(model: Model, pair: Pair, ratios: Vector, shifts: Vector) -> None:
    """Write y' = y / r - b into the normalisation and its inverse into the layers, in place.

    The tensor between them holds other values afterwards and therefore gets another name; a shared one stays, and the
    layers read a new one, y / r. `pair` is used up.

    Args:
        model: Edited in place.
        pair: From `pair_of`.
        ratios: r, [channels], finite and positive.
        shifts: b, [channels], finite; all zero unless `pair.shifts`.

    Raises:
        ValueError: `ratios` or `shifts` are none of that.
    """
    norm = pair.norm
    ratios, shifts = np.asarray(ratios, np.float64), np.asarray(shifts, np.float64)
    if ratios.shape != norm.gamma.shape or shifts.shape != norm.gamma.shape:
        raise ValueError(f"{norm.name} has {len(norm.gamma)} channels, not {ratios.shape} and {shifts.shape}")
    if not (np.isfinite(ratios).all() and (ratios > 0).all() and np.isfinite(shifts).all()):
        raise ValueError("ratios must be positive, and all values finite")
    shifted = bool(shifts.any())
    if shifted and not pair.shifts:
        raise ValueError(f"{norm.name} or a layer behind it cannot take a shift")
    name = graph.unique_name(model, f"{pair.name}_scaled")
    data = _own(model, pair, ratios) if pair.shared else _rescaled(model, norm, ratios, shifts)
    for layer in pair.layers:
        kernel = scale_inputs(kernel_of(layer), ratios)
        moved = response(kernel, shifts)
        bias = bias_of(layer, layer.channels) + moved if shifted else None
        write_layer(model, layer, weight_of(layer, kernel), bias)
    data.name = name


def _rescaled(model: Model, norm: Norm, ratios: Vector, shifts: Vector) -> Value:
    """The result of a normalisation after its own scale and shift were changed to give y / r - b."""
    node, index = norm.gamma_at
    gamma = (norm.gamma.astype(np.float64) / ratios).astype(np.float32)
    graph.replace_constant(model, node, index, per_channel(gamma, norm))
    if norm.beta_at is not None and (norm.beta is not None or shifts.any()):
        old = np.zeros(len(ratios)) if norm.beta is None else norm.beta.astype(np.float64)
        node, index = norm.beta_at
        beta = per_channel((old / ratios - shifts).astype(np.float32), norm)
        graph.replace_constant(model, node, index, beta, f"{norm.name}_beta")
    return norm.output


def _own(model: Model, pair: Pair, ratios: Vector) -> Value:
    """The result of a shared normalisation divided by `ratios`, for the pair's layers alone."""
    norm, readers = pair.norm, {layer.node for layer in pair.layers}
    factors = (1.0 / ratios).astype(np.float32).reshape(-1, *[1] * (-1 - norm.axis))
    held = graph.add_constant(model, f"{norm.name}_factors", factors)
    new = graph.add_node(model, "Mul", [norm.output, held], f"{norm.name}_own", after=norm.nodes[-1])
    new.type, new.shape = norm.output.type, norm.output.shape
    graph.redirect(norm.output, new, lambda node: node in readers)
    return new


@dataclass(frozen=True)
class MigrateNorms(Pass):
    """Apply migrations that were chosen on calibration data.

    Attributes:
        choices: What to apply, by the name of the normalisation's result.
    """

    choices: Mapping[str, Migration] = field(default_factory=dict)

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of normalisations rewritten."""
        moved = 0
        for _, pair in list(pairs(model)):
            chosen = self.choices.get(pair.name) if isinstance(pair, Pair) else None
            if isinstance(pair, Pair) and chosen is not None and not chosen.is_identity:
                migrate(model, pair, chosen.ratios, chosen.shifts)
                moved += 1
        return moved

    def refused(self, model: Model) -> Mapping[str, str]:
        """Normalisations whose scale cannot move: node name -> reason."""
        return {str(head.name): pair for head, pair in pairs(model) if isinstance(pair, str)}
