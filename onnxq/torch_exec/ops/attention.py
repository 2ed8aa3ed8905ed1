"""Attention and what comes with it."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.activation import swish


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, steps, count d] as [batch, count, steps, d]; four axes stay as they are."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _allowed(queries: int, keys: int, offset: Tensor, causal: bool, left: int, right: int) -> Tensor:
    """Which keys a query may see, bool [1 or batch, 1, queries, keys]: query i stands at the place offset + i."""
    rows = torch.arange(queries, device=offset.device).unsqueeze(1) + offset.reshape(-1, 1, 1, 1)
    behind = rows - torch.arange(keys, device=offset.device)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        seen = seen & (behind >= 0)
    if left >= 0:
        seen = seen & (behind <= left)
    if right >= 0:
        seen = seen & (-behind <= right)
    return seen


def _as_bias(mask: Tensor | None, keys: int, like: Tensor) -> Tensor:
    """A mask (bool: may be seen; else what is added) as what is added; keys that it leaves out are not seen."""
    if mask is None:
        return torch.zeros(1, keys, dtype=like.dtype, device=like.device)
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)
    return F.pad(mask, [0, keys - mask.shape[-1]], value=-torch.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    /,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    left_window_size: int = -1,
    q_num_heads: int = 0,
    qk_matmul_output_mode: Literal[0, 1, 2, 3] = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(softcap tanh(scale q k' / softcap) + bias) v for each head; a query that sees no key gives 0.

    Inputs are [batch, heads, steps, d] or [batch, steps, heads d]; fewer heads of keys than of queries are repeated.
    Outputs: the result in the layout of `q`; keys and values with the past ones in front; and the scores, as they are
    (mode 0), capped (1), with the bias (2) or as weights (3).
    """
    flat = q.ndim == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    offset = torch.zeros(1, dtype=torch.int64, device=q.device)
    if nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - q.shape[2]
    if past_key is not None and past_value is not None:
        offset = offset + past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    keys, values = k, v
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    factor = math.sqrt(scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    scores = (q * factor) @ (k * factor).transpose(2, 3)
    capped = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
    bias = _as_bias(attn_mask, k.shape[2], q)
    seen = _allowed(q.shape[2], k.shape[2], offset, bool(is_causal), left_window_size, right_window_size)
    if nonpad_kv_seqlen is not None:
        ends = nonpad_kv_seqlen.reshape(-1, 1, 1, 1)
        seen = seen & (torch.arange(k.shape[2], device=q.device) < ends)
    bias = bias.masked_fill(~seen, -torch.inf)
    blind = bias.amax(-1, keepdim=True) == -torch.inf
    logits = capped + bias.masked_fill(blind, 0.0)
    weights = torch.softmax(logits, -1, dtype=softmax_precision).masked_fill(blind, 0.0).to(q.dtype)
    made = weights @ v
    shown = (scores, capped, capped + bias, weights)[qk_matmul_output_mode]
    return made.transpose(1, 2).flatten(2) if flat else made, keys, values, shown


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    /,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn pairs of the first `rotary_embedding_dim` (0: all) numbers of each head by the angle of their place.

    `x` is [batch, heads, steps, d] or [batch, steps, heads d]. A pair is two neighbours when `interleaved`, else one
    number of each half. `cos` and `sin` are [batch, steps, pairs] or, with `positions`, [places, pairs].
    """
    heads = _heads(x, num_heads)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = rotary_embedding_dim or heads.shape[-1]
    pairs, rest = heads[..., :turned], heads[..., turned:]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    joined = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    made = torch.cat([joined, rest], -1)
    return made.transpose(1, 2).flatten(2) if x.ndim == 3 else made


def swi_glu(a: Tensor, b: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """A sigmoid(alpha a) b."""
    return swish(a, alpha=alpha) * b


OPS: dict[str, Handler] = {"Attention": attention, "RotaryEmbedding": rotary_embedding, "SwiGLU": swi_glu}
