"""Causal attention over sequences packed end to end: variable-length, with no padded token in the model.

Registered with transformers under ATTENTION, which is no mask function there, so that no mask is ever built.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface

from scorer.faults import one_line
from scorer.types import ScorerError

ATTENTION = "scorer_varlen"

# On CPU, plain batched products beat torch's fused attention up to these lengths; beyond, the fused one, which skips
# the masked half, wins. Measured on AMD EPYC with AVX512-BF16, 9 heads of 64.
MAX_PLAIN_LENGTH = {torch.bfloat16: 384, torch.float16: 384, torch.float32: 48}
# Sequences whose lengths differ by at most this factor share one product, padded to the longest of them.
GROUP_RATIO = 1.15
MAX_FLASH_WIDTH = 256  # of a head, in FlashAttention 2 and 3
FLASH_ATTENTION_3 = "flash_attn_interface"  # the module of its package
TORCH_GROUPS_HEADS = torch.__version__ >= "2.12"  # varlen_attn takes fewer key heads than query heads
# What layers hand over beside what varlen_attention names: for training, and copies of what the model has applied.
WITHOUT_EFFECT = ("dropout", "position_ids", "output_attentions", "use_cache")


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

    FlashAttention reads `offsets` (int32 [sequences + 1]); it needs 16-bit numbers and sm_80. All else runs over
    `groups`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, dtype: torch.dtype):
        self.lengths, self.longest, self.device = lengths, lengths[0], device
        self.offsets: torch.Tensor | None = None
        if device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0):
            offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
            self.offsets = offsets.pin_memory().to(device, non_blocking=True)

    @cached_property
    def groups(self) -> list[Group]:
        """The batch as groups of similar length."""
        groups: list[Group] = []
        first = start = 0
        while first < len(self.lengths):
            last = first + 1
            while last < len(self.lengths) and self.lengths[last] * GROUP_RATIO >= self.lengths[first]:
                last += 1
            groups.append(Group(start, self.lengths[first:last], self.device))
            start, first = groups[-1].end, last
        return groups


class _Current(threading.local):
    layout: Layout


_current = _Current()


@contextmanager
def attention_over(layout: Layout) -> Iterator[None]:
    """Within, `varlen_attention` runs over the sequences of `layout`, in this thread."""
    _current.layout = layout
    try:
        yield
    finally:
        del _current.layout


class Variant(NamedTuple):
    """How a layer's attention differs from the plain one."""

    scale: float
    window: int | None  # a token attends to itself and to `window - 1` before it
    softcap: float | None  # scores become softcap * tanh(score / softcap)
    sinks: torch.Tensor | None  # [H]: a score more for each head, which takes its share and has no value


