"""The conditioned NLL of the held-out responses, by the project's own engines.

Knows models and samples; neither arms nor statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import polars as pl

from scorer.encoding.encoder import Encoder
from scorer.engines.architecture import why_not_packed
from scorer.engines.choose import open_engine, resolve_config
from scorer.models.find import ModelFiles
from scorer.scores.measures import score_table
from scorer.types import EngineError, Record, RowStatus
from scorer.validation.target import Target


def held_out_nll(files: ModelFiles, target: Target, encoder: Encoder, records: Sequence[Record]) -> pl.DataFrame:
    """row Int64 (the index in `records`), nll Float64 (sum over the response, in nats), tokens Int64.

    files: a model made of `target`; encoder: that of its template. Raises EngineError where an NLL is not finite.
    """
    name = "packed" if why_not_packed(files) is None else "reference"
    dtype = "auto" if target.config.device == "cuda" else "float32"  # differences of fine-tuned models are small
    config = resolve_config(replace(target.config, model=files.name, engine=name, dtype=dtype), files)
    turns, batch = encoder.encode(records)
    nll, statuses = np.full(len(batch.rows), np.nan), np.zeros(len(batch.rows), np.uint8)
    with closing(open_engine(config, files)) as engine:
        for scores in engine.score([batch]):
            nll[scores.spans], statuses[scores.spans] = scores.nll_sums, scores.statuses
    table = score_table(turns, batch, nll, statuses, two_views=False)
    if faults := table.filter(pl.col("nll_conditioned").is_null())["status"].to_list():
        advice = "; a lower learning_rate in the recipe may help" if RowStatus.NON_FINITE in faults else ""
        raise EngineError(f"{files.path}: {len(faults):,} held-out responses have no NLL ({faults[0]}){advice}")
    row, tokens = pl.int_range(pl.len(), dtype=pl.Int64), pl.col("response_tokens").cast(pl.Int64)
    return table.select(row=row, nll="nll_conditioned", tokens=tokens)
