"""Sums of token NLLs over spans, and the IFD of samples: launches segment_kernels.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .head import check_range
from .linear import on_device

OPTIONS: dict[str, Any] = {"BLOCK": 128, "num_warps": 1, "enable_fp_fusion": True}


class SampleSums(NamedTuple):
    """For S samples: sums float64 [S] in nats, counts int64 [S], and `ifd` float32 [S]."""

    sum_conditioned: torch.Tensor
    count_conditioned: torch.Tensor
    sum_alone: torch.Tensor
    count_alone: torch.Tensor
    ifd: torch.Tensor


def segment_nll(nll: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums, float64 [S], and counts, int64 [S], of nll[offsets[i] : offsets[i + 1]]; added in float64.

    `nll` is float32 [N], `offsets` int64 [S + 1], ascending, within 0 ... N; both are contiguous. Offsets outside are
    clamped to that range (with SCORER_KERNELS_DEBUG=1: IndexError); a span that ends before its start is empty.
    """
    from .segment_kernels import segment_kernel

    _check(nll, offsets)
    assert offsets.ndim == 1, f"offsets is [S + 1], not {tuple(offsets.shape)}"
    assert len(offsets) >= 1, "offsets is [S + 1], not empty"
    segments = len(offsets) - 1
    sums = torch.empty(segments, dtype=torch.float64, device=nll.device)
    counts = torch.empty(segments, dtype=torch.int64, device=nll.device)
    if segments:
        with on_device(nll):
            segment_kernel[(segments,)](nll, offsets, sums, counts, len(nll), **OPTIONS)
    return sums, counts


def sample_ifd(nll: torch.Tensor, conditioned: torch.Tensor, alone: torch.Tensor) -> SampleSums:
    """Each sample's sums and counts over its two spans, and IFD = exp(mean conditioned - mean alone).

    Source: Superfiltering, arXiv 2402.00530, equation 2. `nll` is float32 [N]; `conditioned` and `alone` are int64
    [S, 2], the start and end (exclusive) in `nll` of each sample's scored tokens, in any order; all are contiguous.
    Bounds outside `nll` are treated as in `segment_nll`. `ifd` is NaN where a count is 0, and infinite where the
    conditioned mean is over 88 nats above the other. A NaN among the tokens affects its own sample only.
    """
    from .segment_kernels import ifd_kernel

    for spans in (conditioned, alone):
        _check(nll, spans)
        assert spans.ndim == 2, f"spans are [S, 2], not {tuple(spans.shape)}"
        assert spans.shape == (len(conditioned), 2), f"spans are [{len(conditioned)}, 2], not {tuple(spans.shape)}"
    samples = len(conditioned)
    sums = torch.empty(2, samples, dtype=torch.float64, device=nll.device)
    counts = torch.empty(2, samples, dtype=torch.int64, device=nll.device)
    ifd = torch.empty(samples, dtype=torch.float32, device=nll.device)
    if samples:
        with on_device(nll):
            ifd_kernel[(samples,)](nll, conditioned, alone, sums, counts, ifd, len(nll), samples, **OPTIONS)
    return SampleSums(sums[0], counts[0], sums[1], counts[1], ifd)


def _check(nll: torch.Tensor, bounds: torch.Tensor) -> None:
    assert nll.ndim == 1, f"nll is [N], not {tuple(nll.shape)}"
    assert nll.dtype == torch.float32, f"nll is float32, not {nll.dtype}"
    assert bounds.dtype == torch.int64, f"offsets are int64, not {bounds.dtype}"
    assert bounds.device == nll.device, f"offsets are on {nll.device}, as nll is, not {bounds.device}"
    assert nll.is_contiguous(), "nll is contiguous"
    assert bounds.is_contiguous(), "offsets are contiguous"
    check_range("offsets", bounds, len(nll) + 1, f"the {len(nll)} tokens")
