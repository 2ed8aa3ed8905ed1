"""An ONNX float model as a trainable torch module, and the trained weights back in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model
from onnxq.torch_exec import Slice, check, extract
from onnxq.torch_exec.tensors import to_numpy
from onnxq.train.weights import RangedWeight
from onnxq.types import Feeds


@dataclass(frozen=True)
class ImportedWeight:
    """The weight of one layer of an imported model.

    Attributes:
        name: Name of the layer's node.
        axis: The kept (output channel) axis.
        depthwise: Whether every output channel reads a single input channel.
        value: The weight, as stored.
    """

    name: str
    axis: int
    depthwise: bool
    value: torch.nn.Parameter

    def read(self) -> Tensor:
        """The weight."""
        return self.value


class Imported(torch.nn.Module):
    """A float model whose layers' weights and biases are parameters; all other constants stay as they are.

    BatchNormalization keeps its running statistics, as in inference: fold it first (`onnxq.simplify` does). A weight
    that several nodes share stays one. `onnxq.train.R2Loss` takes the module as its model.

    Args:
        model: The float model, its constants as initializers (`onnxq.graph.lift_constants`); left as it is.

    Attributes:
        inputs: Names of the model's inputs.
        outputs: Names of its outputs.

    Raises:
        UnsupportedError: An operator cannot run in torch, or no layer has constant float32 weights.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inputs = tuple(name for name, _, _ in graph.input_specs(model))
        self.outputs = tuple(graph.name_of(value) for value in model.graph.outputs)
        self._slice: Slice = extract(model, self.inputs, self.outputs)
        constants = self._slice.constants
        self._key: dict[str, str] = {}
        self._values = torch.nn.ParameterDict()
        self._weights: list[RangedWeight] = []
        for node in graph.nodes(model, *graph.LAYER_OPS):
            layer = graph.layer_of(node)
            if isinstance(layer, str):
                continue
            names = [name for name in _constants_of(layer) if name in constants]
            for name in names:
                if name not in self._key:
                    self._key[name] = f"constant_{len(self._key)}"
                    self._values[self._key[name]] = torch.nn.Parameter(constants[name].clone())
            weight = graph.name_of(node.inputs[1])
            if weight in self._key:
                self._weights.append(
                    ImportedWeight(str(node.name), layer.axis, _depthwise(layer), self._values[self._key[weight]])
                )
        if not self._weights:
            raise UnsupportedError("no Conv, Gemm or MatMul of the model has constant float32 weights to train.")

    def ranged_weights(self) -> list[RangedWeight]:
        """The layers' weights in graph order, a shared one once."""
        return list({id(weight.read()): weight for weight in reversed(self._weights)}.values())[::-1]

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name.

        Args:
            feeds: Tensors for all inputs by name.
        """
        found: dict[str, Tensor] = self._slice(feeds, constants=self._trained())
        return found

    @torch.no_grad()
    def original(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the weights and biases that the model came with."""
        found: dict[str, Tensor] = self._slice(feeds)
        return found

    def error(self, model: Model, feeds: Feeds) -> float:
        """How far the original in torch is from `model`, which this one was made from, in onnxruntime.

        Returns:
            The largest difference of an output over its range; see `onnxq.torch_exec.check`.
        """
        return check(self._slice, model, feeds)

    def written(self, model: Model) -> Model:
        """A copy of `model`, which this one was made from, with the weights and biases as they are now."""
        copy = model.clone()
        for name, value in self._trained().items():
            graph.set_initializer(copy, name, to_numpy(value))
        return copy

    def _trained(self) -> dict[str, Tensor]:
        return {name: self._values[key] for name, key in self._key.items()}


def _constants_of(layer: Layer) -> list[str]:
    """Names of the float32 initializers with the layer's weight and bias."""
    holder = layer.bias_add or layer.node
    values = [layer.node.inputs[1]]
    if layer.bias is not None:
        values += list(holder.inputs[:2] if layer.bias_add is not None else holder.inputs[2:3])
    return [graph.name_of(value) for value in values if graph.constant(value) is not None]


def _depthwise(layer: Layer) -> bool:
    groups = graph.attribute(layer.node, "group", 1)
    return layer.node.op_type == "Conv" and groups > 1 and layer.weight.shape[1] == 1
