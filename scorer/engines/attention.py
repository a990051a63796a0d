"""Causal attention over sequences packed end to end: variable-length, with no padded token in the model.

Registered with transformers under ATTENTION, which is no mask function there, so that no mask is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION = "scorer_varlen"

# On CPU, plain batched products beat torch's fused attention up to these lengths; beyond, the fused one, which skips
# the masked half, wins. Measured on AMD EPYC with AVX512-BF16, 9 heads of 64.
MAX_PLAIN_LENGTH = {torch.bfloat16: 384, torch.float16: 384, torch.float32: 48}
# Sequences whose lengths differ by at most this factor share one product, padded to the longest of them.
GROUP_RATIO = 1.15


class Group:
    """Neighbouring sequences of similar length: tokens `start` to `start + sum(lengths)`, `lengths` descending."""

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device):
        self.start, self.end = start, start + sum(lengths)
        self.count, self.length = len(lengths), lengths[0]
        self.device = device
        sizes = torch.tensor(lengths)
        positions = torch.arange(self.length)
        starts = start + sizes.cumsum(0) - sizes
        # Padding repeats the sequence's own last token. Another sequence's would not do, though causality masks it: it
        # is multiplied by 0, and 0 * NaN is NaN.
        self.tokens = starts[:, None] + torch.minimum(positions, sizes[:, None] - 1)  # [count, length]
        self.is_token = positions < sizes[:, None]  # [count, length]
        self._pad: dict[int, torch.Tensor] = {}  # by number of heads; the layers of a model share them
        self._unpad: dict[int, torch.Tensor] = {}

    def pad_index(self, heads: int) -> torch.Tensor:
        """Rows of a packed [T * heads, d] matrix in the padded order [count, heads, length]."""
        if heads not in self._pad:
            rows = self.tokens[:, None] * heads + torch.arange(heads)[:, None]
            self._pad[heads] = rows.flatten().to(self.device)
        return self._pad[heads]

    def unpad_index(self, heads: int) -> torch.Tensor:
        """Rows of a padded [count * heads * length, d] matrix in the packed order [tokens of the group, heads]."""
        if heads not in self._unpad:
            sequence, position = self.is_token.nonzero(as_tuple=True)
            rows = (sequence[:, None] * heads + torch.arange(heads)) * self.length + position[:, None]
            self._unpad[heads] = rows.flatten().to(self.device)
        return self._unpad[heads]


class Layout:
    """The bounds of each sequence in a batch; `lengths` are descending.

    The CUDA kernel reads `offsets` (int32 [sequences + 1]); it needs 16-bit numbers and sm_80. All else runs over
    `groups`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype):
        self.longest = lengths[0]
        self.offsets: torch.Tensor | None = None
        self.groups: list[Group] = []
        if device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0):
            self.offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32, non_blocking=True)
            return
        first = start = 0
        while first < len(lengths):
            last = first + 1
            while last < len(lengths) and lengths[last] * GROUP_RATIO >= lengths[first]:
                last += 1
            self.groups.append(Group(start, lengths[first:last], device))
            start, first = self.groups[-1].end, last


def varlen_attention(  # noqa: PLR0913 (transformers calls it)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scorer_layout: Layout,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d]."""
    _, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d], mostly contiguous already
    if scorer_layout.offsets is not None:
        return _cuda_attention(q, k, v, scorer_layout.offsets, scorer_layout.longest, scale)[None], None
    q, k, v = (x.contiguous() for x in (q, k, v))
    output = q.new_empty(tokens * heads, width)
    for group in scorer_layout.groups:
        mixed = _group_attention(q, k, v, group, scale)
        torch.index_select(mixed, 0, group.unpad_index(heads), out=output[group.start * heads : group.end * heads])
    return output.view(1, tokens, heads, width), None


def _cuda_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d] -> [T, H, d], by torch's FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    output = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(output, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
    return output


def _group_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, scale: float
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d], contiguous -> [count * H * length, d]."""
    (_, heads, width), kv_heads = query.shape, key.shape[1]
    count, length = group.count, group.length
    q = query.view(-1, width).index_select(0, group.pad_index(heads))
    k, v = (x.view(-1, width).index_select(0, group.pad_index(kv_heads)) for x in (key, value))
    if length > MAX_PLAIN_LENGTH[query.dtype]:
        q, k, v = (x.view(count, -1, length, width) for x in (q, k, v))
        grouped = heads != kv_heads
        if grouped and q.is_cuda:  # there, in float32, enable_gqa takes the path that materialises all scores
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            grouped = False
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return mixed.reshape(-1, width)
    repeats = heads // kv_heads  # query heads that share a key head are rows of one product
    q = q.view(count * kv_heads, repeats * length, width)
    k, v = (x.view(count * kv_heads, length, width) for x in (k, v))
    scores = torch.baddbmm(_causal_mask(length, repeats, q.dtype, q.device), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(-1, width)


@lru_cache(maxsize=512)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[repeats * length, length]: 0 where a query attends, -inf where it does not."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1).repeat(repeats, 1)


AttentionInterface.register(ATTENTION, varlen_attention)
