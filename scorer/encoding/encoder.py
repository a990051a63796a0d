"""Records -> the token sequences of their turns, conditioned and alone, by a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from scorer.data.records import texts_of
from scorer.encoding.chat import ChatTemplate
from scorer.encoding.sequences import Layout, Pieces, token_batch
from scorer.encoding.special_tokens import SpecialTokens
from scorer.encoding.texts import ChatWriter, TemplateWriter, Texts, branches
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.protocols import Join, Protocol
from scorer.tokens import TokenBatch, TurnTable, ranges
from scorer.types import Message, Record, ScorerError, Turn


class Encoder:
    """Turns records into token sequences.

    `max_length` counts tokens of the conditioned view; `document_token_id` separates documents in the model's
    pretraining (None: the tokenizer's BOS, or EOS where it has none). With `split_special_tokens`, special tokens in
    the text of the records are read as text. Raises ScorerError where the tokenizer lacks what the protocol needs.
    """

    def __init__(
        self,
        bulk: BulkTokenizer,
        protocol: Protocol,
        max_length: int,
        document_token_id: int | None = None,
        *,
        split_special_tokens: bool = False,
    ):
        self.bulk, self.protocol, self.max_length = bulk, protocol, max_length
        self.tokenizer = tokenizer = bulk.tokenizer
        self.writer: TemplateWriter | ChatWriter
        with bulk.checked():
            self.special = SpecialTokens(bulk, as_text=split_special_tokens)
            if protocol.score_eos and tokenizer.eos_token is None:
                raise ScorerError(f"protocol {protocol.name} scores the EOS token, and the model has none")
            if protocol.template is None:
                self.writer = ChatWriter(ChatTemplate(tokenizer))
            else:
                self.writer = TemplateWriter(protocol, tokenizer.eos_token if protocol.score_eos else "")
            self.layout = self._layout(document_token_id)
            self.longest = 2 * self.layout.longest_text * max(map(len, tokenizer.get_vocab()))

    def set_date(self, began: str) -> None:
        """What a chat template takes for now, as ISO 8601: the same for all parts of a run."""
        if isinstance(self.writer, ChatWriter):
            self.writer.chat.now = datetime.fromisoformat(began)

    def _layout(self, document_token_id: int | None) -> Layout:
        protocol, concatenated = self.protocol, self.protocol.join == Join.CONCATENATED
        # A chat template writes its own BOS.
        bos: tuple[int, ...] = () if protocol.template is None else _leading_special_ids(self.tokenizer)
        if (alone := protocol.alone) is None:
            return Layout(self.max_length, concatenated, bos, has_alone=False)
        start = bos
        if alone.document_bos:
            start = (_document_token(self.tokenizer, protocol, document_token_id),)
        prefix = tuple(self.bulk.encode([alone.prefix])[0].tolist())
        return Layout(
            self.max_length,
            concatenated,
            bos,
            has_alone=True,
            alone_start=start + prefix if concatenated else start,
            unscored=max(len(start) + len(prefix), 1),  # nothing precedes the very first token
            slack=alone.slack,
        )

    def encode(self, records: Sequence[Record]) -> tuple[TurnTable, TokenBatch]:
        """One row a turn in order (a record without turns has one too), and the sequences to score.

        A conditioned sequence stands before the alone ones of its turns.
        """
        texts = Texts(self.protocol)
        for record in records:
            self._plan(record, texts)
        self.writer.finish(texts)
        counts = np.array(texts.counts, np.int64)
        of_row = np.repeat(np.arange(len(counts)), counts)
        table = TurnTable(
            np.array(texts.record_ids, np.int64)[of_row],
            ranges(np.zeros_like(counts), counts).astype(np.int32),
            np.array(texts.statuses, np.uint8),
            np.full(len(of_row), -1, np.int32),
            np.array(texts.formats, object)[of_row],
            np.array(texts.names, object),
            np.array(texts.left_out, object)[of_row],
            np.array(texts.special_tokens, bool)[of_row],
        )
        with self.bulk.checked():
            ids, offsets = self.special.encode([t if len(t) <= self.longest else self._cut(t) for t in texts.texts])
        shape = (-1, self.layout.texts)
        pieces = Pieces(
            np.array(texts.rows, np.int64),
            np.array(texts.sequences, np.int64),
            np.array(texts.sequence_records, np.int64),
            ids,
            offsets[:-1].reshape(shape),
            np.minimum(np.diff(offsets), self.layout.longest_text).reshape(shape),
        )
        return table, token_batch(pieces, self.layout, table)

    def _plan(self, record: Record, texts: Texts) -> None:
        """Add the rows of a record as far as its text decides them, and the pieces of its conditioned sequences."""
        tools = [str(record.tools)] if record.tools else []
        special_tokens = self.special.held([*texts_of(record.turns), *tools])
        if self.special.as_text:
            record = self._hidden(record)
        first = texts.add_record(record, special_tokens=special_tokens)
        if record.tools and not self.writer.reads_tools:
            texts.leave_out("tools")
        for entries in branches(record, first):
            self.writer.write(record, entries, texts)

    def _cut(self, text: str) -> str:
        """The beginning of a text, if its tokens are twice as many as the limit can see, so that a row of any size
        costs no more than a long one. A tokenizer may drop characters, or make one token of many.
        """
        beginning = text[: self.longest]
        ids, _ = self.special.encode([beginning])
        return beginning if len(ids) >= 2 * self.layout.longest_text else text

    def _hidden(self, record: Record) -> Record:
        """The record with special tokens in its texts hidden."""
        hide = self.special.hide

        def hidden(turn: Turn) -> Turn:
            prompt = tuple(Message(m.role, hide(m.content), hide(m.fields)) for m in turn.prompt)
            history = tuple(map(hidden, turn.history))
            response, extra, fields = hide(turn.response), hide(turn.input), hide(turn.fields)
            return replace(turn, prompt=prompt, response=response, input=extra, history=history, fields=fields)

        return replace(record, turns=tuple(map(hidden, record.turns)), tools=tuple(hide([*record.tools])))


def _leading_special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before any text, such as LLaMA's BOS; most have none."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    return next(tuple(whole[:k]) for k in range(len(whole)) if whole[k : k + len(bare)] == bare)


def _document_token(tokenizer: Any, protocol: Protocol, document_token_id: int | None) -> int:
    for token in (document_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ScorerError(f"protocol {protocol.name} needs a BOS or an EOS token, and the model has neither")
