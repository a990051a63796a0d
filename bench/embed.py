"""Embedding of texts as `scorer cluster` does it: rows and tokens a second.

Correctness first: the embeddings must equal those of sentence-transformers, one text at a time.
"""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scorer.clusters.embedder import Embedder
from scorer.clusters.embeddings import TEXTS
from scorer.config import EmbedderConfig
from scorer.data.dataset import Dataset
from scorer.models.find import find_model
from scorer.models.load import choose_device

CHECKED_ROWS = 20
TOLERANCE = 1e-5


def run(data: str, rows: int, embedder: str, repeats: int) -> dict[str, Any]:
    """Measure; returns the report, with the median rates of `repeats` rounds."""
    texts = [TEXTS["part"](record) for record in Dataset([data], limit=rows).records()]
    config = EmbedderConfig(embedder, device=choose_device("auto"))
    model = Embedder(find_model(embedder, embedder=True), config)
    error = _error(model, [text for text in texts if text][:CHECKED_ROWS])
    if error > TOLERANCE:
        raise SystemExit(f"an embedding differs by {error:.1e} from that of sentence-transformers; nothing is reported")
    seconds, cpu_seconds, tokens = [], [], model.tokens
    for _ in range(repeats):
        began, used = time.monotonic(), time.process_time()
        model.embed(texts)
        seconds.append(time.monotonic() - began)
        cpu_seconds.append(time.process_time() - used)
    median = statistics.median(seconds)
    return {
        "data": Path(data).name,
        "rows": len(texts),
        "tokens": (tokens := (model.tokens - tokens) // repeats),
        "embedder": Path(embedder).name,
        "sentence_transformers": version("sentence-transformers"),
        "seconds": [round(value, 2) for value in seconds],
        "cpu_seconds": [round(value, 2) for value in cpu_seconds],  # of all threads
        "rows_per_second": round(len(texts) / median, 1),
        "tokens_per_second": round(tokens / median),
        "largest_error": error,
    }


def _error(model: Embedder, texts: list[str]) -> float:
    own = [model.model.encode(text, normalize_embeddings=True, show_progress_bar=False) for text in texts]
    return float(np.abs(model.embed(texts) - np.stack(own)).max())
