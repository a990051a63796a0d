"""Records -> the token sequences of their turns, conditioned and alone, by a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError

from scorer.data.sequences import Layout, Pieces, token_batch
from scorer.data.tokenizer import BulkTokenizer
from scorer.protocols import Join, Protocol
from scorer.tokens import CODES, TokenBatch, TurnTable
from scorer.types import Message, Record, RowStatus, ScorerError, Turn

# A template raises errors of its own, and makes Python raise others.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# A turn of these statuses has text, and can be in the history of later turns.
READABLE = (RowStatus.OK, RowStatus.EMPTY_RESPONSE, RowStatus.EMPTY_PROMPT)


@dataclass(slots=True)
class _Texts:
    """The rows of some records, and the texts to tokenise for them.

    A conditioned sequence is the text of one or more turns, its pieces; `texts` has those of one piece after another,
    as scorer.data.sequences.Layout says.
    """

    record_ids: list[int] = field(default_factory=list)  # of each row
    turns: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each piece
    sequences: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sequence_records: list[int] = field(default_factory=list)

    def add_row(self, record_id: int, turn: int, status: RowStatus) -> None:
        self.record_ids.append(record_id)
        self.turns.append(turn)
        self.statuses.append(CODES[status])


class Encoder:
    """Turns records into token sequences.

    `max_length` counts tokens of the conditioned view; `document_token_id` separates documents in the model's
    pretraining (None: the tokenizer's BOS, or EOS where it has none). Raises ScorerError where the tokenizer lacks
    what the protocol needs.
    """

    def __init__(self, bulk: BulkTokenizer, protocol: Protocol, max_length: int, document_token_id: int | None = None):
        self.bulk, self.protocol, self.max_length = bulk, protocol, max_length
        self.tokenizer = tokenizer = bulk.tokenizer
        if protocol.template is None and not tokenizer.chat_template:
            raise ScorerError(
                f"protocol {protocol.name}: the model has no chat template; use one that is tuned to chat"
            )
        if protocol.score_eos and tokenizer.eos_token is None:
            raise ScorerError(f"protocol {protocol.name} scores the EOS token, and the model has none")
        self.response_end: str = tokenizer.eos_token if protocol.score_eos else ""
        self.layout = self._layout(document_token_id)
        # A longer text surely has more tokens than the limit can see, so it is cut, and a row of any size costs no
        # more than a long one.
        self.longest = 2 * self.layout.longest_text * max(map(len, tokenizer.get_vocab()))

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
        )
        ids, offsets = self.bulk.encode([t if len(t) <= self.longest else t[: self.longest] for t in plan.texts])
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
        if not record.turns:
            plan.add_row(record.record_id, 0, record.status)
            return
        first = len(plan.turns)
        for number, turn in enumerate(record.turns):
            plan.add_row(record.record_id, number, turn.status)
        readable = list(takewhile(lambda turn: turn.status in READABLE, record.turns))
        if all(turn.status != RowStatus.OK for turn in readable):
            return
        if self.protocol.template is None:
            self._plan_chat(record, readable, first, plan)
            return
        plan.sequence_records.append(record.record_id)
        for number, prompt in enumerate(self._template_prompts(readable)):
            self._add_piece(plan, first + number, prompt, readable[number].response + self.response_end)

    def _template_prompts(self, turns: list[Turn]) -> Iterator[str]:
        template = self.protocol.template
        assert template is not None
        for number, turn in enumerate(turns):
            text = template.with_input if turn.input else template.without_input
            prompt = text.format(instruction="\n".join([m.content for m in turn.prompt]), input=turn.input)
            yield template.separator + prompt if number else prompt

    def _plan_chat(self, record: Record, turns: list[Turn], first: int, plan: _Texts) -> None:
        """Add one sequence for all turns, and a new one wherever the template rewrites what it wrote before."""
        history: list[dict[str, str]] = []
        written: str | None = None
        for number, turn in enumerate(turns):
            history += [_chat_message(message, turn.input) for message in turn.prompt]
            if turn.status == RowStatus.OK:  # any other turn is history only
                try:
                    text = self.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
                except TEMPLATE_ERRORS:
                    plan.statuses[first + number] = CODES[RowStatus.CHAT_TEMPLATE_ERROR]
                else:
                    if written is None or not text.startswith(written):
                        plan.sequence_records.append(record.record_id)
                        written = ""
                    self._add_piece(plan, first + number, text[len(written) :], turn.response)
                    written = text + turn.response
            history.append({"role": "assistant", "content": turn.response})

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


def _chat_message(message: Message, extra_input: str) -> dict[str, str]:
    content = f"{message.content}\n{extra_input}" if extra_input and message.role == "user" else message.content
    return {"role": message.role, "content": content}
