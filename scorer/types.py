"""The types that every module shares: records, statuses and errors. What comes of their tokens is in scorer.tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from scorer.printing import printable


class ScorerError(Exception):
    """An error that the user can mend; its text says how. The command line prints it on one line."""

    exit_code = 2

    def __init__(self, text: str):
        super().__init__(printable(text))  # names and contents of files are quoted, and may hold any character


class EngineError(ScorerError):
    """The machine failed, not the input (an engine died, a disk is full): the same command resumes."""

    exit_code = 1


class RowStatus(StrEnum):
    """Whether a row of the score table was scored, or why not: all but OK and TRUNCATED have null scores."""

    OK = "ok"
    TRUNCATED = "truncated"  # scored, on the tokens that the length limit left
    BAD_JSON = "bad_json"  # the line is not JSON, not UTF-8, or nested deeper than 100 levels
    UNKNOWN_FORMAT = "unknown_format"  # none of the known columns, or a role that no format has
    MISSING_FIELD = "missing_field"  # a column of its format is absent or null
    NOT_TEXT = "not_text"  # a number, a list, or a string that is not valid Unicode
    MULTIMODAL = "multimodal"  # a message holds an image, sound or video
    NO_ASSISTANT_TURN = "no_assistant_turn"
    HISTORY_ONLY = "history_only"  # the data or an option says not to score the turn; later turns are scored after it
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_RESPONSE = "empty_response"
    CHAT_TEMPLATE_ERROR = "chat_template_error"  # the model's template refuses the turn, or hides where it begins
    PROMPT_TOO_LONG = "prompt_too_long"  # the length limit leaves no response token
    NO_SCORABLE_TOKEN = "no_scorable_token"  # such as a one-token response that nothing precedes
    NON_FINITE = "non_finite"  # the model gave infinity or NaN
    OOM = "oom"  # did not fit in memory, even by itself

    @property
    def scored(self) -> bool:
        """Whether a row of this status has scores."""
        return self in (RowStatus.OK, RowStatus.TRUNCATED)


SCORED = tuple(status.value for status in RowStatus if status.scored)  # as they stand in a score table


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is system, user, assistant or tool.

    fields: the message for a chat template, where it is more than role and content: tool calls, a name, and so on.
    """

    role: str
    content: str
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One response, and the messages between the previous response (or the start) and it.

    `input` is Alpaca's second prompt column, "" where there is none. `branch` is chosen or rejected in preference data:
    the first turn of each starts anew. `part` is reasoning or answer where they are turns of their own. `history` are
    turns before the first one, which have no rows. `fields` are those of the response, as in Message. `after` are the
    messages after the last response, which are nobody's prompt; None where one can't be read.
    """

    prompt: tuple[Message, ...]
    response: str
    input: str = ""
    status: RowStatus = RowStatus.OK
    branch: str = ""
    part: str = ""
    history: tuple[Turn, ...] = ()
    fields: Mapping[str, Any] | None = None
    after: tuple[Message, ...] | None = ()

    @property
    def name(self) -> str | None:
        """What the response is, if not simply the response: chosen, rejected, reasoning, answer, chosen_answer, ..."""
        return "_".join(filter(None, (self.branch, self.part))) if self.branch or self.part else None


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of the data: `record_id` is its 0-based position over all inputs, `source` its file and line.

    A record that could not be read has no turns, and a status that says why. `format` is the name of the format that it
    was recognised as; `left_out` has the names of what is neither in a prompt nor in a response; `tools` are for the
    chat template.
    """

    record_id: int
    source: str
    turns: tuple[Turn, ...] = ()
    status: RowStatus = RowStatus.OK
    format: str = ""
    left_out: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()


def one_of(option: str, value: str, allowed: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raise ScorerError naming the allowed values, unless `value` is one."""
    if value not in allowed:
        raise ScorerError(f"{option}: '{value}' is not one of {', '.join(allowed)}")
