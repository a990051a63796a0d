"""Token NLLs of a language-model head without materialised logits, and their sums: Triton on CUDA, torch on CPU.

Depends on torch; Triton is imported by the first call that needs it. Knows nothing of models, text or scores.
"""

from __future__ import annotations

from .head import Head, HeadFunction
from .linear import linear_nll, linear_nll_partials, merge_partials
from .nll import merge_nll_partials, nll_head, nll_partials, nll_sums
from .segments import SampleSums, sample_ifd, segment_nll

__all__ = [
    "Head",
    "HeadFunction",
    "SampleSums",
    "linear_nll",
    "linear_nll_partials",
    "merge_nll_partials",
    "merge_partials",
    "nll_head",
    "nll_partials",
    "nll_sums",
    "sample_ifd",
    "segment_nll",
]
