"""LSTM, GRU and RNN with their usual activations.

Shapes, with D directions and H hidden numbers: x [steps, batch, in], w [D, gates H, in], r [D, gates H, H],
b [D, 2 gates H], states [D, batch, H]; the result is [steps, D, batch, H]. `layout` 1 puts the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler

Direction = Literal["forward", "reverse", "bidirectional"]
States = tuple[Tensor, ...]
Cell = Callable[[Tensor, States, int], States]


def _run(
    x: Tensor,
    lengths: Tensor | None,
    starts: Sequence[Tensor | None],
    hidden: int,
    cell: Cell,
    direction: Direction,
    layout: int,
) -> tuple[Tensor, ...]:
    """Run `cell(x[t], states, direction index)` over the steps; items past their length keep their states and give 0.

    Returns:
        All first states, then the last of each state.
    """
    steps = x.transpose(0, 1) if layout else x
    ways = [False, True] if direction == "bidirectional" else [direction == "reverse"]
    rows, last = [], []
    for index, backwards in enumerate(ways):
        zeros = x.new_zeros(steps.shape[1], hidden)
        states = tuple(zeros if s is None else (s[:, index] if layout else s[index]) for s in starts)
        made: list[Tensor] = []
        for step in reversed(range(len(steps))) if backwards else range(len(steps)):
            after = cell(steps[step], states, index)
            shown = after[0]
            if lengths is not None:
                active = (step < lengths).unsqueeze(1)
                after = tuple(torch.where(active, new, old) for new, old in zip(after, states, strict=True))
                shown = torch.where(active, shown, zeros)
            states = after
            made.append(shown)
        rows.append(torch.stack(made[::-1] if backwards else made))
        last.append(states)
    everything = torch.stack(rows, 1)
    final = [torch.stack(parts, 1 if layout else 0) for parts in zip(*last, strict=True)]
    return everything.permute(2, 0, 1, 3) if layout else everything, *final


def _biases(b: Tensor | None, r: Tensor) -> Tensor:
    """[2, D, gates H]: the biases of the input's and of the state's product."""
    if b is None:
        return r.new_zeros(2, *r.shape[:2])
    return torch.stack(b.chunk(2, 1))


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    /,
    *,
    hidden_size: int,
    direction: Direction = "forward",
    input_forget: Literal[0] = 0,
    layout: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order input, output, forget, cell; `p` [D, 3 H] are peepholes. All h, and the last h and c."""
    del input_forget
    bias_x, bias_h = _biases(b, r)
    peep = p if p is not None else w.new_zeros(w.shape[0], 3 * hidden_size)

    def cell(step: Tensor, states: States, index: int) -> States:
        h, c = states
        gates = F.linear(step, w[index], bias_x[index]) + F.linear(h, r[index], bias_h[index])
        enter, leave, keep, new = gates.chunk(4, -1)
        p_enter, p_leave, p_keep = peep[index].chunk(3)
        enter, keep = torch.sigmoid(enter + p_enter * c), torch.sigmoid(keep + p_keep * c)
        c = keep * c + enter * torch.tanh(new)
        return torch.sigmoid(leave + p_leave * c) * torch.tanh(c), c

    everything, h, c = _run(x, sequence_lens, (initial_h, initial_c), hidden_size, cell, direction, layout)
    return everything, h, c


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    /,
    *,
    hidden_size: int,
    direction: Direction = "forward",
    layout: Literal[0, 1] = 0,
    linear_before_reset: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """Gates in the order update, reset, hidden; the reset acts on h or, `linear_before_reset`, on its product."""
    bias_x, bias_h = _biases(b, r)

    def cell(step: Tensor, states: States, index: int) -> States:
        (h,) = states
        update_x, reset_x, new_x = F.linear(step, w[index], bias_x[index]).chunk(3, -1)
        (r_update, r_reset, r_new), (b_update, b_reset, b_new) = r[index].chunk(3), bias_h[index].chunk(3)
        update = torch.sigmoid(update_x + F.linear(h, r_update, b_update))
        reset = torch.sigmoid(reset_x + F.linear(h, r_reset, b_reset))
        inner = reset * F.linear(h, r_new, b_new) if linear_before_reset else F.linear(reset * h, r_new, b_new)
        new = torch.tanh(new_x + inner)
        return (update * h + (1 - update) * new,)

    everything, last = _run(x, sequence_lens, (initial_h,), hidden_size, cell, direction, layout)
    return everything, last


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    /,
    *,
    hidden_size: int,
    direction: Direction = "forward",
    layout: Literal[0, 1] = 0,
) -> tuple[Tensor, Tensor]:
    """H' = tanh(w x + r h + b). All h, and the last."""
    bias_x, bias_h = _biases(b, r)

    def cell(step: Tensor, states: States, index: int) -> States:
        made = F.linear(step, w[index], bias_x[index]) + F.linear(states[0], r[index], bias_h[index])
        return (torch.tanh(made),)

    everything, last = _run(x, sequence_lens, (initial_h,), hidden_size, cell, direction, layout)
    return everything, last


OPS: dict[str, Handler] = {"GRU": gru, "LSTM": lstm, "RNN": rnn}
