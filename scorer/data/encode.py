"""Records -> the token sequences of their turns, conditioned and alone, by a protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby, takewhile
from typing import Any

import numpy as np

from scorer.data.chat import TEMPLATE_ERRORS, ChatMessage, ChatTemplate
from scorer.data.messages import split_reasoning
from scorer.data.records import REASONING
from scorer.data.sequences import Layout, Pieces, token_batch
from scorer.data.special_tokens import SpecialTokens
from scorer.data.tokenizer import BulkTokenizer
from scorer.protocols import Join, Protocol
from scorer.tokens import CODES, TokenBatch, TurnTable
from scorer.types import Message, Record, RowStatus, ScorerError, Turn

# A turn of these statuses has text, and can be in the history of later turns.
READABLE = (RowStatus.OK, RowStatus.EMPTY_RESPONSE, RowStatus.EMPTY_PROMPT, RowStatus.HISTORY_ONLY)
TAGS = re.compile("</?think>")
NO_ROW = -1  # the row of a piece that is history only


@dataclass(slots=True)
class _Texts:
    """The rows of some records, and the texts to tokenise for them.

    A conditioned sequence is the text of one or more turns, its pieces; `texts` has those of one piece after another,
    as scorer.data.sequences.Layout says.
    """

    record_ids: list[int] = field(default_factory=list)  # of each row
    turns: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    formats: list[str | None] = field(default_factory=list)
    left_out: list[str | None] = field(default_factory=list)
    special_tokens: list[bool] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each piece
    sequences: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sequence_records: list[int] = field(default_factory=list)

    def add_rows(self, record: Record, left_out: Sequence[str], *, special_tokens: bool) -> None:
        count = max(len(record.turns), 1)
        self.record_ids += [record.record_id] * count
        self.turns += range(count)
        self.statuses += [CODES[turn.status] for turn in record.turns] or [CODES[record.status]]
        self.names += [turn.name for turn in record.turns] or [None]
        self.formats += [record.format or None] * count
        self.left_out += [",".join(left_out) or None] * count
        self.special_tokens += [special_tokens] * count

    def leave_out(self, name: str, row: int) -> None:
        names = set((self.left_out[row] or name).split(","))
        self.left_out[row] = ",".join(sorted({*names, name}))


_Entry = tuple[int, Turn]  # with its row, or NO_ROW


class Encoder:
    """Turns records into token sequences.

    `max_length` counts tokens of the conditioned view; `document_token_id` separates documents in the model's
    pretraining (None: the tokenizer's BOS, or EOS where it has none); with
    `split_special_tokens`, special tokens in the text of the records are read as text. Raises ScorerError where the
    tokenizer lacks what the protocol needs.
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
        self.special, self.split_special_tokens = SpecialTokens(bulk), split_special_tokens
        self.chat = ChatTemplate(tokenizer) if protocol.template is None else None
        if protocol.score_eos and tokenizer.eos_token is None:
            raise ScorerError(f"protocol {protocol.name} scores the EOS token, and the model has none")
        self.response_end: str = tokenizer.eos_token if protocol.score_eos else ""
        self.layout = self._layout(document_token_id)
        # A longer text surely has more tokens than the limit can see, so it is cut, and a row of any size costs no
        # more than a long one.
        self.longest = 2 * self.layout.longest_text * max(map(len, tokenizer.get_vocab()))

    def set_date(self, began: str) -> None:
        """What a chat template takes for now, as ISO 8601: the same for all parts of a run."""
        if self.chat is not None:
            self.chat.now = datetime.fromisoformat(began)

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
        plan = _Texts()
        for record in records:
            self._plan(record, plan)
        table = TurnTable(
            np.array(plan.record_ids, np.int64),
            np.array(plan.turns, np.int32),
            np.array(plan.statuses, np.uint8),
            np.full(len(plan.turns), -1, np.int32),
            plan.formats,
            plan.names,
            plan.left_out,
            plan.special_tokens,
        )
        ids, offsets = self.special.encode([t if len(t) <= self.longest else t[: self.longest] for t in plan.texts])
        shape = (-1, self.layout.texts)
        pieces = Pieces(
            np.array(plan.rows, np.int64),
            np.array(plan.sequences, np.int64),
            np.array(plan.sequence_records, np.int64),
            ids,
            offsets[:-1].reshape(shape),
            np.minimum(np.diff(offsets), self.layout.longest_text).reshape(shape),
        )
        return table, token_batch(pieces, self.layout, table)

    def _plan(self, record: Record, plan: _Texts) -> None:
        """Add the rows of a record as far as its text decides them, and the pieces of its conditioned sequences."""
        special_tokens = self.special.held(_texts(record))
        if special_tokens and self.split_special_tokens:
            record = self._hidden(record)
        unread = bool(record.tools) and not (self.chat and self.chat.reads("tools"))
        row = len(plan.turns)
        plan.add_rows(record, [*record.left_out, "tools"] if unread else record.left_out, special_tokens=special_tokens)
        for _, turns in groupby(record.turns, lambda turn: turn.branch):
            branch = list(turns)
            history = [(NO_ROW, turn) for turn in branch[0].history]
            entries = list(takewhile(lambda entry: entry[1].status in READABLE, [*history, *enumerate(branch, row)]))
            row += len(branch)
            if not any(turn.status == RowStatus.OK for _, turn in entries[len(history) :]):
                continue
            if self.chat is not None:
                self._plan_chat(self.chat, record, entries, plan)
                continue
            plan.sequence_records.append(record.record_id)
            for number, (place, turn) in enumerate(entries):
                self._add_piece(plan, place, self._prompt(turn, first=not number), turn.response + self.response_end)

    def _prompt(self, turn: Turn, *, first: bool) -> str:
        template = self.protocol.template
        assert template is not None
        if turn.part == "answer":
            return ""
        if not first and not turn.prompt and not turn.input:  # one response after another
            return template.separator
        text = template.with_input if turn.input else template.without_input
        prompt = text.format(instruction="\n".join([m.content for m in turn.prompt]), input=turn.input)
        return prompt if first else template.separator + prompt

    def _plan_chat(self, chat: ChatTemplate, record: Record, entries: list[_Entry], plan: _Texts) -> None:
        """Add one sequence for all turns, and a new one wherever the template rewrites what it wrote before."""
        history: list[ChatMessage] = []
        written: str | None = None
        for parts in _messages(entries):
            turn = parts[0][1]
            for message in turn.prompt:
                extra = f"\n{turn.input}" if turn.input and message.role == "user" else ""
                history.append(chat.message(message.role, message.content + extra, message.fields))
            response = "".join([part.response for _, part in parts])
            said = chat.message("assistant", response, turn.fields)
            if any(row != NO_ROW and part.status == RowStatus.OK for row, part in parts):  # any other is history only
                before, texts = self._rendered(chat, record, (history, said), [row for row, _ in parts], plan)
                for (row, _), text in zip(parts, texts, strict=True):
                    if plan.statuses[row] == CODES[RowStatus.OK]:
                        if written is None or not before.startswith(written):
                            plan.sequence_records.append(record.record_id)
                            written = ""
                        self._add_piece(plan, row, before[len(written) :], text)
                        written = before + text
                    before += text
            history.append(said)

    def _rendered(
        self,
        chat: ChatTemplate,
        record: Record,
        messages: tuple[list[ChatMessage], ChatMessage],
        rows: list[int],
        plan: _Texts,
    ) -> tuple[str, list[str]]:
        """The text before a response, and the texts of its parts, one a row; sets what goes wrong."""
        history, said = messages
        error = CODES[RowStatus.CHAT_TEMPLATE_ERROR]
        try:
            before, response = chat.split(history, said, record.tools)
        except TEMPLATE_ERRORS:
            for row in rows:
                plan.statuses[row] = error if plan.statuses[row] == CODES[RowStatus.OK] else plan.statuses[row]
            return "", [""] * len(rows)
        thought = said.get("reasoning_content") or split_reasoning(said["content"] or "")[0]
        if TAGS.sub("", thought).strip()[:40] not in response:
            plan.leave_out(REASONING, rows[0])
        if len(rows) == 1:
            return before, [response]
        texts = split_reasoning(response)
        if not texts[0]:
            plan.statuses[rows[0]] = error  # the template drops the reasoning
        return before, [*texts]

    def _hidden(self, record: Record) -> Record:
        """The record with special tokens in its texts hidden."""
        hide = self.special.hide

        def hidden(turn: Turn) -> Turn:
            prompt = tuple(Message(m.role, hide(m.content), hide(m.fields)) for m in turn.prompt)
            history = tuple(map(hidden, turn.history))
            response, extra, fields = hide(turn.response), hide(turn.input), hide(turn.fields)
            return replace(turn, prompt=prompt, response=response, input=extra, history=history, fields=fields)

        return replace(record, turns=tuple(map(hidden, record.turns)), tools=tuple(hide([*record.tools])))

    def _add_piece(self, plan: _Texts, row: int, prompt: str, response: str) -> None:
        """Add one turn to the last sequence.

        Turns are tokenised apart, so that no later turn changes the tokens that an earlier one is scored on.
        """
        plan.rows.append(row)
        plan.sequences.append(len(plan.sequence_records) - 1)
        if self.protocol.join == Join.CONCATENATED:
            plan.texts += (prompt, response)
        elif self.protocol.alone is None:
            plan.texts += (prompt, prompt + response)
        else:
            plan.texts += (prompt, prompt + response, self.protocol.alone.prefix + response)


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


def _texts(record: Record) -> Iterator[str]:
    """The texts of a record that can be tokenised."""
    for turn in record.turns:
        for each in (*turn.history, turn):
            yield each.response
            yield each.input
            for message in each.prompt:
                yield message.content


def _messages(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """The turns of each message: an answer belongs to the reasoning before it."""
    group: list[_Entry] = []
    for entry in entries:
        if group and entry[1].part != "answer":
            yield group
            group = []
        group.append(entry)
    if group:
        yield group
