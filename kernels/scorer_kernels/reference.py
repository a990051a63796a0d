"""The same functions in float64 torch, whole logits and a loop over spans: the oracle of the tests, on any device.

Knows no blocks, tiles or partials.
"""

from __future__ import annotations

from itertools import pairwise

import torch


def reference_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`nll_head` as its formula says, [N] of float64. With another `dtype`: what eager torch makes of it, in float32.

    Eager torch multiplies in `dtype` and does the rest in float32.
    """
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    x = (hidden.to(dtype) @ weight[:vocab_size].to(dtype).T).to(rest) * scale
    if bias is not None:
        x = x + bias[:vocab_size].to(rest)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return torch.logsumexp(x, 1) - x.gather(1, targets[:, None])[:, 0]


def reference_segment_nll(nll: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`segment_nll`, for ascending offsets within the tokens."""
    bounds = offsets.tolist()
    spans = list(pairwise(bounds))
    sums = [float(nll[start:end].double().sum()) for start, end in spans]
    return torch.tensor(sums, dtype=torch.float64), torch.tensor([end - start for start, end in spans])


def reference_ifd(nll: torch.Tensor, conditioned: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """The `ifd` of `sample_ifd`, in float64: a mean over no tokens is NaN, and so is what comes of it."""
    means = [[nll[start:end].double().mean() for start, end in spans.tolist()] for spans in (conditioned, alone)]
    return torch.tensor([torch.exp(c - a) for c, a in zip(*means, strict=True)], dtype=torch.float64)
