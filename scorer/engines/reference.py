"""One sequence at a time, whole logits, as the published scripts do: slow, obvious, the oracle of every test.

Knows transformers models of any architecture; nothing of batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from scorer.config import ScoreConfig
from scorer.models import ModelFiles, load_causal_lm
from scorer.types import RowStatus, SpanNLL, TokenSequence


class ReferenceEngine:
    """The contract of `scorer.engines.Engine`, by the plainest code."""

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        self.model = load_causal_lm(
            files,
            dtype=config.dtype,
            device=config.device,
            attn_implementation="eager",
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The spans of one sequence at a time, in order."""
        for sequence in sequences:
            yield self._score_one(sequence)

    def _score_one(self, sequence: TokenSequence) -> list[SpanNLL]:
        ids = torch.tensor([sequence.token_ids], device=self.model.device)
        try:
            logits = self.model(ids, use_cache=False).logits[0].float()
        except torch.OutOfMemoryError:
            return [
                SpanNLL(sequence.record_id, span.turn, sequence.view, None, span.end - span.start, RowStatus.OOM)
                for span in sequence.targets
            ]
        spans = []
        for span in sequence.targets:
            log_probs = logits[span.start - 1 : span.end - 1].log_softmax(-1)
            chosen = log_probs.gather(-1, ids[0, span.start : span.end, None])
            nll = -float(chosen.double().sum())
            finite = math.isfinite(nll)
            status = RowStatus.OK if finite else RowStatus.NON_FINITE
            total = nll if finite else None
            spans.append(SpanNLL(sequence.record_id, span.turn, sequence.view, total, span.end - span.start, status))
        return spans

    def close(self) -> None:
        """Free the model."""
        del self.model
