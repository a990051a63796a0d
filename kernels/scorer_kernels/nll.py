"""The entry points: the device of the tensors picks Triton or blocked torch."""

from __future__ import annotations

import torch

from .blocked import blocked_nll, blocked_partials
from .head import Head
from .linear import linear_nll, linear_nll_partials, merge_partials
from .segments import segment_nll


def nll_head(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target after its hidden state, float32 [N] in nats. `Head` has the formula and the contract."""
    return linear_nll(hidden, head, targets) if hidden.is_cuda else blocked_nll(hidden, head, targets)


def nll_partials(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """The share of `nll_head` of one slice of the vocabulary, float32 [3, N]: what tensor parallel ranks exchange.

    The three are a shift (the largest logit on CUDA, the log of the sum on CPU), the sum of exp(logit - shift), and the
    target's logit, or NaN where the slice does not hold the target. `merge_nll_partials` merges the slices.
    """
    return linear_nll_partials(hidden, head, targets) if hidden.is_cuda else blocked_partials(hidden, head, targets)


def merge_nll_partials(partials: torch.Tensor) -> torch.Tensor:
    """NLLs, float32 [N], from the stacked partials of all slices, float32 [P, 3, N].

    A target that no slice holds gives NaN.
    """
    if partials.is_cuda:
        return merge_partials(partials.contiguous())
    shift, total, target = partials.double().unbind(1)
    found = target.nan_to_num(nan=-torch.inf).amax(0)
    return ((shift + total.log()).logsumexp(0) - found).float().masked_fill_(target.isnan().all(0), torch.nan)


def nll_sums(nll: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums of float32 nll[offsets[i] : offsets[i + 1]], float64 [S], added in float64: the same bits every time.

    `offsets` is int64 [S + 1], ascending, from 0 to N.
    """
    if nll.is_cuda:
        return segment_nll(nll, offsets)[0]
    return torch.segment_reduce(nll.double(), "sum", offsets=offsets)
