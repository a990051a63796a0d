"""Causal attention over sequences that lie end to end in one row: variable-length, with no mask and no padding.

Registered with transformers under NAME, which is no mask function there, so that no mask is ever built. Knows
tensors and lengths; nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

NAME = "scorer_varlen"

# Plain batched products beat torch's fused CPU attention up to these lengths (measured on AMD EPYC with AVX512-BF16,
# 9 heads of 64); beyond, the fused one, which skips the masked half, wins.
PLAIN_LENGTH = {torch.bfloat16: 384, torch.float16: 384, torch.float32: 48}
# Sequences whose lengths differ by at most this factor share a padded product on CPU.
GROUP_RATIO = 1.15


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each sequence lies, in one of two forms: `offsets` for the CUDA kernel, `groups` for everything else."""

    groups: list[Group] = field(default_factory=list)
    offsets: torch.Tensor | None = None  # int32 [sequences + 1]
    longest: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring sequences of like length: tokens `start` to `end`, `count` sequences padded to `length`.

    `gather` [count * length] names the token of each padded place (any token where there is none: causality keeps
    what follows a sequence out of it); `scatter` [end - start] names the padded place of each token. Both are None
    where all lengths are equal.
    """

    start: int
    end: int
    count: int
    length: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None


def layout(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Layout:
    """The layout of sequences of descending `lengths` laid end to end. The CUDA kernel takes 16-bit numbers only."""
    if device.type == "cuda" and dtype != torch.float32:
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
        return Layout(offsets=offsets.to(device, non_blocking=True), longest=lengths[0])
    groups = []
    first = start = 0
    while first < len(lengths):
        length = lengths[first]
        last = first + 1
        while last < len(lengths) and lengths[last] * GROUP_RATIO >= length:
            last += 1
        groups.append(_group(start, lengths[first:last], device))
        start, first = groups[-1].end, last
    return Layout(groups=groups)


def _group(start: int, lengths: tuple[int, ...], device: torch.device) -> Group:
    count, length, end = len(lengths), lengths[0], start + sum(lengths)
    if lengths[-1] == length:
        return Group(start, end, count, length, None, None)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(length)
    gather = (starts[:, None] + places).clamp_(max=end - start - 1).flatten()
    scatter = (torch.arange(count)[:, None] * length + places)[places < sizes[:, None]]
    return Group(start, end, count, length, gather.to(device), scatter.to(device))


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scorer_layout: Layout,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if scorer_layout.offsets is not None:
        return _cuda_attention(query, key, value, scorer_layout, scale), None
    output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    for group in scorer_layout.groups:
        output[0, group.start : group.end] = _group_attention(query[0], key[0], value[0], group, scale)
    return output, None


def _cuda_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert layout.offsets is not None
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    output = varlen_attn(
        q, k, v, layout.offsets, layout.offsets, layout.longest, layout.longest, scale=scale, window_size=(-1, 0)
    )
    assert isinstance(output, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
    return output[None]


def _group_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, scale: float
) -> torch.Tensor:
    """One group: query [H, T, d], key and value [Hk, T, d] -> [tokens of the group, H, d]."""
    heads, _, width = query.shape
    kv_heads = key.shape[0]
    count, length = group.count, group.length

    def padded(x: torch.Tensor) -> torch.Tensor:  # [h, T, d] -> [h, count, length, d]
        x = x[:, group.start : group.end]
        return (x if group.gather is None else x[:, group.gather]).reshape(-1, count, length, width)

    q, k, v = padded(query), padded(key), padded(value)
    if length > PLAIN_LENGTH[query.dtype]:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        mixed = mixed.permute(0, 2, 1, 3)  # [count, length, H, d]
    else:
        repeats = heads // kv_heads  # query heads that share a key head are rows of one product
        q = q.view(kv_heads, repeats, count, length, width).permute(0, 2, 1, 3, 4)
        q = q.reshape(kv_heads * count, repeats * length, width)
        k, v = (x.reshape(kv_heads * count, length, width) for x in (k, v))
        scores = torch.baddbmm(_causal_mask(length, repeats, q.dtype, q.device), q, k.transpose(1, 2), alpha=scale)
        mixed = torch.bmm(scores.softmax(-1), v).view(kv_heads, count, repeats, length, width)
        mixed = mixed.permute(1, 3, 0, 2, 4)  # [count, length, Hk, repeats, d]
    mixed = mixed.reshape(count * length, heads, width)
    return mixed if group.scatter is None else mixed[group.scatter]


@lru_cache(maxsize=512)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[repeats * length, length]: 0 where a query may look, -inf where it may not."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1).repeat(repeats, 1)


AttentionInterface.register(NAME, varlen_attention)
