"""The rows that engines are timed on (an encoded dataset, or random tokens of its lengths), and their timing."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from scorer.config import DEFAULT_MODEL
from scorer.data.dataset import Dataset
from scorer.data.encode import Encoder
from scorer.engines import Engine
from scorer.engines.choose import CONTEXT_KEYS
from scorer.models.find import ModelFiles, model_settings
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.scores.measures import score_table
from scorer.types import EncodedTurn, TokenSequence

WARM_UP = 8  # records
PROTOCOL = PROTOCOLS["superfiltering"]
RANDOM = f"random, with the rows' lengths by {DEFAULT_MODEL}"


@dataclass(frozen=True, slots=True)
class Rows:
    """An encoded dataset; `seconds` is the time to read and tokenise it."""

    records: int
    turns: list[EncodedTurn]
    sequences: list[TokenSequence]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of both views."""
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of both views."""
        return sum(t.end - t.start for s in self.sequences for t in s.targets)


def encoded(data: str, rows: int, files: ModelFiles, max_length: int) -> Rows:
    """The first `rows` records of `data`, by the model's tokenizer, truncated to `max_length` tokens."""
    encoder = Encoder(load_tokenizer(files), PROTOCOL, max_length, files.document_token_id)
    start = time.perf_counter()
    records = list(Dataset([data], limit=rows).records())
    turns, sequences = encoder.encode(records)
    return Rows(len(records), turns, sequences, time.perf_counter() - start)


def random_tokens(rows: Rows, vocab_size: int) -> Rows:
    """The same lengths and spans with random tokens below `vocab_size`, for a model without a tokenizer."""
    draw = random.Random(0)
    sequences = [replace(s, token_ids=draw.choices(range(vocab_size), k=len(s.token_ids))) for s in rows.sequences]
    return replace(rows, sequences=sequences)


def title(model: str) -> str:
    """The name of a model in a result: without the path of a local folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def longest(files: ModelFiles, room: int = 0) -> int:
    """The most tokens of a sequence under PROTOCOL that leave `room` in the model's context."""
    settings: dict[str, Any] = model_settings(files)
    contexts = [int(settings[key]) - room for key in CONTEXT_KEYS if settings.get(key)]
    return min([PROTOCOL.max_length, *contexts])


def warm_up(engine: Engine, rows: Rows) -> None:
    """Score a few records, so that the cost of an engine's first call is not timed."""
    few = {turn.record_id for turn in rows.turns[:WARM_UP]}
    for _ in engine.score([s for s in rows.sequences if s.record_id in few]):
        pass


def timed(engine: Engine, rows: Rows) -> tuple[pl.DataFrame, float]:
    """The score table of `rows`, and the seconds of the engine."""
    start = time.perf_counter()
    spans = [span for batch in engine.score(rows.sequences) for span in batch]
    took = time.perf_counter() - start
    return score_table(rows.turns, spans, two_views=True), took
