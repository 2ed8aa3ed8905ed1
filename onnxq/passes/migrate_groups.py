"""Moving the scale of loud channels from the layers that write an activation into those that read it.

Like cross-layer equalisation (`onnxq.passes.equalize`), W1' = W1 / r, b1' = b1 / r, W2' = W2 * r across operators with
f(r x) = r f(x), but with ratios chosen for the activation between them: W1 has a step per output channel and loses
nothing by any r, while one step serves all channels of the activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model
from onnxq.passes.base import Pass
from onnxq.passes.equalize import write_scales
from onnxq.passes.equalize_groups import Group, groups
from onnxq.passes.readings import Kernel, Migration
from onnxq.passes.rescale import kernel_of, scale_outputs

LARGE, WIDE = 2**22, 2**16
"""Elements of a kernel, and its outputs times taps, of which all outputs are looked at."""


def named_groups(model: Model) -> Iterator[tuple[str, Group]]:
    """Every group of layers whose channels may be scaled, by the name of what its first producer writes."""
    for _, group in groups(model):
        if isinstance(group, Group):
            yield graph.name_of(group.producers[0].output), group


def as_read(layer: Layer, found: Iterable[Group]) -> Kernel:
    """The kernel of a layer, each output scaled by the norm of the weights of `found` that read it.

    So the size of what it makes of something is that which the layers behind see. Where channels are loud because the
    layers behind take them back, the others matter no less; where an output matters to nobody, it does not. Of a large
    kernel, some of the outputs.
    """
    kernel = kernel_of(layer)
    for group in found:
        if any(producer.node is layer.node for producer in group.producers):
            read = [np.square(kernel_of(reader)).sum((1, 3)).reshape(-1) for reader in group.consumers]
            kernel = scale_outputs(kernel, np.sqrt(sum(read)))
    wide = kernel.size // max(1, kernel.shape[2])
    return kernel[:, :: max(-(-kernel.size // LARGE), -(-wide // WIDE))].copy()


@dataclass(frozen=True)
class MigrateGroups(Pass):
    """Apply migrations that were chosen on calibration data.

    Attributes:
        choices: What to apply, by the name of what a group's first producer writes; shifts are not looked at.
    """

    choices: Mapping[str, Migration] = field(default_factory=dict)

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of groups rewritten.

        What the first producer of each writes holds other values afterwards and therefore gets another name.
        """
        found = {name: group for name, group in named_groups(model) if name in self.choices}
        write_scales(model, list(found.values()), [self.choices[name].ratios for name in found])
        for name, group in found.items():
            group.producers[0].output.name = graph.unique_name(model, f"{name}_scaled")
        return len(found)
