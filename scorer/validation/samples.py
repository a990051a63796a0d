"""The records of a run as the target reads them: prompt and completion, their tokens, and what can't be trained on.

    {"prompt": [messages], "completion": [message], "tools": [...]}    TRL's conversational prompt-completion form

Knows records and the target's tokenizer; neither scores nor arms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import polars as pl

from scorer.config import Reading
from scorer.data.dataset import Dataset
from scorer.data.records import to_record
from scorer.encoding.encoder import Encoder
from scorer.encoding.texts import ChatWriter
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.files.raw import RawRecord
from scorer.protocols import PROTOCOLS
from scorer.selection.convert import converted
from scorer.tokens import STATUSES
from scorer.types import SCORED, Record
from scorer.validation.target import Target

FORM = "prompt-completion"
NOT_CONVERTIBLE = "not_convertible"  # the form can't hold the record, as with an unreadable or a missing response
CHUNK = 1000  # records that are tokenised at a time
# The protocol chat with the response after its prompt alone.
CONDITIONED = replace(PROTOCOLS["chat"], name="validation", alone=None)


@dataclass(frozen=True, slots=True)
class Sample:
    """A record in FORM, `value`; `record` is the same for the encoder: the completion is its only scored turn."""

    value: dict[str, Any]
    record: Record

    @property
    def text(self) -> str:
        """All that is said in it."""
        messages = (*self.value["prompt"], *self.value["completion"])
        return "\n".join(str(message.get("content") or "") for message in messages)


def open_encoder(target: Target) -> Encoder:
    """The encoder of the target's tokenizer. Raises ScorerError where it can't write conversations."""
    assert target.config.max_length is not None
    tokenizer = BulkTokenizer(target.tokenizer)
    return Encoder(tokenizer, CONDITIONED, target.config.max_length, target.files.document_token_id)


def samples(rows: Iterable[RawRecord], reading: Reading) -> Iterator[tuple[int, Sample | None]]:
    """The record id of each row, and the sample that it becomes: None where FORM can't hold it."""
    for raw in rows:
        value = converted(raw, reading, FORM)
        if value is None:
            yield raw.record_id, None
        else:
            record = to_record(RawRecord(raw.record_id, raw.source, value), Reading())
            yield raw.record_id, Sample(value, record)


def measure(data: Dataset, encoder: Encoder) -> pl.DataFrame:
    """record_id Int64, status String, tokens Int64, of all records.

    status: a RowStatus or NOT_CONVERTIBLE. tokens: of the response, as far as max_length leaves them.
    """
    tables = []
    found = samples(data.rows(), data.reading)
    while chunk := list(islice(found, CHUNK)):
        turns, batch = encoder.encode([sample.record for _, sample in chunk if sample is not None])
        tokens = np.zeros(len(turns), np.int64)
        tokens[batch.rows] = batch.ends - batch.starts
        statuses = pl.Series(STATUSES, dtype=pl.String).gather(turns.statuses)
        measured = pl.DataFrame({"record_id": turns.record_ids, "status": statuses, "tokens": tokens})
        ids = pl.DataFrame({"record_id": [i for i, _ in chunk]}, schema={"record_id": pl.Int64})
        tables.append(ids.join(measured, on="record_id", how="left", maintain_order="left"))
    return pl.concat(tables).with_columns(pl.col("status").fill_null(NOT_CONVERTIBLE), pl.col("tokens").fill_null(0))


def trainable(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of `measure` that can be trained on."""
    return table.filter(pl.col("status").is_in(SCORED) & (pl.col("tokens") > 0))


def training_row(sample: Sample, encoder: Encoder) -> dict[str, Any]:
    """The sample for TRL: its messages in the form in which the template writes all that the encoder reads of them."""
    assert isinstance(encoder.writer, ChatWriter)
    message = encoder.writer.chat.message
    (turn,) = sample.record.turns
    said: list[dict[str, Any]] = []
    for one in (*turn.history, turn):
        said += [dict(message(m.role, m.content, m.fields)) for m in one.prompt]
        said.append(dict(message("assistant", one.response, one.fields)))
    tools = {"tools": list(sample.record.tools)} if sample.record.tools else {}
    return {"prompt": said[:-1], "completion": said[-1:], **tools}


def chosen(data: Dataset, ids: Sequence[int]) -> Iterator[Sample]:
    """The samples of some trainable records, in the order of their ids."""
    wanted = frozenset(ids)
    rows = (raw for raw in data.rows() if raw.record_id in wanted)
    return (sample for _, sample in samples(rows, data.reading) if sample is not None)
