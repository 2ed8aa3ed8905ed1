"""Differentiable grids: what the emitted graph will round, rounded with a gradient.

Steps are learned as s = s0 * exp(d), zero points as z0 + dz and weights in units of their step, so that the same
learning rates serve every tensor. Rounding passes its gradient straight through (Bengio et al., arXiv 1308.3432);
with that, the gradient of a step is the one of Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnxq.grid import SMALLEST_SCALE, Grid
from onnxq.types import Border, TensorGrid, WeightGrid
from onnxq.types.flow import BORDER_LIMITS

REACH = math.log(BORDER_LIMITS[1] / BORDER_LIMITS[0]) / 4
"""sigmoid(4 * 0.736) = 0.95."""


def round_through(x: Tensor) -> Tensor:
    """`x` rounded half to even; its gradient is passed on unchanged."""
    return x + (torch.round(x) - x).detach()


class RoundingBorder(torch.nn.Module):
    """From which fraction on values are rounded up: 1/2 at the start, learned per channel; see `onnxq.types.Border`.

        constant      B(t) = sigmoid(4 b0)
        affine        B(t) = (1 - t) sigmoid(4 b0) + t sigmoid(4 b1): straight, so that a layer can absorb it
        quadratic     B(t) = sigmoid(4 (b0 + b1 t + b2 t^2))

    all inside `BORDER_LIMITS`. With u the value in codes, floor(u + 1 - B) is round(u + 1/2 - B), ties apart; passed
    straight through, its gradient is 1 - dB/du for the value and -1 for the border.

    Args:
        kind: One of `KINDS`.
        channels: Their number.
        axis: The channel axis, counted from the last: below 0.

    Attributes:
        terms: b0, b1, ... of each channel, [number, channels].
        curved: Quadratic.
    """

    KINDS = ("constant", "affine", "quadratic")

    def __init__(self, kind: str, channels: int, axis: int) -> None:
        super().__init__()
        self.curved = kind == "quadratic"
        self._axis = axis
        self.terms = torch.nn.Parameter(torch.zeros(1 + self.KINDS.index(kind), channels))

    @classmethod
    def fixed(cls, border: Border) -> RoundingBorder:
        """A border that stays what it is."""
        made = cls("quadratic", len(border.terms), border.axis)
        made.terms = torch.nn.Parameter(torch.tensor(border.terms, dtype=torch.float32).T, requires_grad=False)
        return made

    def forward(self, place: Tensor) -> Tensor:
        """B at t = `place`, of the shape of an activation; t is cut off at 0 and 1."""
        terms = self.terms.reshape(len(self.terms), -1, *[1] * (-1 - self._axis))
        inside = torch.clamp(place, 0.0, 1.0)
        if self.curved:
            level = torch.sigmoid(4 * (terms[0] + inside * (terms[1] + inside * terms[2])))
            return torch.clamp(level, *BORDER_LIMITS)
        ends = torch.sigmoid(4 * terms.clamp(-REACH, REACH))
        return ends[0] + (ends[-1] - ends[0]) * inside

    @torch.no_grad()
    def limit(self) -> None:
        """Take the ends of a straight border back inside the limits; to be called after each step of an optimizer."""
        if not self.curved:
            self.terms.clamp_(-REACH, REACH)

    @torch.no_grad()
    def line(self) -> npt.NDArray[np.float64]:
        """A straight border's B at t = 0 and t = 1; [2, channels]."""
        ends = torch.sigmoid(4 * self.terms.clamp(-REACH, REACH).double()).cpu().numpy()
        line: npt.NDArray[np.float64] = np.stack([ends[0], ends[-1]])
        return line

    @torch.no_grad()
    def found(self, last: int) -> Border:
        """A curved border as it is now.

        Args:
            last: Number of codes minus 1. A channel where B rises by more than 1 from a code to the next would round
                some values to a lower code than smaller ones: its border goes back to 1/2.
        """
        places = torch.linspace(0, 1, 16 * last + 1, device=self.terms.device)
        curves = self(places.reshape(-1, *[1] * -self._axis))
        levels = curves.reshape(len(places), -1)
        steep = ((levels[1:] - levels[:-1]) * 16 > 1).any(dim=0)
        terms = torch.where(steep, 0.0, self.terms).T.cpu().tolist()
        return Border(self._axis, tuple((b0, b1, b2) for b0, b1, b2 in terms))


