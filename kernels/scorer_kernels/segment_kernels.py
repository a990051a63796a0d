# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"
"""Sums of token NLLs over spans, in Triton; segments.py launches them.

One program sums a span from its start to its end, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _span_sum(nll, start, end, tokens, BLOCK: tl.constexpr):
    """Sum, float64, and count of nll[start:end], with the bounds clamped to 0 ... tokens."""
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.maximum(tl.minimum(end, tokens), start)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(start, end, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        total += tl.load(nll + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0), end - start


@triton.jit(do_not_specialize=["tokens"])
def segment_kernel(nll, offsets, sums, counts, tokens, BLOCK: tl.constexpr):
    """Program i sums and counts segment i."""
    i = tl.program_id(0)
    total, count = _span_sum(nll, tl.load(offsets + i), tl.load(offsets + i + 1), tokens, BLOCK)
    tl.store(sums + i, total)
    tl.store(counts + i, count)


@triton.jit(do_not_specialize=["tokens", "samples"])
def ifd_kernel(nll, conditioned, alone, sums, counts, ifd, tokens, samples, BLOCK: tl.constexpr):
    """Program i computes sample i: sums and counts [2, samples] of its conditioned and alone spans, and its IFD."""
    i = tl.program_id(0).to(tl.int64)
    total_c, count_c = _span_sum(nll, tl.load(conditioned + 2 * i), tl.load(conditioned + 2 * i + 1), tokens, BLOCK)
    total_a, count_a = _span_sum(nll, tl.load(alone + 2 * i), tl.load(alone + 2 * i + 1), tokens, BLOCK)
    tl.store(sums + i, total_c)
    tl.store(sums + samples + i, total_a)
    tl.store(counts + i, count_c)
    tl.store(counts + samples + i, count_a)
    scored = (count_c > 0) & (count_a > 0)
    # The difference cancels, so it is float64; the result is float32, and so is exp.
    mean_c = total_c / tl.maximum(count_c, 1).to(tl.float64)
    mean_a = total_a / tl.maximum(count_a, 1).to(tl.float64)
    ratio = tl.exp((mean_c - mean_a).to(tl.float32))
    tl.store(ifd + i, tl.where(scored, ratio, float("nan")))
