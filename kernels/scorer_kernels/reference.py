"""Float64 references in torch: whole logits, and a loop over spans. They are the tests' oracle, on any device."""

from __future__ import annotations

from itertools import pairwise

import torch

from .head import Head


def reference_nll(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`nll_head` by its formula, float64 [N].

    Another `dtype` gives the error of eager torch: the product in `dtype`, the rest in float32; float32 [N].
    """
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    x = (hidden.to(dtype) @ head.weight[: head.size].to(dtype).T).to(rest) * head.scale
    if head.bias is not None:
        x = x + head.bias[: head.size].to(rest)
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    return torch.logsumexp(x, 1) - x.gather(1, targets[:, None])[:, 0]


def reference_segment_nll(nll: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`segment_nll`, for ascending offsets within the tokens."""
    spans = list(pairwise(offsets.tolist()))
    sums = [float(nll[start:end].double().sum()) for start, end in spans]
    return torch.tensor(sums, dtype=torch.float64), torch.tensor([end - start for start, end in spans])


def reference_ifd(nll: torch.Tensor, conditioned: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """The `ifd` of `sample_ifd`, float64 [S]; NaN where a span is empty."""
    means = [[nll[start:end].double().mean() for start, end in spans.tolist()] for spans in (conditioned, alone)]
    return torch.tensor([torch.exp(c - a) for c, a in zip(*means, strict=True)], dtype=torch.float64)
