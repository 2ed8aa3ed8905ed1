"""AdaQuant: free, continuous changes of the weights, learned together with steps, grids and biases.

    min over V, s_w, s_x, z_x, b' :  || f(X; W, b) - f_q(Q(X); Q(W + V), b') ||^2

with rounding passed straight through. Unlike AdaRound a code may move by more than one step.

I. Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", arXiv
2006.10518, equations 2 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnxq.graph import Layer
from onnxq.tune.job import Job
from onnxq.tune.learn import Rates, learn
from onnxq.tune.quantizers import WeightQuantizer, round_through
from onnxq.tune.soft_block import SoftBlock, require_agreement
from onnxq.types import Tuned, WeightGrid


@dataclass(frozen=True)
class AdaQuant:
    """Learned weights, steps, grids and biases of a block.

    Attributes:
        iterations: Steps per block.
        rates: Learning rates.
        drop: Chance that an activation passes unrounded while training.
        device: Where torch computes.
        judged: Drop the result where the block gets worse.
    """

    iterations: int = 500
    rates: Rates = Rates(codes=5e-3)
    drop: float = 0.0
    device: str = "cpu"
    judged: bool = True

    @property
    def name(self) -> str:
        """As reports call it."""
        return "adaquant"

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with learned codes, steps, grids and biases of the block; see `require_agreement` for refusals."""
        require_agreement(job, tuned)

        def make(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
            return FreeWeight(layer.weight, grid, learn_steps=True)

        block = SoftBlock(job, tuned, make, drop=self.drop)
        learn(block, job, self.rates, iterations=self.iterations, mix=self.drop, device=self.device)
        return block.found(tuned)


class FreeWeight(WeightQuantizer):
    """A weight that may move anywhere before it is rounded.

    Args:
        weight: The float weight.
        grid: Where its steps start.
        learn_steps: Whether they may move.
    """

    def __init__(self, weight: npt.NDArray[np.float32], grid: WeightGrid, *, learn_steps: bool) -> None:
        super().__init__(weight, grid, learn_steps=learn_steps)
        self.moved = torch.nn.Parameter(torch.zeros_like(self.units))

    def soft_codes(self) -> Tensor:
        """(W + V) / s, clipped to the grid and rounded."""
        moved = (self.units + self.moved) / self._along(torch.exp(self.log_steps))
        return round_through(self.inside(moved))

    def hard_codes(self) -> Tensor:
        """The same without a gradient."""
        return self.soft_codes().detach()
