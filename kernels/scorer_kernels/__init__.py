"""The language-model head and the sums after it, without ever writing logits: Triton on CUDA, blocked torch on CPU.

Depends on torch; Triton is imported when a CUDA tensor first needs it. Knows nothing of models, text or scores.
"""

from __future__ import annotations

from .head import nll_head

__all__ = ["nll_head"]
