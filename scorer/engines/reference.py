"""One sequence at a time with whole logits, as the published scripts do: slow, obvious, the oracle of the tests.

Runs transformers models of any architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from scorer.config import ScoreConfig
from scorer.engines.spans import BatchOutOfMemoryError, check_token_ids, convert_errors, oom_spans, with_sums
from scorer.models.find import ModelFiles
from scorer.models.load import load_causal_lm
from scorer.types import SpanNLL, TokenSequence


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

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """Yield the spans of each sequence, in order."""
        check_token_ids(sequences, self.model.get_input_embeddings().weight.shape[0])
        for sequence in sequences:
            try:
                with convert_errors():
                    spans = with_sums([sequence], self._sums(sequence))
            except BatchOutOfMemoryError:
                spans = oom_spans(sequence)
            yield spans

    @torch.inference_mode()
    def _sums(self, sequence: TokenSequence) -> list[float]:
        """The NLL sum of each span."""
        ids = torch.tensor([sequence.token_ids], device=self.model.device)
        logits = self.model(ids, use_cache=False).logits[0].float()
        sums = []
        for span in sequence.targets:
            log_probs = logits[span.start - 1 : span.end - 1].log_softmax(-1)
            chosen = log_probs.gather(-1, ids[0, span.start : span.end, None])
            sums.append(-float(chosen.double().sum()))
        return sums

    def close(self) -> None:
        """Free the model."""
        del self.model
