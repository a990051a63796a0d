"""Records -> the conditioned and the alone TokenSequence of each turn, by a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from scorer.protocols import Join, Protocol
from scorer.types import EncodedTurn, Message, Record, RowStatus, ScorerError, Span, TokenSequence, Turn, View

# A template raises errors of its own, and makes Python raise others.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
CHARACTERS = 1 << 20  # tokenised at once: encodings take fifty times as much memory as their text
# A turn of these statuses has text, and can be in the history of later turns.
READABLE = (RowStatus.OK, RowStatus.EMPTY_RESPONSE, RowStatus.EMPTY_PROMPT)


@dataclass(slots=True)
class _Piece:
    """One turn of a sequence: its prompt as it continues the text before, its response, and the ids of `_texts`."""

    turn: int
    prompt: str
    response: str
    ids: Sequence[list[int]] = ()


class Encoder:
    """Turns records into token sequences.

    `max_length` counts tokens of the conditioned view; `document_token_id` separates documents in the model's
    pretraining (None: the tokenizer's BOS, or EOS where it has none). Raises ScorerError where the tokenizer lacks
    what the protocol needs.
    """

    def __init__(self, tokenizer: Any, protocol: Protocol, max_length: int, document_token_id: int | None = None):
        self.tokenizer, self.protocol, self.max_length = tokenizer, protocol, max_length
        if protocol.template is None and not tokenizer.chat_template:
            raise ScorerError(
                f"protocol {protocol.name}: the model has no chat template; use one that is tuned to chat"
            )
        if protocol.score_eos and tokenizer.eos_token is None:
            raise ScorerError(f"protocol {protocol.name} scores the EOS token, and the model has none")
        self.response_end: str = tokenizer.eos_token if protocol.score_eos else ""
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        # A chat template writes its own BOS.
        self.bos = [] if protocol.template is None else _leading_special_ids(tokenizer)
        self.alone_start: list[int] = []
        if protocol.alone is not None:
            self.alone_start = self.bos
            if protocol.alone.document_bos:
                self.alone_start = [_document_token(tokenizer, protocol, document_token_id)]
            if protocol.alone.prefix:
                self.alone_start = self.alone_start + next(self._tokenise([protocol.alone.prefix]))

    def encode(self, records: Sequence[Record]) -> tuple[list[EncodedTurn], list[TokenSequence]]:
        """One EncodedTurn a turn in order (a record without turns gives one too), and the sequences to score.

        The two views of a turn stand side by side.
        """
        plans = [self._plan(record) for record in records]
        pieces = [piece for _, segments in plans for segment in segments for piece in segment]
        texts = [self._texts(piece) for piece in pieces]
        ids = self._tokenise([text for own in texts for text in own])
        for piece, own in zip(pieces, texts, strict=True):
            piece.ids = [next(ids) for _ in own]
        sequences = [s for rows, segments in plans for segment in segments for s in self._sequences(rows, segment)]
        return [row for rows, _ in plans for row in rows], sequences

    def _tokenise(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text, as far as the length limit can see.

        A text is cut where it surely has more tokens than that, and then its ids, so that a row of any size costs no
        more than a long one.
        """
        slack = self.protocol.alone.slack if self.protocol.alone is not None else 0
        most = self.max_length + slack + 1
        start = 0
        while start < len(texts):
            end, characters = start, 0
            while end < len(texts) and characters < CHARACTERS:
                characters += len(texts[end])
                end += 1
            cut = [text[: 2 * most * self.longest_token] for text in texts[start:end]]
            batch = self.tokenizer(cut, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield from (ids[:most] for ids in batch["input_ids"])
            start = end

    def _plan(self, record: Record) -> tuple[list[EncodedTurn], list[list[_Piece]]]:
        """The rows of a record as far as its text decides them, and the pieces of each of its conditioned sequences."""
        if not record.turns:
            return [EncodedTurn(record.record_id, 0, record.status)], []
        rows = [EncodedTurn(record.record_id, number, turn.status) for number, turn in enumerate(record.turns)]
        readable = list(takewhile(lambda turn: turn.status in READABLE, record.turns))
        if all(turn.status != RowStatus.OK for turn in readable):
            return rows, []
        if self.protocol.template is None:
            return rows, self._chat_segments(rows, readable)
        return rows, [list(self._template_pieces(readable))]

    def _template_pieces(self, turns: list[Turn]) -> Iterator[_Piece]:
        template = self.protocol.template
        assert template is not None
        for number, turn in enumerate(turns):
            text = template.with_input if turn.input else template.without_input
            prompt = text.format(instruction="\n".join(m.content for m in turn.prompt), input=turn.input)
            yield _Piece(number, (template.separator if number else "") + prompt, turn.response + self.response_end)

    def _chat_segments(self, rows: list[EncodedTurn], turns: list[Turn]) -> list[list[_Piece]]:
        """One sequence for all turns, and a new one wherever the template rewrites what it wrote before."""
        segments: list[list[_Piece]] = []
        history: list[dict[str, str]] = []
        written = ""
        for number, turn in enumerate(turns):
            history += [_chat_message(message, turn.input) for message in turn.prompt]
            if turn.status == RowStatus.OK:  # any other turn is history only
                try:
                    text = self.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
                except TEMPLATE_ERRORS:
                    rows[number] = EncodedTurn(rows[number].record_id, number, RowStatus.CHAT_TEMPLATE_ERROR)
                else:
                    if not segments or not text.startswith(written):
                        segments.append([])
                        written = ""
                    segments[-1].append(_Piece(number, text[len(written) :], turn.response))
                    written = text + turn.response
            history.append({"role": "assistant", "content": turn.response})
        return segments

    def _texts(self, piece: _Piece) -> list[str]:
        """The texts to tokenise: prompt and response, or the prompt, the whole text and the response alone.

        Turns are tokenised apart, so that no later turn changes the tokens that an earlier one is scored on.
        """
        if self.protocol.join == Join.CONCATENATED:
            return [piece.prompt, piece.response]
        alone = [] if self.protocol.alone is None else [self.protocol.alone.prefix + piece.response]
        return [piece.prompt, piece.prompt + piece.response, *alone]

    def _sequences(self, rows: list[EncodedTurn], pieces: list[_Piece]) -> Iterator[TokenSequence]:
        """The conditioned sequence of some turns, then their alone ones; sets the turns' status in `rows`."""
        record_id, alone = rows[0].record_id, self.protocol.alone
        conditioned = list(self.bos)
        targets: list[Span] = []
        alones: list[TokenSequence] = []
        for piece in pieces:
            prompt, rest = piece.ids[0], piece.ids[1]
            start = len(conditioned) + len(prompt)
            if self.protocol.join == Join.CONCATENATED:
                conditioned += prompt + rest
                alone_ids = self.alone_start + rest
            else:
                conditioned += rest
                alone_ids = [] if alone is None else self.bos + piece.ids[2]
            row = rows[piece.turn]
            if row.status != RowStatus.OK:
                continue
            end = min(len(conditioned), self.max_length)
            status = RowStatus.TRUNCATED if end < len(conditioned) else RowStatus.OK
            if end <= max(start, 1):
                status = RowStatus.PROMPT_TOO_LONG if start >= self.max_length else RowStatus.NO_SCORABLE_TOKEN
            elif alone is not None:
                room = max(self.max_length - start + alone.slack, 0)
                first = max(len(self.alone_start), 1)  # nothing precedes the very first token
                if min(len(alone_ids), room) <= first:
                    cut = len(alone_ids) > first
                    status = RowStatus.PROMPT_TOO_LONG if cut else RowStatus.NO_SCORABLE_TOKEN
                else:
                    if len(alone_ids) > room:
                        status, alone_ids = RowStatus.TRUNCATED, alone_ids[:room]
                    span = Span(piece.turn, first, len(alone_ids))
                    alones.append(TokenSequence(record_id, View.ALONE, alone_ids, (span,)))
            rows[piece.turn] = EncodedTurn(record_id, piece.turn, status, start)
            if status.scored:
                targets.append(Span(piece.turn, max(start, 1), end))
        if targets:
            yield TokenSequence(record_id, View.CONDITIONED, conditioned[: targets[-1].end], tuple(targets))
            yield from alones


def _leading_special_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text, such as LLaMA's BOS; most have none."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    return next(whole[:k] for k in range(len(whole)) if whole[k : k + len(bare)] == bare)


def _document_token(tokenizer: Any, protocol: Protocol, document_token_id: int | None) -> int:
    for token in (document_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ScorerError(f"protocol {protocol.name} needs a BOS or an EOS token, and the model has neither")


def _chat_message(message: Message, extra_input: str) -> dict[str, str]:
    content = f"{message.content}\n{extra_input}" if extra_input and message.role == "user" else message.content
    return {"role": message.role, "content": content}
