"""R2-Loss: a term for any training loss that takes the outliers out of the weights.

    L = L_task + strength * sum over layers of R(W / std W)

with R one of the measures of `onnxq.train.ranges`. A network with normalisations behind its layers can shrink all its
weights at no cost, and R with them, without any change of their shape; divided by the standard deviation, R sees only
the shape. With steps per output channel, R is the mean over the channels: one over the whole weight would shrink the
widest channel, which has a step of its own anyway.

M. Cho et al., "R^2: Range Regularization for Model Compression and Quantization", arXiv 2303.08253. Not in the paper:
the division by std, channels, folded BatchNorms, and k of the margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from onnxq.errors import UsageError
from onnxq.train import ranges
from onnxq.train.weights import RangedWeight, weights_of

Kind = Literal["linf", "margin", "soft-min-max"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPERATURE = 4.0
"""At the start, in units of 1 / std for normalised weights."""
LOWEST = 1.0
"""Further down the soft range is no range any more but twice the variance times the temperature."""


@dataclass(frozen=True)
class WeightRange:
    """How wide one weight is.

    Attributes:
        name: Of its layer.
        per_tensor: max |w| / std over the whole weight.
        per_channel: The median of max |w| / std over its output channels that are not constant.
    """

    name: str
    per_tensor: float
    per_channel: float


class R2Loss(torch.nn.Module):
    """The scalar to add to a training loss so that weights come out easy to quantize.

        r2 = R2Loss(model, "margin")
        optimizer = SGD([*model.parameters(), *r2.parameters()], ...)
        loss = task_loss + r2()        # r2.step(progress) before it, for a warm-up

    It reads the weights of `model` at every call, keeps no copy, and registers neither `model` nor its parameters: its
    own `parameters()` are learned margins or temperatures, and there are none with `learn=False`. They are made on the
    devices of the weights: move the model first.

    Args:
        model: The model in training: its linear and convolution layers count, biases and norms do not.
        kind: "linf" or "margin" for symmetric grids, "soft-min-max" for codebooks and asymmetric ones.
        strength: Weight of the term (lambda).
        per_channel: One range per output channel, for grids with a step per channel.
        normalise: Divide each weight by its standard deviation first.
        learn: Learn the margins M, instead of having the best ones (which make R the mean of the `top` share of
            magnitudes), or the temperatures, instead of leaving them at their start.
        top: Share of a row's elements that may exceed the margin; at least one does.
        fold: See `onnxq.train.weights.weights_of`.
        depthwise: Depthwise layers count, too.
        warm_up: Share of the training, from its start, over which the strength is zero.

    Raises:
        UsageError: There is no such kind, no such layer, or a number is out of its range.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kind: Kind = "margin",
        *,
        strength: float = 1e-2,
        per_channel: bool = False,
        normalise: bool = True,
        learn: bool = False,
        top: float = 0.01,
        fold: Mapping[str, str] | bool = True,
        depthwise: bool = True,
        warm_up: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UsageError(f"there is no range loss {kind!r}; known: {', '.join(KINDS)}")
        if not (strength >= 0 and 0 < top <= 1 and 0 <= warm_up < 1):
            raise UsageError("R2Loss takes a strength of at least 0, a top in (0, 1] and a warm_up in [0, 1)")
        self._weights: Sequence[RangedWeight] = [
            weight for weight in weights_of(model, fold) if depthwise or not weight.depthwise
        ]
        if not self._weights:
            raise UsageError("all layers of the model are depthwise, and depthwise=False leaves them out")
        self.kind, self.strength = kind, strength
        self._per_channel, self._normalise = per_channel, normalise
        self._top, self._warm_up = top, warm_up
        # A number that changes while training is a tensor: torch.compile would take it for a constant.
        self.register_buffer("factor", torch.tensor(0.0 if warm_up else 1.0), persistent=False)
        self._learned = torch.nn.ParameterList()
        if learn and kind != "linf":
            self._learned.extend(torch.nn.Parameter(self._start(self._rows(weight))) for weight in self._weights)

    factor: Tensor

    def step(self, progress: float) -> None:
        """Say which share of the training, 0 to 1, is done: below `warm_up` the loss is zero."""
        self.factor.fill_(float(progress >= self._warm_up))

    def forward(self) -> Tensor:
        """The scalar strength * sum of R, with gradients, on the device of the weights; zero while warming up."""
        terms = [self._measure(self._rows(weight), index).mean() for index, weight in enumerate(self._weights)]
        return torch.stack(terms).sum() * (self.strength * self.factor)

    def learned(self) -> dict[str, Tensor]:
        """By layer the learned margins M, in standard deviations if weights are normalised, or temperatures a.

        One value per row; the dictionary is empty when none is learned.
        """
        read = torch.abs if self.kind == "margin" else _temperature
        names = (weight.name for weight in self._weights)
        return {name: read(raw.detach()) for name, raw in zip(names, self._learned, strict=False)}

    def ranges(self) -> list[WeightRange]:
        """Max |w| / std of every layer: what the loss is to bring down, and what to log."""
        return ranges_of(self._weights)

    def _rows(self, weight: RangedWeight) -> Tensor:
        values = weight.read()
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        rows = ranges.rows_of(wide, weight.axis if self._per_channel else None)
        return rows / ranges.spread(rows)[:, None] if self._normalise else rows

    def _count(self, rows: Tensor) -> int:
        return max(1, round(self._top * rows.shape[1]))

    def _start(self, rows: Tensor) -> Tensor:
        """Where what is learned begins: at the best margins, or at the start temperature."""
        if self.kind == "margin":
            return rows.detach().abs().topk(self._count(rows), dim=1).values[:, -1].clone()
        return torch.full((len(rows),), math.log(math.expm1(TEMPERATURE - LOWEST)), device=rows.device)

    def _measure(self, rows: Tensor, index: int) -> Tensor:
        """R of every row."""
        learned = self._learned[index] if len(self._learned) else None
        if self.kind == "linf":
            return ranges.linf(rows)
        if self.kind == "margin":
            count = self._count(rows)
            return ranges.top_mean(rows, count) if learned is None else ranges.margin(rows, learned, count)
        fixed = torch.full((len(rows),), TEMPERATURE, dtype=rows.dtype, device=rows.device)
        return ranges.soft_min_max(rows, fixed if learned is None else _temperature(learned))


@torch.no_grad()
def ranges_of(weights: Sequence[RangedWeight]) -> list[WeightRange]:
    """Max |w| / std of every weight."""
    found = []
    for weight in weights:
        values = weight.read().double()
        whole, rows = (_ratios(ranges.rows_of(values, axis)) for axis in (None, weight.axis))
        per_channel = float(rows.quantile(0.5)) if len(rows) else 0.0
        found.append(WeightRange(weight.name, float(whole[0]) if len(whole) else 0.0, per_channel))
    return found


def _ratios(rows: Tensor) -> Tensor:
    """Max |w| / std of the rows that are not constant."""
    deviation = rows.std(dim=1, correction=0)
    alive = deviation > 0
    return rows[alive].abs().amax(dim=1) / deviation[alive]


def _temperature(raw: Tensor) -> Tensor:
    return LOWEST + torch.nn.functional.softplus(raw)
