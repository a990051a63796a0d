"""The rows that engines are timed on (an encoded dataset, or random tokens of its lengths), and their timing."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench.lib.families import make
from scorer.config import DEFAULT_MODEL, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.engines import Engine
from scorer.engines.choose import CONTEXT_KEYS
from scorer.models.embedded import on_disk
from scorer.models.find import ModelFiles, find_model, model_settings
from scorer.protocols import PROTOCOLS
from scorer.runs.shards import open_encoder
from scorer.scores.measures import score_table
from scorer.tokens import TokenBatch, TurnTable

BYTES = "bytes"
WARM_UP = 8  # records
PROTOCOL = PROTOCOLS["superfiltering"]
RANDOM = "random, with the rows' lengths by "  # and the tokenizer's name


@dataclass(frozen=True, slots=True)
class Rows:
    """An encoded dataset; `seconds` is the time to read and tokenise it."""

    records: int
    turns: TurnTable
    batch: TokenBatch
    few: TokenBatch  # the first of them, to warm up with
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens of both views."""
        return len(self.batch.token_ids)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of both views."""
        return int((self.batch.ends - self.batch.starts).sum())


def encoded(data: str, rows: int, files: ModelFiles, max_length: int) -> Rows:
    """The first `rows` records of `data`, by the model's tokenizer, truncated to `max_length` tokens."""
    encoder = open_encoder(ScoreConfig(protocol=PROTOCOL.name, max_length=max_length), files)
    start = time.perf_counter()
    records = list(Dataset([data], limit=rows).records())
    turns, batch = encoder.encode(records)
    seconds = time.perf_counter() - start
    return Rows(len(records), turns, batch, encoder.encode(records[:WARM_UP])[1], seconds)


def random_tokens(rows: Rows, vocab_size: int) -> Rows:
    """The same lengths and spans with random tokens below `vocab_size`, for a model without a tokenizer."""
    draw = np.random.default_rng(0)

    def drawn(batch: TokenBatch) -> TokenBatch:
        return replace(batch, token_ids=draw.integers(vocab_size, size=len(batch.token_ids), dtype=np.int32))

    return replace(rows, batch=drawn(rows.batch), few=drawn(rows.few))


def any_tokenizer(folder: Path) -> ModelFiles:
    """Files with a tokenizer, without a download: the default model's where it is in the cache, else one of bytes.

    The latter is written to `folder`.
    """
    if on_disk(DEFAULT_MODEL):
        return find_model(DEFAULT_MODEL)
    return replace(make("gpt2", folder), name=BYTES)


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
    for _ in engine.score([rows.few]):
        pass


def timed(engine: Engine, rows: Rows) -> tuple[pl.DataFrame, float]:
    """The score table of `rows`, and the seconds of the engine."""
    start = time.perf_counter()
    scores = list(engine.score([rows.batch]))
    took = time.perf_counter() - start
    nll_sums, statuses = np.full(len(rows.batch.rows), np.nan), np.zeros(len(rows.batch.rows), np.uint8)
    for some in scores:
        nll_sums[some.spans], statuses[some.spans] = some.nll_sums, some.statuses
    return score_table(rows.turns, rows.batch, nll_sums, statuses, two_views=True), took
