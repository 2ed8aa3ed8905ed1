"""RepAPQ: an affine layer behind every layer, learned with losses that outliers do not own.

    y[o] = gamma[o] * (Q(W) * Q(x))[o] + beta[o],    gamma > 0

Fused re-parameterized networks (RepVGG, MobileOne) have values that are huge in few channels and few samples. Here

* the weight codes stay those of plain rounding (or are learned as in AdaRound), and gamma and beta are learned: first
  mean and spread of every layer's result are put back (`onnxq.tune.moments`), then gradients refine them. Nothing is
  added to the graph: gamma * weight step is the new step, beta the new bias, and the codes are the same integers;
* the error is absolute (or Huber's, or squared), so that a few huge ones do not decide everything;
* the error at the end of the stage counts, too: its gradient reaches the block through the float layers behind.

"RepAPQ", arXiv 2402.16121. The public code holds none of the three parts; this follows the paper's idea.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from onnxq import graph
from onnxq.errors import UsageError
from onnxq.graph import Layer
from onnxq.tune.adaround import Rounding
from onnxq.tune.job import Job, block_error
from onnxq.tune.learn import Rates, learn, look_ahead
from onnxq.tune.losses import LOSSES, losses_of
from onnxq.tune.moments import TuneMoments
from onnxq.tune.quantizers import WeightQuantizer
from onnxq.tune.soft_block import MakeWeight, SoftBlock, learned_codes, require_agreement
from onnxq.types import Tuned, WeightGrid

TRIED = ("mae", "mse")
"""What the loss "auto" tries."""


@dataclass(frozen=True)
class RepAPQ:
    """A learned affine layer behind every layer, folded into weight steps and biases.

    Attributes:
        iterations: Steps per block, and per loss that is tried.
        rates: Learning rates; `steps` is that of log gamma, `biases` that of beta.
        loss: One of `LOSSES`, or "auto": of the absolute and the squared error the one that gives the block the smaller
            error on the held batches.
        stage: Weight of the error at the end of the stage; 0 leaves it out.
        reach: Most blocks behind the block that are looked through for that.
        rounding: Learn the weights' rounding, too, as in AdaRound.
        pull: Weight of the rounding's penalty, relative to the block's error at the start.
        spread: Give weights with a single step one per output channel, which an affine layer behind a weight rounded
            per tensor amounts to; their codes stay.
        device: Where torch computes.
        judged: Drop the result where the block gets worse.

    Raises:
        UsageError: There is no such loss.
    """

    iterations: int = 500
    rates: Rates = Rates(codes=2e-2, steps=1e-2, biases=1e-2)
    loss: str = "auto"
    stage: float = 1.0
    reach: int = 4
    rounding: bool = False
    pull: float = 10.0
    spread: bool = False
    device: str = "cpu"
    judged: bool = True

    def __post_init__(self) -> None:
        """Refuse an unknown loss."""
        if self.loss not in ("auto", *LOSSES):
            raise UsageError(f"a loss is auto, {', '.join(LOSSES)}, not {self.loss!r}.")

    @property
    def name(self) -> str:
        """As reports call it."""
        return "repapq"

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """`tuned` with learned steps, grids and biases of the block; see `require_agreement` for refusals."""
        require_agreement(job, tuned)
        base = spread_steps(job, tuned) if self.spread else tuned
        matched = TuneMoments()(job, base)
        start = min((base, matched), key=lambda state: block_error(job, state, job.train))
        found = [self._learned(job, base, start, loss) for loss in (TRIED if self.loss == "auto" else (self.loss,))]
        return min(found, key=lambda state: block_error(job, state)) if len(found) > 1 else found[0]

    def _learned(self, job: Job, base: Tuned, start: Tuned, loss: str) -> Tuned:
        """What one loss finds from `start`, whose codes are those of `base`."""
        make = self._rounded(job, base, start, loss) if self.rounding else learned_codes(start, learn_steps=True)
        block = SoftBlock(job, start, make)
        losses = losses_of(loss, job.targets[job.train[0]], start)
        ahead = look_ahead(job, start, loss, weight=self.stage, reach=self.reach)
        learn(block, job, self.rates, iterations=self.iterations, loss=losses, ahead=ahead, device=self.device)
        return block.found(start)

    def _rounded(self, job: Job, base: Tuned, start: Tuned, loss: str) -> MakeWeight:
        """Makes weights whose rounding on the steps of `base` is learned, on steps that begin as those of `start`."""
        error = block_error(job, start, job.train[:4])
        pull = self.pull * (error if loss == "mse" else error**0.5)

        def make(layer: Layer, grid: WeightGrid) -> WeightQuantizer:
            before = base.plan.weights[str(layer.node.name)]
            quantizer = Rounding(layer.weight, before, learn_steps=True, pull=pull, warm_up=0.2)
            with torch.no_grad():
                quantizer.log_steps.copy_(torch.log(torch.tensor(grid.scales) / torch.tensor(before.scales)))
            return quantizer

        return make


def spread_steps(job: Job, tuned: Tuned) -> Tuned:
    """`tuned` with a step per output channel for the block's weights that have a single one; their codes stay."""
    nodes = graph.node_names(job.model)
    weights: dict[str, WeightGrid] = dict(tuned.plan.weights)
    for name in job.block.layers:
        layer = graph.layer_of(nodes[name]) if name in weights else ""
        if isinstance(layer, Layer) and weights[name].axis is None and layer.node.op_type != "ConvTranspose":
            grid, count = weights[name], layer.channels
            weights[name] = WeightGrid(grid.scales * count, layer.axis, grid.bits, grid.lowest * count)
    return replace(tuned, plan=replace(tuned.plan, weights=weights))
