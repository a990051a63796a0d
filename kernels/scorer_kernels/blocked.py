"""The head in plain torch, blocked over rows and vocabulary: what CPUs run, and the reference's fast twin.

A block of logits stays in the cache from its product to its sum of exponentials. It does not know of Triton.
"""

from __future__ import annotations

import torch

from .checks import check_head, check_targets

# Measured at (2048, 576, 49152), bfloat16, two cores with 1 MiB of L2 each: a product of many rows packs a block of
# the weight once, and 2048 x 512 logits, in bfloat16 and float32, still fit the caches. bench/NOTES.md has the others.
MAX_ROWS = 2048
BLOCK_LOGITS = 2048 * 512
MAX_WORDS = 8192


@torch.no_grad()
def blocked_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """What `nll_head` says, for tensors of any device."""
    words = check_head(hidden, weight, targets, bias, softcap, vocab_size)
    check_targets(targets, words)
    inside = targets.clamp(0, words - 1)
    total, exact = _total_and_target(hidden, weight[:words], inside, bias, scale, softcap)
    return (total - exact).float().masked_fill_(targets != inside, torch.nan)


@torch.no_grad()
def blocked_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
) -> torch.Tensor:
    """What `nll_partials` says, for tensors of any device; the shift is the log of the sum, which is then 1."""
    words = check_head(hidden, weight, targets, bias, softcap, vocab_size)
    own = targets - vocab_start
    inside = own.clamp(0, words - 1)
    total, exact = _total_and_target(hidden, weight[:words], inside, bias, scale, softcap)
    return torch.stack((total.float(), torch.ones_like(exact), exact.masked_fill_(own != inside, torch.nan)))


def _total_and_target(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    inside: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp of each row's logits, float64 [N], and the logits at `inside`, float32 [N]."""
    bias = None if bias is None else bias[: len(weight)].float()
    # The targets' logits by products of their own, since the block's may be rounded to bfloat16. They take their
    # places in the block too: a token that is all but certain then has an NLL near 0, and never below.
    exact = (hidden.float() * weight[inside].float()).sum(1)
    exact = _transform(exact, None if bias is None else bias[inside], scale, softcap)
    total = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    for rows in _even_slices(len(hidden), MAX_ROWS):
        total[rows] = _log_sum_exp(hidden[rows], weight, inside[rows], exact[rows], bias, scale, softcap, online=False)
    # A logit more than 88 above the first block's overflowed, or that block was -inf throughout.
    if len(again := (~total.isfinite()).nonzero()[:, 0]):
        for rows in _even_slices(len(again), MAX_ROWS):
            part = again[rows]
            total[part] = _log_sum_exp(
                hidden[part], weight, inside[part], exact[part], bias, scale, softcap, online=True
            )
    return total, exact


def _log_sum_exp(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    exact: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    online: bool,
) -> torch.Tensor:
    """log Σ exp of each row's logits, float64[R], with `exact` [R] in the place of the logits at `targets` [R].

    The exponentials and their sums over a block are float32.
    `online` shifts each block by the largest logit so far. Otherwise the first block's largest shifts all of them, one
    pass less; the result is right where it is finite, since float32 sums up to exp(88) and the shift is a term.
    """
    rows, words = len(hidden), len(weight)
    block = min(max(BLOCK_LOGITS // rows, 1), MAX_WORDS, words)
    product = torch.empty(rows * block, dtype=hidden.dtype, device=hidden.device)
    single = product if hidden.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
    total = torch.zeros(rows, 1, dtype=torch.float64, device=hidden.device)
    shift = torch.full((rows, 1), -torch.inf, device=hidden.device)
    ordered, order = targets.sort()
    bounds = torch.searchsorted(ordered, torch.arange(0, words + block, block, device=ordered.device)).tolist()
    for i, start in enumerate(range(0, words, block)):
        end = min(start + block, words)
        size = rows * (end - start)
        logits = torch.mm(hidden, weight[start:end].T, out=product[:size].view(rows, -1))
        x = single[:size].view(rows, -1)
        if x.dtype != logits.dtype:
            x.copy_(logits)
        _transform(x, None if bias is None else bias[start:end], scale, softcap)
        if (here := slice(bounds[i], bounds[i + 1])).start < here.stop:
            x[order[here], ordered[here] - start] = exact[order[here]]
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


def _transform(x: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None) -> torch.Tensor:
    """In place, softcap * tanh((scale * x + bias) / softcap)."""
    if scale != 1.0:
        x.mul_(scale)
    if bias is not None:
        x.add_(bias)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


def _even_slices(length: int, longest: int) -> list[slice]:
    """`length` in the fewest slices that are at most `longest`, and as even as may be."""
    parts = -(-length // longest)
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]