def varlen_attention(  # noqa: PLR0913 (transformers calls it)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d].

    Raises ScorerError where a layer asks for what is not implemented here.
    """
    if attention_mask is not None:
        raise ScorerError("its attention has a mask of its own")
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ScorerError("its attention is not causal")
    if unknown := sorted(name for name, given in others.items() if given is not None and name not in WITHOUT_EFFECT):
        raise ScorerError(f"its attention takes {', '.join(unknown)}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d], mostly contiguous already
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(q, k, v, scale, sliding_window, softcap, s_aux)[None], None


# An operator of torch, so that a compiled block calls it as it is: how the sequences lie differs from batch to batch.
@torch.library.custom_op("scorer::attend", mutates_args=())
def _attend(  # noqa: PLR0913 (an operator takes no objects)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d] -> [T, H, d], contiguous."""
    layout, variant = _current.layout, Variant(scale, window, softcap, sinks)
    if layout.offsets is not None and softcap is None and sinks is None and query.shape[-1] <= MAX_FLASH_WIDTH:
        return _flash_attention(query, key, value, layout, variant)
    return _grouped_attention(query, key, value, layout, variant)


@_attend.register_fake
def _(query: torch.Tensor, *_others: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, variant: Variant
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d] -> [T, H, d], by torch's FlashAttention on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    window = variant.window if variant.window is not None and variant.window < layout.longest else 0
    options: dict[str, Any] = {"scale": variant.scale, "window_size": (window - 1, 0)}  # -1: no limit
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        if TORCH_GROUPS_HEADS:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    offsets, longest = layout.offsets, layout.longest
    assert offsets is not None
    output = varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)
    assert isinstance(output, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
    return output


def activate_flash_attention_3() -> bool:
    """Whether torch computes `_flash_attention` by FlashAttention 3 from here on: if its package is installed.

    For sm_90 only. A package that does not load is left out, and a line says why.
    """
    if find_spec(FLASH_ATTENTION_3) is None:
        return False
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        _tell_of_flash_attention_3(one_line(error))
        return False
    return True


def restore_flash_attention_2(reason: str) -> None:
    """Undo `activate_flash_attention_3`, and say why."""
    from torch.nn.attention import restore_flash_attention_impl

    restore_flash_attention_impl()
    _tell_of_flash_attention_3(reason)


def _tell_of_flash_attention_3(reason: str) -> None:
    logging.getLogger(__name__).warning(f"FlashAttention 3 is installed and not used: {reason}")


def _grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, variant: Variant
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d] -> [T, H, d]."""
    q, k, v = (x.contiguous() for x in (query, key, value))
    tokens, heads, width = q.shape
    output = q.new_empty(tokens * heads, width)
    for group in layout.groups:
        mixed = _group_attention(q, k, v, group, variant)
        torch.index_select(mixed, 0, group.unpad_index(heads), out=output[group.start * heads : group.end * heads])
    return output.view(tokens, heads, width)


def _group_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, variant: Variant
) -> torch.Tensor:
    """query [T, H, d], key and value [T, Hk, d], contiguous -> [count * H * length, d]."""
    (_, heads, width), kv_heads = query.shape, key.shape[1]
    count, length = group.count, group.length
    window = None if variant.window is None or variant.window >= length else variant.window
    q = query.view(-1, width).index_select(0, group.pad_index(heads))
    k, v = (x.view(-1, width).index_select(0, group.pad_index(kv_heads)) for x in (key, value))
    if length > MAX_PLAIN_LENGTH[query.dtype] and variant.softcap is None and variant.sinks is None:
        q, k, v = (x.view(count, -1, length, width) for x in (q, k, v))
        grouped = heads != kv_heads
        if grouped and q.is_cuda:  # there, in float32, enable_gqa takes the path that materialises all scores
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            grouped = False
        mask = None if window is None else _causal_mask(length, window, q.dtype, q.device)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=variant.scale, enable_gqa=grouped
        )
        return mixed.reshape(-1, width)
    repeats = heads // kv_heads  # query heads that share a key head are rows of one product
    q = q.view(count * kv_heads, repeats * length, width)
    k, v = (x.view(count * kv_heads, length, width) for x in (k, v))
    # Those of longer sequences, which soft caps and sinks bring here, would fill the memory.
    masks = _cached_mask if length <= MAX_PLAIN_LENGTH[q.dtype] else _repeated_mask
    mask = masks(length, window, repeats, q.dtype, q.device)
    if variant.softcap is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=variant.scale)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(variant.scale / variant.softcap)
        scores = scores.tanh_().mul_(variant.softcap).add_(mask)
    if variant.sinks is not None:
        sinks = variant.sinks.to(scores.dtype).repeat_interleave(length).view(1, kv_heads, -1, 1)
        scores = torch.cat((scores, sinks.expand(count, -1, -1, -1).flatten(0, 1)), -1)
    return torch.bmm(scores.softmax(-1)[..., :length], v).view(-1, width)


def _repeated_mask(
    length: int, window: int | None, repeats: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[repeats * length, length]: `_causal_mask` for query heads that share a key head."""
    return _causal_mask(length, window, dtype, device).repeat(repeats, 1)


_cached_mask = lru_cache(maxsize=512)(_repeated_mask)


def _causal_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[length, length]: 0 where a query attends, -inf where it does not."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)
    if window is not None:
        mask += torch.full_like(mask, float("-inf")).tril_(-window)
    return mask


AttentionInterface.register(ATTENTION, varlen_attention)