class ActivationQuantizer(torch.nn.Module):
    """The grid of one activation tensor.

    Args:
        grid: Where it starts.
        learn: Whether it may move.
        drop: Chance that an element passes unrounded while training (QDrop, Wei et al., arXiv 2203.05740).
        cuts: The grid must go on cutting off what it cuts off, because the runtime leaves out the Relu or Clip in
            front of it for that. Its step never grows then, and its zero point stays. A grid whose zero point is its
            lowest or highest code is always taken to be one.
        border: Where values are rounded up; at one half by default.

    Attributes:
        log_step: d of s = s0 * exp(d), a scalar.
        shift: dz of z = z0 + dz, a scalar, in codes.
    """

    def __init__(
        self,
        grid: TensorGrid,
        *,
        learn: bool,
        drop: float = 0.0,
        cuts: bool = False,
        border: RoundingBorder | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.border = border
        self._codes = Grid(grid.bits, grid.signed, symmetric=False)
        self._drop = drop
        self._cuts = cuts or not self._codes.qmin < grid.zero_point < self._codes.qmax
        self.log_step = torch.nn.Parameter(torch.zeros(()), requires_grad=learn)
        self.shift = torch.nn.Parameter(torch.zeros(()), requires_grad=learn and not self._cuts)

    def step(self) -> Tensor:
        """The step, a scalar."""
        return self.grid.scale * torch.exp(self.log_step)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as its codes stand for it."""
        step = self.step()
        zero = round_through(torch.clamp(self.grid.zero_point + self.shift, self._codes.qmin, self._codes.qmax))
        units = x / step
        if self.border is not None:
            place = (units + zero - self._codes.qmin) / (self._codes.qmax - self._codes.qmin)
            units = units + 0.5 - self.border(place)
        codes = torch.clamp(round_through(units) + zero, self._codes.qmin, self._codes.qmax)
        rounded = (codes - zero) * step
        if self.training and self._drop:
            return torch.where(torch.rand_like(x) < self._drop, x, rounded)
        return rounded

    def found(self) -> TensorGrid:
        """The grid as it is now."""
        step = max(
            float(np.float32(self.grid.scale) * np.float32(torch.exp(self.log_step.detach()).cpu())), SMALLEST_SCALE
        )
        zero = int(torch.clamp(torch.round(self.grid.zero_point + self.shift), self._codes.qmin, self._codes.qmax))
        return replace(self.grid, scale=step, zero_point=zero)

    @torch.no_grad()
    def limit(self) -> None:
        """Take back growth of a step that must not grow (`cuts`); to be called after each step of an optimizer."""
        if self._cuts:
            self.log_step.clamp_(max=0.0)
        if self.border is not None:
            self.border.limit()


class WeightQuantizer(torch.nn.Module):
    """The grid and the codes of one weight; subclasses say how a code is found.

    Args:
        weight: The float weight.
        grid: Where its steps start.
        learn_steps: Whether they may move.

    Attributes:
        log_steps: d of s = s0 * exp(d), one per step.
        lowest: The lowest codes, to be broadcast against the weight.
        highest: The highest codes.
        steady: The learning rate of what decides the codes stays as it is, and does not fall to zero.
    """

    steady = False

    def __init__(self, weight: npt.NDArray[np.float32], grid: WeightGrid, *, learn_steps: bool) -> None:
        super().__init__()
        self.grid = grid
        self._shape = [1] * weight.ndim
        if grid.axis is not None:
            self._shape[grid.axis] = -1
        for name, ends in zip(("lowest", "highest"), grid.ends(), strict=True):
            self.register_buffer(name, self._along(torch.from_numpy(ends.astype(np.float32))), persistent=False)
        self.register_buffer("steps", torch.tensor(grid.scales, dtype=torch.float32), persistent=False)
        self.log_steps = torch.nn.Parameter(torch.zeros(len(grid.scales)), requires_grad=learn_steps)
        self.register_buffer("units", torch.from_numpy(weight.copy()) / self._along(self.steps), persistent=False)

    steps: Tensor
    units: Tensor
    lowest: Tensor
    highest: Tensor

    def _along(self, steps: Tensor) -> Tensor:
        return steps.reshape(self._shape)

    def learned_steps(self) -> Tensor:
        """The steps as they are now, one per channel or a single one."""
        return self.steps * torch.exp(self.log_steps)

    def inside(self, codes: Tensor) -> Tensor:
        """`codes` cut off at the ends of the grid."""
        return torch.clamp(codes, self.lowest, self.highest)

    def soft_codes(self) -> Tensor:
        """Codes with a gradient, possibly between two integers."""
        raise NotImplementedError

    def hard_codes(self) -> Tensor:
        """Integer codes."""
        raise NotImplementedError

    def penalty(self, progress: float) -> Tensor | None:
        """What to add to the loss when `progress` (0 to 1) of the steps are done; None for nothing."""
        return None

    def forward(self) -> Tensor:
        """The weight as its codes stand for it."""
        return self.soft_codes() * self._along(self.learned_steps())

    @torch.no_grad()
    def found(self) -> tuple[npt.NDArray[np.int8], WeightGrid]:
        """Codes and grid as they are now."""
        codes = self.hard_codes().to(torch.int8).cpu().numpy()
        steps = self.learned_steps().cpu().numpy()
        return codes, replace(self.grid, scales=tuple(map(float, steps)))


class FixedCodes(WeightQuantizer):
    """A weight that keeps its codes.

    Args:
        codes: int8 codes in the weight's shape.
        grid: Their steps.
        learn_steps: Whether these may move.
    """

    def __init__(self, codes: npt.NDArray[np.int8], grid: WeightGrid, *, learn_steps: bool = False) -> None:
        super().__init__(codes.astype(np.float32), grid, learn_steps=learn_steps)
        self.register_buffer("given", torch.from_numpy(codes.astype(np.float32)), persistent=False)

    given: Tensor

    def soft_codes(self) -> Tensor:
        """The given codes."""
        return self.given

    def hard_codes(self) -> Tensor:
        """The given codes."""
        return self.given
