"""Records -> the rows of a score table, and the texts to tokenise for them, by a protocol's template.

Knows turns and templates; neither tokens nor arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from scorer.data.messages import split_reasoning
from scorer.data.records import REASONING
from scorer.encoding.chat import ChatMessage, ChatTemplate, Conversation
from scorer.encoding.templates import ChatTemplateError
from scorer.protocols import Join, Protocol
from scorer.tokens import CODES
from scorer.types import Record, RowStatus, Turn

# A turn of these statuses has text, and can be in the history of later turns.
READABLE = (RowStatus.OK, RowStatus.EMPTY_RESPONSE, RowStatus.EMPTY_PROMPT, RowStatus.HISTORY_ONLY)
OK, ERROR = CODES[RowStatus.OK], CODES[RowStatus.CHAT_TEMPLATE_ERROR]
NO_ROW = -1  # the row of a turn that is history only
TAGS = re.compile("</?think>")
Entry = tuple[int, Turn]  # with its row


@dataclass(slots=True)
class Texts:
    """The rows of some records, and the texts to tokenise for them.

    A conditioned sequence is the text of one or more turns, its pieces; `texts` has those of one piece after another,
    as scorer.encoding.sequences.Layout says.
    """

    protocol: Protocol
    record_ids: list[int] = field(default_factory=list)  # of each record
    counts: list[int] = field(default_factory=list)  # rows
    formats: list[str | None] = field(default_factory=list)
    left_out: list[str | None] = field(default_factory=list)
    special_tokens: list[bool] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of each row
    names: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each piece
    sequences: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sequence_records: list[int] = field(default_factory=list)

    def add_record(self, record: Record, *, special_tokens: bool) -> int:
        """Add the rows of a record, of which the first is returned."""
        first = len(self.statuses)
        self.record_ids.append(record.record_id)
        self.counts.append(len(record.turns) or 1)
        self.formats.append(record.format or None)
        self.left_out.append(",".join(record.left_out) if record.left_out else None)
        self.special_tokens.append(special_tokens)
        for turn in record.turns:
            self.statuses.append(CODES[turn.status])
            self.names.append(turn.name)
        if not record.turns:
            self.statuses.append(CODES[record.status])
            self.names.append(None)
        return first

    def leave_out(self, name: str, record: int = -1) -> None:
        """Note that `name` of a record, by default the last one, is not read."""
        known = self.left_out[record]
        self.left_out[record] = ",".join(sorted({name, *(known.split(",") if known else ())}))

    def add_sequence(self, record: int = -1) -> None:
        """Begin a sequence of a record, by default the last one."""
        self.sequence_records.append(self.record_ids[record])

    def add_piece(self, row: int, prompt: str, response: str) -> None:
        """Add one turn to the last sequence.

        Turns are tokenised apart, so that no later turn changes the tokens that an earlier one is scored on.
        """
        self.rows.append(row)
        self.sequences.append(len(self.sequence_records) - 1)
        if self.protocol.join == Join.CONCATENATED:
            self.texts += (prompt, response)
        elif self.protocol.alone is None:
            self.texts += (prompt, prompt + response)
        else:
            self.texts += (prompt, prompt + response, self.protocol.alone.prefix + response)


def branches(record: Record, first: int) -> Iterator[list[Entry]]:
    """The turns of each branch of a record as far as they can be read, with their rows; those with a row to score."""
    if len(record.turns) == 1 and not record.turns[0].history:  # most records
        if record.turns[0].status == RowStatus.OK:
            yield [(first, record.turns[0])]
        return
    for _, group in groupby(record.turns, lambda turn: turn.branch):
        turns = list(group)
        history = [(NO_ROW, turn) for turn in turns[0].history]
        entries = list(takewhile(lambda entry: entry[1].status in READABLE, [*history, *enumerate(turns, first)]))
        first += len(turns)
        if any(turn.status == RowStatus.OK for row, turn in entries if row != NO_ROW):
            yield entries


class TemplateWriter:
    """Writes the template of a protocol, one sequence for all turns."""

    reads_tools = False  # whether the tools of a record are in its prompts

    def __init__(self, protocol: Protocol, response_end: str):
        self.protocol, self.response_end = protocol, response_end

    def write(self, record: Record, entries: list[Entry], texts: Texts) -> None:
        """Add the sequences of some turns of the last record, each with its row or NO_ROW; the turns are READABLE."""
        texts.add_sequence()
        for number, (row, turn) in enumerate(entries):
            texts.add_piece(row, self._prompt(turn, first=not number), turn.response + self.response_end)

    def finish(self, texts: Texts) -> None:
        """Add the sequences that `write` has not added: none."""

    def _prompt(self, turn: Turn, *, first: bool) -> str:
        template = self.protocol.template
        assert template is not None
        if turn.part == "answer":  # its reasoning stands before it
            return ""
        if not first and not turn.prompt and not turn.input:  # one response after another
            return template.separator
        text = template.with_input if turn.input else template.without_input
        prompt = text.format(instruction="\n".join([m.content for m in turn.prompt]), input=turn.input)
        return prompt if first else template.separator + prompt


@dataclass(frozen=True, slots=True)
class _Response:
    """A message to score: the rows of its parts, the record's place in Texts, and the conversation up to it.

    first: no message of its branch comes before it.
    """

    record: int
    rows: list[int]
    conversation: Conversation
    first: bool


class ChatWriter:
    """Writes a model's chat template: one sequence, and a new one wherever the template rewrites what it wrote."""

    def __init__(self, chat: ChatTemplate):
        self.chat, self.reads_tools = chat, chat.reads("tools")
        self._responses: list[_Response] = []  # all are rendered at once

    def write(self, record: Record, entries: list[Entry], texts: Texts) -> None:
        """As TemplateWriter's, but for the sequences, which `finish` adds."""
        messages: list[ChatMessage] = []
        first = True
        for parts in _messages(entries):
            turn = parts[0][1]
            for message in turn.prompt:
                extra = f"\n{turn.input}" if turn.input and message.role == "user" else ""
                messages.append(self.chat.message(message.role, message.content + extra, message.fields))
            said = "".join([part.response for _, part in parts])
            messages.append(self.chat.message("assistant", said, turn.fields))
            rows = [row for row, _ in parts]
            if any(row != NO_ROW and texts.statuses[row] == OK for row in rows):  # any other turn is history only
                conversation = Conversation([*messages], record.tools)
                self._responses.append(_Response(len(texts.record_ids) - 1, rows, conversation, first))
                first = False

    def finish(self, texts: Texts) -> None:
        """Add the sequences of all that was written. Turns that the template refuses get the status for it."""
        responses, self._responses = self._responses, []
        written: str | None = None  # of the branch, in the last sequence
        for response, split in zip(responses, self.chat.split([r.conversation for r in responses]), strict=True):
            before, parts = self._parts(response, split, texts)
            if response.first:
                written = None
            for row, part in zip(response.rows, parts, strict=True):
                if texts.statuses[row] == OK:
                    if written is None or not before.startswith(written):
                        texts.add_sequence(response.record)
                        written = ""
                    texts.add_piece(row, before[len(written) :], part)
                    written = before + part
                before += part

    def _parts(
        self, response: _Response, split: tuple[str, str] | ChatTemplateError, texts: Texts
    ) -> tuple[str, Sequence[str]]:
        """The text before a message, and that of its parts, one a row: all of it, or reasoning and answer."""
        rows = response.rows
        if isinstance(split, ChatTemplateError):
            for row in rows:
                texts.statuses[row] = ERROR if texts.statuses[row] == OK else texts.statuses[row]
            return "", [""] * len(rows)
        before, whole = split
        said = response.conversation.messages[-1]
        reasoning = said.get("reasoning_content") or split_reasoning(said["content"] or "")[0]
        if TAGS.sub("", reasoning).strip()[:40] not in whole:
            texts.leave_out(REASONING, response.record)
        if len(rows) == 1:
            return before, [whole]
        parts = split_reasoning(whole)
        if not parts[0]:  # the template drops it
            texts.statuses[rows[0]] = ERROR
        return before, parts


def _messages(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The turns of each message: an answer belongs to the reasoning before it."""
    group: list[Entry] = []
    for entry in entries:
        if group and entry[1].part != "answer":
            yield group
            group = []
        group.append(entry)
    yield group
