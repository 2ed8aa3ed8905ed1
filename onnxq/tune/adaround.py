"""AdaRound: learn for each weight whether to round up or down.

    h(a) = clip(1.2 * sigmoid(a) - 0.1, 0, 1)      code = clip(floor(w / s) + h(a), qmin, qmax)

starts at h = frac(w / s), that is at the float weight, and a penalty mean(1 - |2 h - 1|^beta), with beta falling from
20 to 2, drives every h to 0 or 1. What is between them at the end is rounded. Learned steps scale the codes; w / s is
what it was at the start.

M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568; blocks as units:
Y. Li et al., "BRECQ", arXiv 2102.05426; unrounded activations mixed in: X. Wei et al., "QDrop", arXiv 2203.05740.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnxq.graph import Layer
from onnxq.tune.job import Job, block_error
from onnxq.tune.learn import Rates, learn
from onnxq.tune.quantizers import WeightQuantizer
from onnxq.tune.soft_block import SoftBlock, require_agreement
from onnxq.types import Tuned, WeightGrid

LOW, HIGH = -0.1, 1.1
"""The sigmoid is stretched to this interval and clipped, so that 0 and 1 are reached."""


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding of the weights of a block, together with steps, grids and biases.

    Attributes:
        iterations: Steps per block.
        rates: Learning rates.
        weight: Of each layer's penalty, relative to the block's error at the start.
        warm_up: Share of the steps without penalty.
        drop: Chance that an activation passes unrounded while training.
        learn_steps: Learn weight steps, too.
        learn_grids: Learn activation grids, too.
        device: Where torch computes.
        judged: Drop the result where the block gets worse.
    """

    iterations: int = 1000
    rates: Rates = Rates(codes=2e-2)
    weight: float = 10.0
    warm_up: float = 0.2
    drop: float = 0.5
    learn_steps: bool = True
    learn_grids: bool = True
    device: str = "cpu"
    judged: bool = True

    @property
    def name(self) -> str:
        """As reports call it."""
        return "adaround"

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with learned codes, steps, grids and biases of the block; see `require_agreement` for refusals."""
        require_agreement(job, tuned)
        pull = self.weight * block_error(job, tuned, job.train[:4])

        def make(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
            return Rounding(layer.weight, grid, learn_steps=self.learn_steps, pull=pull, warm_up=self.warm_up)

        block = SoftBlock(job, tuned, make, learn_grids=self.learn_grids, drop=self.drop)
        learn(block, job, self.rates, iterations=self.iterations, mix=self.drop, device=self.device)
        return block.found(tuned)


class Rounding(WeightQuantizer):
    """A weight whose codes are learned between rounding down and rounding up.

    Args:
        weight: The float weight.
        grid: Where its steps start.
        learn_steps: Whether they may move.
        pull: Weight of the penalty on codes between integers.
        warm_up: Share of the training without penalty.
    """

    steady = True  # a small beta, which moves what is far from 0 and 1, comes last

    def __init__(
        self,
        weight: npt.NDArray[np.float32],
        grid: WeightGrid,
        *,
        learn_steps: bool,
        pull: float = 0.0,
        warm_up: float = 0.0,
    ) -> None:
        super().__init__(weight, grid, learn_steps=learn_steps)
        self._pull, self._warm_up = pull, warm_up
        self.register_buffer("floor", torch.floor(self.units), persistent=False)
        share = (self.units - self.floor).clamp(1e-6, 1 - 1e-6)  # where the sigmoid still has a gradient
        self.alpha = torch.nn.Parameter(-torch.log((HIGH - LOW) / (share - LOW) - 1))

    floor: Tensor

    def rounding(self) -> Tensor:
        """The h in [0, 1] of every weight."""
        return torch.clamp(torch.sigmoid(self.alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)

    def soft_codes(self) -> Tensor:
        """The sum floor + h, inside the grid."""
        return self.inside(self.floor + self.rounding())

    def hard_codes(self) -> Tensor:
        """floor, or one more where h is at least a half."""
        return self.inside(self.floor + (self.alpha >= 0))

    def penalty(self, progress: float) -> Tensor | None:
        """The mean of 1 - |2 h - 1|^beta over the weights, times the pull."""
        if progress < self._warm_up or not self._pull:
            return None
        beta = 20.0 + (2.0 - 20.0) * (progress - self._warm_up) / (1.0 - self._warm_up)
        return self._pull * torch.mean(1.0 - torch.abs(2.0 * self.rounding() - 1.0) ** beta)
