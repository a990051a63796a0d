"""One sequence at a time with whole logits, as the published scripts do: slow, obvious, the oracle of the tests.

Runs transformers models of any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from scorer.config import ScoreConfig
from scorer.engines.spans import (
    BatchOutOfMemoryError,
    check_token_ids,
    convert_errors,
    no_scores,
    oom_scores,
    with_sums,
)
from scorer.models.find import ModelFiles
from scorer.models.load import load_causal_lm
from scorer.tokens import Array, SpanScores, TokenBatch


class ReferenceEngine:
    """The contract of `scorer.engines.Engine`, by the plainest code."""

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        self.model = load_causal_lm(files, config, "eager")

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the scores of each sequence, in order."""
        for batch in batches:
            if batch is None:
                continue
            check_token_ids(batch, self.model.get_input_embeddings().weight.shape[0])
            if not len(batch):
                yield no_scores(batch)
            for sequence in range(len(batch)):
                one = np.array([sequence])
                try:
                    with convert_errors():
                        scores = with_sums(batch, batch.spans(one)[0], span_sums(self.model, batch, sequence))
                except BatchOutOfMemoryError:
                    scores = oom_scores(batch, one)
                yield scores

    def close(self) -> None:
        del self.model


@torch.inference_mode()
def span_sums(model: Any, batch: TokenBatch, sequence: int) -> Array:
    """The NLL sum of each span of a sequence, in nats: float64 [spans]."""
    ids = torch.from_numpy(batch.ids(sequence).astype(np.int64)).to(model.device)
    logits = model(ids[None], use_cache=False).logits[0].float()
    sums = []
    for start, end in batch.bounds(sequence):
        chosen = logits[start - 1 : end - 1].log_softmax(-1).gather(-1, ids[start:end, None])
        sums.append(-float(chosen.double().sum()))
    return np.array(sums)
