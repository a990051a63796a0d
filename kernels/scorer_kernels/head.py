"""One entry for whoever holds tensors: the device that they are on picks the path."""

from __future__ import annotations

import torch

from .blocked import blocked_nll, blocked_partials
from .linear import linear_nll, linear_nll_partials, merge_partials
from .segments import segment_nll


def nll_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """-log softmax(x)[target] in nats, x = softcap * tanh((scale * hidden @ weight.T + bias) / softcap).

    `hidden` [N, D] and `weight` [V, D] are float32, bfloat16 or float16, of one dtype; `targets` [N] is int64; `bias`
    [V] is of any of the three; all are on one device. `softcap` None leaves the tanh out. Rows of `weight` from
    `vocab_size` on are padding. Returns float32 [N], with sums in float32 or better.

    A target outside the vocabulary gives NaN; with SCORER_KERNELS_DEBUG=1 in the environment, IndexError. Wrong shapes,
    dtypes or devices raise AssertionError.
    """
    path = linear_nll if hidden.is_cuda else blocked_nll
    return path(hidden, weight, targets, bias=bias, scale=scale, softcap=softcap, vocab_size=vocab_size)


def nll_partials(
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
    """One slice's share of `nll_head`, float32 [3, N], for `merge_nll_partials`: what tensor parallel ranks exchange.

    `weight` and `bias` are words `vocab_start` and on of the vocabulary, of which `vocab_size` counts (all unless
    given); `targets` are of the whole vocabulary. The three are a shift (the largest logit on CUDA, the log of the sum
    on CPU), the sum of exp(logit - shift), and the target's logit, or NaN where the target is not in this slice.
    """
    path = linear_nll_partials if hidden.is_cuda else blocked_partials
    return path(
        hidden,
        weight,
        targets,
        bias=bias,
        scale=scale,
        softcap=softcap,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
    )


def merge_nll_partials(partials: torch.Tensor) -> torch.Tensor:
    """`nll_head`, float32 [N], of the stacked partials of all slices, float32 [P, 3, N]; NaN for a target of none."""
    if partials.is_cuda:
        return merge_partials(partials.contiguous())
    shift, total, target = partials.double().unbind(1)
    found = target.nan_to_num(nan=-torch.inf).amax(0)
    return ((shift + total.log()).logsumexp(0) - found).float().masked_fill_(target.isnan().all(0), torch.nan)


def nll_sums(nll: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums of float32 nll[offsets[i] : offsets[i + 1]], float64 [S], added in float64: the same bits every time.

    `offsets` is int64 [S + 1], ascending, from 0 to N. Triton's `segment_nll` on CUDA, torch on CPU.
    """
    if nll.is_cuda:
        return segment_nll(nll, offsets)[0]
    return torch.segment_reduce(nll.double(), "sum", offsets=offsets)
