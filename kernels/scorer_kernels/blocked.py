"""The head in plain torch, blocked over rows and vocabulary: what runs on CPU.

A block of logits stays in the cache from its product to its sum of exponentials.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .head import Head

# Measured at (2048, 576, 49152), bfloat16, two cores with 1 MiB of L2 each: a product of many rows packs a block of
# the weight once, and 2048 x 512 logits, in bfloat16 and float32, still fit the caches. bench/NOTES.md has the others.
MAX_BLOCK_ROWS = 2048
MAX_BLOCK_LOGITS = 2048 * 512
MAX_BLOCK_VOCAB = 8192


@torch.no_grad()
def blocked_nll(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """`nll_head` in torch, on any device."""
    head.check(hidden, targets)
    head.check_whole(targets)
    inside = targets.clamp(0, head.size - 1)
    total, target_logits = _log_sum_exp(hidden, head, inside)
    return (total - target_logits).float().masked_fill_(targets != inside, torch.nan)


@torch.no_grad()
def blocked_partials(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """`nll_partials` in torch, on any device; the shift is the log of the sum, and the sum is then 1."""
    head.check(hidden, targets)
    rows = targets - head.vocab_start
    inside = rows.clamp(0, head.size - 1)
    total, logits = _log_sum_exp(hidden, head, inside)
    return torch.stack((total.float(), torch.ones_like(logits), logits.masked_fill_(rows != inside, torch.nan)))


def _log_sum_exp(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp of each row's logits, float64 [N], and the logits of `targets`, float32 [N]."""
    weight, bias = head.weight[: head.size], None if head.bias is None else head.bias[: head.size].float()
    head = replace(head, weight=weight, bias=bias, vocab_size=None)
    # The targets' logits come from products of their own, since those of a block may be rounded to bfloat16. They also
    # replace the block's: the NLL of a token that is all but certain is then near 0, and never below.
    logits = (hidden.float() * weight[targets].float()).sum(1)
    logits = _transform(logits, head, None if bias is None else bias[targets])
    total = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    for rows in _even_slices(len(hidden), MAX_BLOCK_ROWS):
        total[rows] = _log_sum_exp_rows(hidden[rows], head, targets[rows], logits[rows], online=False)
    # A logit more than 88 above the first block's overflowed, or that block was -inf throughout.
    if len(again := (~total.isfinite()).nonzero()[:, 0]):
        for part in _even_slices(len(again), MAX_BLOCK_ROWS):
            i = again[part]
            total[i] = _log_sum_exp_rows(hidden[i], head, targets[i], logits[i], online=True)
    return total, logits


def _log_sum_exp_rows(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, target_logits: torch.Tensor, *, online: bool
) -> torch.Tensor:
    """log Σ exp of each row's logits, float64 [R], with `target_logits` [R] in place of those at `targets` [R].

    The exponentials and their sums over a block are float32.
    `online` shifts each block by the largest logit so far. Otherwise the first block's largest shifts all of them, one
    pass less; the result is right where it is finite, since float32 sums up to exp(88) and the shift is a term.
    """
    rows, vocab_size = len(hidden), head.size
    block = min(max(MAX_BLOCK_LOGITS // rows, 1), MAX_BLOCK_VOCAB, vocab_size)
    product = torch.empty(rows * block, dtype=hidden.dtype, device=hidden.device)
    single = product if hidden.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
    total = torch.zeros(rows, 1, dtype=torch.float64, device=hidden.device)
    shift = torch.full((rows, 1), -torch.inf, device=hidden.device)
    ordered, order = targets.sort()
    bounds = torch.searchsorted(ordered, torch.arange(0, vocab_size + block, block, device=ordered.device)).tolist()
    for i, start in enumerate(range(0, vocab_size, block)):
        end = min(start + block, vocab_size)
        size = rows * (end - start)
        logits = torch.mm(hidden, head.weight[start:end].T, out=product[:size].view(rows, -1))
        x = single[:size].view(rows, -1)
        if x.dtype != logits.dtype:
            x.copy_(logits)
        _transform(x, head, None if head.bias is None else head.bias[start:end])
        if (here := slice(bounds[i], bounds[i + 1])).start < here.stop:
            x[order[here], ordered[here] - start] = target_logits[order[here]]
        if online:
            higher = torch.maximum(shift, x.amax(1, keepdim=True))
            total.mul_((shift - higher).exp_().nan_to_num_(nan=1.0))  # -inf less -inf: nothing was summed yet
            shift = higher
            x.sub_(shift.masked_fill(shift == -torch.inf, 0.0))
        else:
            if start == 0:
                shift = x.amax(1, keepdim=True)
            x.sub_(shift)
        total.add_(x.exp_().sum(1, keepdim=True))
    return (total.log_() + shift)[:, 0]


def _transform(x: torch.Tensor, head: Head, bias: torch.Tensor | None) -> torch.Tensor:
    """In place, softcap * tanh((scale * x + bias) / softcap), with the part of the bias that belongs to `x`."""
    if head.scale != 1.0:
        x.mul_(head.scale)
    if bias is not None:
        x.add_(bias)
    if head.softcap is not None:
        x.div_(head.softcap).tanh_().mul_(head.softcap)
    return x


def _even_slices(length: int, longest: int) -> list[slice]:
    """The fewest slices of at most `longest` that cover `length`, as even as possible."""
    parts = -(-length // longest)
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]
