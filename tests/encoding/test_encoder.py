"""Text to tokens by every protocol: with one token a byte, so that positions can be counted, and with a real BPE."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, processors

from bench.lib.families import VOCABULARY, byte_tokenizer
from scorer.config import ScoreConfig
from scorer.encoding.encoder import Encoder
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.engines.reference import ReferenceEngine
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.scores.measures import score_table
from scorer.types import Message, Record, RowStatus, ScorerError, Turn
from tests.lib.tokens import EncodedTurn, ListEncoder, Span, TokenSequence, View

SCORES = ("nll_sums", "statuses")
END = 256  # the byte tokenizer's BOS and EOS
SYMBOLS = {i: {"Ġ": " ", "Ċ": "\n"}.get(symbol, symbol) for symbol, i in VOCABULARY.items()} | {END: "¶"}
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_INPUT_HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_Q = ALPACA_HEAD + "### Instruction:\nQ\n\n### Response:"
ALPACA_Q_IN = ALPACA_INPUT_HEAD + "### Instruction:\nQ\n\n### Input:\nin\n\n### Response:"
BYTES = BulkTokenizer(byte_tokenizer())
opened = lru_cache(BulkTokenizer)
Shown = list[tuple[View, str, list[str]]]


def bos_tokenizer(tokenizer: Any, bos: str, bos_id: int) -> Any:
    """The tokenizer with a BOS before every text, as LLaMA's has."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    return tokenizer


def chat_tokenizer(template: str = CHATML) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encoder(protocol: str, max_length: int = 1024, tokenizer: Any = None, document: int | None = None) -> ListEncoder:
    bulk = BYTES if tokenizer is None else opened(tokenizer)
    return ListEncoder(Encoder(bulk, PROTOCOLS[protocol], max_length, document))


def single(prompt: str, response: str, extra: str = "", record_id: int = 0) -> Record:
    return Record(record_id, "data.jsonl:1", (Turn((Message("user", prompt),), response, extra),))


def turn(prompt: str, response: str, status: RowStatus = RowStatus.OK) -> Turn:
    return Turn((Message("user", prompt),) if prompt else (), response, status=status)


def talk(*turns: Turn) -> Record:
    return Record(0, "data.jsonl:1", turns)


def text(ids: list[int]) -> str:
    """One character a token: ASCII as it is, ¶ for the document separator."""
    return "".join(SYMBOLS[i] for i in ids)


def shown(sequences: list[TokenSequence]) -> Shown:
    """View, text and scored texts of each sequence."""
    return [(s.view, text(s.token_ids), [text(s.token_ids[t.start : t.end]) for t in s.targets]) for s in sequences]


def conditioned(whole: str, *scored: str) -> tuple[View, str, list[str]]:
    return View.CONDITIONED, whole, list(scored)


def alone(whole: str, scored: str) -> tuple[View, str, list[str]]:
    return View.ALONE, whole, [scored]


def rows(encoded: list[EncodedTurn]) -> list[tuple[int, str, int | None]]:
    return [(row.turn, str(row.status), row.prompt_tokens) for row in encoded]


def test_token_ids_and_spans_in_full() -> None:
    turns, sequences = encoder("superfiltering").encode([single("ab", "cde", record_id=7)])
    assert turns == [EncodedTurn(7, 0, RowStatus.OK, 3)]
    assert sequences == [  # the byte tokenizer has "a" at 64, and the line feed at 198
        TokenSequence(7, View.CONDITIONED, [64, 65, 198, 66, 67, 68], (Span(0, 3, 6),)),
        TokenSequence(7, View.ALONE, [66, 67, 68], (Span(0, 1, 3),)),
    ]


@pytest.mark.parametrize(
    ("protocol", "extra", "prompt", "expected"),
    [
        ("superfiltering", "", "Q\n", [conditioned("Q\nyes", "yes"), alone("yes", "es")]),
        ("superfiltering", "in", "Q\nin\n", [conditioned("Q\nin\nyes", "yes"), alone("yes", "es")]),
        ("aligned", "", "Q\n", [conditioned("Q\nyes", "yes"), alone("¶yes", "yes")]),
        ("aligned", "in", "Q\nin\n", [conditioned("Q\nin\nyes", "yes"), alone("¶yes", "yes")]),
        (
            "cherry",
            "",
            ALPACA_Q,
            [conditioned(ALPACA_Q + "yes", "yes"), alone("### Response:yes", "yes")],
        ),
        (
            "cherry",
            "in",
            ALPACA_Q_IN,
            [conditioned(ALPACA_Q_IN + "yes", "yes"), alone("### Response:yes", "yes")],
        ),
        ("small2large", "", ALPACA_Q, [conditioned(ALPACA_Q + "yes¶", "yes¶")]),
        ("small2large", "in", ALPACA_Q_IN, [conditioned(ALPACA_Q_IN + "yes¶", "yes¶")]),
        ("chat", "", "<user>Q<assistant>", [conditioned("<user>Q<assistant>yes", "yes"), alone("¶yes", "yes")]),
        (
            "chat",
            "in",
            "<user>Q\nin<assistant>",
            [conditioned("<user>Q\nin<assistant>yes", "yes"), alone("¶yes", "yes")],
        ),
    ],
)
def test_each_protocol(protocol: str, extra: str, prompt: str, expected: Shown) -> None:
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([single("Q", "yes", extra)])
    assert rows(turns) == [(0, "ok", len(prompt))]
    assert shown(sequences) == expected


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("superfiltering", [conditioned("¶Q\nyes", "yes"), alone("¶yes", "yes")]),
        ("aligned", [conditioned("¶Q\nyes", "yes"), alone("¶yes", "yes")]),
        ("chat", [conditioned("¶<user>Q<assistant>yes", "yes"), alone("¶yes", "yes")]),  # the template's own BOS, once
    ],
)
def test_a_tokenizer_that_adds_bos(protocol: str, expected: Shown) -> None:
    tokenizer = bos_tokenizer(chat_tokenizer("{{ bos_token }}" + CHATML), "<|end|>", END)
    turns, sequences = encoder(protocol, tokenizer=tokenizer).encode([single("Q", "yes")])
    assert shown(sequences) == expected
    assert rows(turns) == [(0, "ok", expected[0][1].index("yes"))]


def test_cherry_with_bos_scores_after_bos_and_prefix() -> None:
    tokenizer = bos_tokenizer(byte_tokenizer(), "<|end|>", END)
    _, sequences = encoder("cherry", tokenizer=tokenizer).encode([single("Q", "yes")])
    assert shown(sequences)[1] == alone("¶### Response:yes", "yes")
    assert sequences[0].token_ids[0] == END
    assert END not in sequences[0].token_ids[1:]


def test_the_document_token_of_the_model_goes_before_the_tokenizers_own() -> None:
    _, sequences = encoder("aligned", document=5).encode([single("Q", "yes")])
    assert sequences[1].token_ids[:2] == [5, 88]  # "y" is at 88


def test_braces_in_a_prompt_are_text() -> None:
    _, sequences = encoder("superfiltering").encode([single("{instruction} {0}", "{", "{input}")])
    assert shown(sequences) == []  # one token, which nothing precedes
    _, sequences = encoder("aligned").encode([single("{instruction} {0}", "{", "{input}")])
    assert shown(sequences)[0] == conditioned("{instruction} {0}\n{input}\n{", "{")


def test_bos_then_eos_then_an_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "!"
    _, sequences = encoder("aligned", tokenizer=tokenizer).encode([single("Q", "yes")])
    assert shown(sequences)[1] == alone("!yes", "yes")
    tokenizer.bos_token = None
    _, sequences = encoder("aligned", tokenizer=tokenizer).encode([single("Q", "yes")])
    assert shown(sequences)[1] == alone("¶yes", "yes")
    tokenizer.eos_token = None
    with pytest.raises(ScorerError, match="protocol aligned needs a BOS or an EOS token"):
        encoder("aligned", tokenizer=tokenizer)
    with pytest.raises(ScorerError, match="protocol small2large scores the EOS token"):
        encoder("small2large", tokenizer=tokenizer)


def test_a_model_without_chat_template_is_refused() -> None:
    with pytest.raises(ScorerError, match="protocol chat: the model has no chat template"):
        encoder("chat")


# Prompt "abc\n" is four tokens and the response "0123" four more. Columns: the limit, the row, and what is scored of
# the conditioned and of the alone view.
@pytest.mark.parametrize(
    ("protocol", "limit", "status", "first", "second"),
    [
        ("superfiltering", 8, "ok", "0123", "123"),
        ("superfiltering", 7, "truncated", "012", "123"),  # alone is cut to 7 - 4 + 1 tokens: not at all
        ("superfiltering", 6, "truncated", "01", "12"),
        ("superfiltering", 5, "truncated", "0", "1"),
        ("superfiltering", 4, "prompt_too_long", None, None),
        ("superfiltering", 3, "prompt_too_long", None, None),
        ("aligned", 8, "ok", "0123", "0123"),
        ("aligned", 7, "truncated", "012", "012"),
        ("aligned", 5, "truncated", "0", "0"),
        ("aligned", 4, "prompt_too_long", None, None),
    ],
)
def test_length_borders(protocol: str, limit: int, status: str, first: str | None, second: str | None) -> None:
    turns, sequences = encoder(protocol, limit).encode([single("abc", "0123")])
    assert rows(turns) == [(0, status, 4)]
    assert [scored for _, _, scored in shown(sequences)] == ([[first], [second]] if first else [])
    assert all(s.targets[-1].end == len(s.token_ids) for s in sequences), "tokens that nothing is scored on"


def test_length_borders_of_cherry() -> None:
    """The alone view is cut to `limit - prompt + 4` tokens, 13 of which are the prefix where a token is a byte."""
    prompt = len(ALPACA_Q)
    response = "0123456789abcdef"  # 16 tokens; whole with the prefix: 29
    for limit, status, scored in [
        (prompt + 25, "ok", [response, response]),
        (prompt + 24, "truncated", [response, response[:15]]),
        (prompt + 10, "truncated", [response[:10], response[:1]]),
        (prompt + 9, "prompt_too_long", None),
    ]:
        turns, sequences = encoder("cherry", limit).encode([single("Q", response)])
        assert rows(turns) == [(0, status, prompt)]
        assert [text for _, _, [text] in shown(sequences)] == (scored or [])


def test_length_borders_of_small2large() -> None:
    prompt = len(ALPACA_Q)
    for limit, status, scored in [
        (prompt + 4, "ok", "yes¶"),
        (prompt + 3, "truncated", "yes"),
        (prompt + 1, "truncated", "y"),
        (prompt, "prompt_too_long", None),
    ]:
        turns, sequences = encoder("small2large", limit).encode([single("Q", "yes")])
        assert rows(turns) == [(0, status, prompt)]
        assert [text for _, _, [text] in shown(sequences)] == ([scored] if scored else [])


def test_bos_counts_towards_the_limit() -> None:
    tokenizer = bos_tokenizer(byte_tokenizer(), "<|end|>", END)
    _, sequences = encoder("superfiltering", 7, tokenizer).encode([single("abc", "0123")])  # prompt: 5 tokens
    assert shown(sequences) == [conditioned("¶abc\n01", "01"), alone("¶01", "01")]


def test_a_response_of_one_token() -> None:
    with_bos = bos_tokenizer(byte_tokenizer(), "<|end|>", END)
    for protocol, tokenizer, status in [
        ("superfiltering", None, "no_scorable_token"),
        ("superfiltering", with_bos, "ok"),
        ("cherry", None, "ok"),
        ("small2large", None, "ok"),
        ("aligned", None, "ok"),
    ]:
        turns, sequences = encoder(protocol, tokenizer=tokenizer).encode([single("Q", "y")])
        assert [row.status for row in turns] == [status]
        assert [scored for _, _, [scored] in shown(sequences)] == {
            "no_scorable_token": [],
            "ok": ["y¶"] if protocol == "small2large" else ["y", "y"],
        }[status]


@pytest.mark.parametrize("protocol", ["superfiltering", "aligned", "chat"])
def test_a_text_of_any_length_is_read_as_far_as_the_limit(protocol: str) -> None:
    tokenizer = chat_tokenizer()
    most = 64
    far = encoder(protocol, most, tokenizer)
    near = encoder(protocol, most, tokenizer)
    words = "words and more of them. " * 100_000  # 2.4 MB
    for long, short in ((words, words[:400]), (words[:401], words[:400])):
        turns, sequences = far.encode([single("Go on", long)])
        again, expected = near.encode([single("Go on", short)])
        assert (rows(turns), shown(sequences)) == (rows(again), shown(expected))
        assert turns[0].status == RowStatus.TRUNCATED
    assert far.encode([single(words, "yes please")])[0][0].status == RowStatus.PROMPT_TOO_LONG


def test_records_without_turns_keep_their_row_and_order() -> None:
    records = [
        single("Q", "yes", record_id=3),
        Record(4, "data.jsonl:5", status=RowStatus.BAD_JSON),
        single("R", "no!", record_id=5),
    ]
    turns, sequences = encoder("superfiltering").encode(records)
    assert [(t.record_id, str(t.status), t.prompt_tokens) for t in turns] == [
        (3, "ok", 2),
        (4, "bad_json", None),
        (5, "ok", 2),
    ]
    assert [(s.record_id, s.view) for s in sequences] == [
        (3, View.CONDITIONED),
        (3, View.ALONE),
        (5, View.CONDITIONED),
        (5, View.ALONE),
    ]
    assert encoder("superfiltering").encode([]) == ([], [])


TWO = (turn("A", "one"), turn("B", "two"))


@pytest.mark.parametrize(
    ("protocol", "starts", "expected"),
    [
        (
            "superfiltering",
            [2, 8],
            [conditioned("A\none\nB\ntwo", "one", "two"), alone("one", "ne"), alone("two", "wo")],
        ),
        ("aligned", [2, 8], [conditioned("A\none\nB\ntwo", "one", "two"), alone("¶one", "one"), alone("¶two", "two")]),
        (
            "chat",
            [18, 42],
            [
                conditioned("<user>A<assistant>one</><user>B<assistant>two", "one", "two"),
                alone("¶one", "one"),
                alone("¶two", "two"),
            ],
        ),
    ],
)
def test_turns_share_one_conditioned_sequence(protocol: str, starts: list[int], expected: Shown) -> None:
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([talk(*TWO)])
    assert rows(turns) == [(0, "ok", starts[0]), (1, "ok", starts[1])]
    assert shown(sequences) == expected
    assert [t.turn for s in sequences for t in s.targets] == [0, 1, 0, 1]


def test_turns_under_the_alpaca_template() -> None:
    _, sequences = encoder("cherry").encode([talk(*TWO)])
    first, second = (ALPACA_HEAD + f"### Instruction:\n{q}\n\n### Response:" for q in "AB")
    assert shown(sequences)[0] == conditioned(f"{first}one\n\n{second}two", "one", "two")
    _, sequences = encoder("small2large").encode([talk(*TWO)])
    assert shown(sequences) == [conditioned(f"{first}one¶\n\n{second}two¶", "one¶", "two¶")]


@pytest.mark.parametrize("protocol", ["superfiltering", "aligned", "chat"])
def test_a_long_conversation_is_cut_at_the_right(protocol: str) -> None:
    three = talk(*TWO, turn("C", "six"))
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")  # the plain text again
    turns, sequences = encoder(protocol, 10, tokenizer).encode([three])  # "A\none\nB\ntwo\nC\nsix"
    assert rows(turns) == [(0, "ok", 2), (1, "truncated", 8), (2, "prompt_too_long", 14)]
    assert shown(sequences)[0] == conditioned("A\none\nB\ntw", "one", "tw")
    assert shown(sequences)[2:] == [alone("two", "wo") if protocol == "superfiltering" else alone("¶tw", "tw")]


@pytest.mark.parametrize(
    ("protocol", "whole"),
    [
        ("superfiltering", "A\none\nB\n \nC\nsix"),
        ("aligned", "A\none\nB\n \nC\nsix"),
        ("chat", "<user>A<assistant>one</><user>B<assistant> </><user>C<assistant>six"),
    ],
)
def test_an_empty_response_is_history_and_not_scored(protocol: str, whole: str) -> None:
    record = talk(turn("A", "one"), turn("B", " ", RowStatus.EMPTY_RESPONSE), turn("C", "six"))
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([record])
    assert [(row.turn, row.status) for row in turns] == [(0, "ok"), (1, "empty_response"), (2, "ok")]
    assert turns[1].prompt_tokens is None
    assert shown(sequences)[0] == conditioned(whole, "one", "six")
    assert [s.targets[0].turn for s in sequences[1:]] == [0, 2]


@pytest.mark.parametrize(
    ("protocol", "whole"),
    [
        ("superfiltering", "\nHello!\nB\ntwo"),
        ("aligned", "\nHello!\nB\ntwo"),
        ("chat", "<assistant>Hello!</><user>B<assistant>two"),
    ],
)
def test_a_conversation_that_begins_with_the_assistant(protocol: str, whole: str) -> None:
    record = talk(turn("", "Hello!", RowStatus.EMPTY_PROMPT), turn("B", "two"))
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([record])
    assert [row.status for row in turns] == ["empty_prompt", "ok"]
    assert shown(sequences)[0] == conditioned(whole, "two")
    assert len(sequences) == 2


@pytest.mark.parametrize("protocol", ["superfiltering", "aligned", "chat"])
def test_a_fault_ends_what_can_be_read(protocol: str) -> None:
    unread = Turn((), "", status=RowStatus.NOT_TEXT)
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([talk(turn("A", "one"), unread, unread)])
    assert [row.status for row in turns] == ["ok", "not_text", "not_text"]
    assert [t.turn for s in sequences for t in s.targets] == [0, 0]
    # No reader makes a record that can be read again after a fault; if one did, nothing is scored after the hole.
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([talk(*TWO, unread, turn("C", "six"))])
    assert [t.turn for s in sequences for t in s.targets] == [0, 1, 0, 1]
    turns, sequences = encoder(protocol, tokenizer=chat_tokenizer()).encode([talk(unread)])
    assert (rows(turns), sequences) == ([(0, "not_text", None)], [])


def test_system_and_tool_messages_are_prompt() -> None:
    prompt = (Message("system", "S"), Message("user", "A"), Message("tool", "T"))
    record = talk(Turn(prompt, "one"))
    _, sequences = encoder("chat", tokenizer=chat_tokenizer()).encode([record])
    assert shown(sequences)[0] == conditioned("<system>S<user>A<tool>T<assistant>one", "one")
    _, sequences = encoder("superfiltering").encode([record])
    assert shown(sequences)[0] == conditioned("S\nA\nT\none", "one")


def test_input_goes_to_the_user_and_not_to_the_system() -> None:
    record = talk(Turn((Message("system", "S"), Message("user", "A")), "one", "in"))
    _, sequences = encoder("chat", tokenizer=chat_tokenizer()).encode([record])
    assert shown(sequences)[0] == conditioned("<system>S<user>A\nin<assistant>one", "one")


@pytest.mark.parametrize(
    ("normalizer", "filler"),
    [
        (normalizers.BertNormalizer(strip_accents=False, lowercase=False), "\x01"),  # drops control characters
        (normalizers.Replace(Regex("[ ]+"), " "), " "),
    ],
)
@pytest.mark.parametrize("protocol", ["superfiltering", "aligned", "small2large"])
def test_a_text_is_cut_by_its_tokens_alone(protocol: str, normalizer: Any, filler: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    encode = encoder(protocol, 400, tokenizer).encode
    plain, padded = (encode([single(f"Is {more}it?", f"It {more}is.")]) for more in ("", filler * 200_000))
    assert padded == plain
    assert rows(plain[0])[0][1] == "ok"


def test_a_template_that_trims() -> None:
    trims = CHATML.replace("m['content']", "m['content'] | trim")
    record = talk(turn("A", "one "), turn("B", "two"), turn("C", "six"))
    turns, sequences = encoder("chat", tokenizer=chat_tokenizer(trims)).encode([record])
    again = "<user>A<assistant>one</><user>B<assistant>"
    assert shown(sequences) == [
        conditioned(again + "two</><user>C<assistant>six", "one", "two", "six"),  # what the template makes of "one "
        alone("¶one", "one"),
        alone("¶two", "two"),
        alone("¶six", "six"),
    ]
    assert rows(turns) == [(0, "ok", 18), (1, "ok", len(again)), (2, "ok", len(again) + 24)]


def test_a_template_that_drops_earlier_turns() -> None:
    last_only = CHATML.replace("in messages", "in messages[-2:]")
    _, sequences = encoder("chat", tokenizer=chat_tokenizer(last_only)).encode([talk(*TWO)])
    assert shown(sequences) == [
        conditioned("<user>A<assistant>one", "one"),
        alone("¶one", "one"),
        conditioned("<user>B<assistant>two", "two"),
        alone("¶two", "two"),
    ]


def test_a_template_that_writes_nothing() -> None:
    for template in ("{{ '' }}", "{{ messages[0]['content'] }}", CHATML + CHATML):  # or not the response, or it twice
        silent = encoder("chat", tokenizer=chat_tokenizer(template))
        assert silent.encode([single("Q", "yes")]) == ([EncodedTurn(0, 0, RowStatus.CHAT_TEMPLATE_ERROR)], [])


def test_a_template_that_refuses() -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    refused = talk(Turn((Message("system", "S"), Message("user", "A")), "one"), turn("B", "two"))
    turns, sequences = encoder("chat", tokenizer=chat_tokenizer(no_system)).encode([refused, single("A", "one")])
    assert rows(turns) == [(0, "chat_template_error", None), (1, "chat_template_error", None), (0, "ok", 18)]
    assert len(sequences) == 2


def test_a_template_that_refuses_one_turn() -> None:
    user_last = "{% if messages[-2]['role'] != 'user' %}{{ raise_exception('user last') }}{% endif %}" + CHATML
    record = talk(turn("A", "one"), Turn((Message("tool", "T"),), "two"), turn("C", "six"))
    turns, sequences = encoder("chat", tokenizer=chat_tokenizer(user_last)).encode([record])
    assert [row.status for row in turns] == ["ok", "chat_template_error", "ok"]
    assert shown(sequences)[0] == conditioned(
        "<user>A<assistant>one</><tool>T<assistant>two</><user>C<assistant>six", "one", "six"
    )


@pytest.fixture(scope="module")
def bpe(smollm2: ModelFiles) -> Any:
    return load_tokenizer(smollm2)


def test_the_boundary_is_the_prompts_own_count_where_a_merge_crosses_it(bpe: Any) -> None:
    """Two line feeds become one token, half of it the prompt's: the response is scored from the token after it."""
    feed, two_feeds, answer = bpe("\n")["input_ids"], bpe("\n\n")["input_ids"], bpe("Yes it is")["input_ids"]
    question = bpe("Is it?")["input_ids"]
    assert [len(ids) for ids in (feed, two_feeds, answer, question)] == [1, 1, 3, 3]
    record = single("Is it?", "\n\nYes it is")
    turns, sequences = encoder("superfiltering", tokenizer=bpe).encode([record])
    assert rows(turns) == [(0, "ok", 4)]
    assert sequences == [
        TokenSequence(0, View.CONDITIONED, question + two_feeds + feed + answer, (Span(0, 4, 8),)),
        TokenSequence(0, View.ALONE, feed + feed + answer, (Span(0, 1, 5),)),
    ]
    _, sequences = encoder("aligned", tokenizer=bpe, document=0).encode([record])
    assert sequences == [
        TokenSequence(0, View.CONDITIONED, question + feed + feed + feed + answer, (Span(0, 4, 9),)),
        TokenSequence(0, View.ALONE, [0, *feed, *feed, *answer], (Span(0, 1, 6),)),
    ]


def test_a_merge_that_leaves_no_token_of_the_response(bpe: Any) -> None:
    turns, sequences = encoder("superfiltering", tokenizer=bpe).encode([single("Is it?", "\n")])
    assert [row.status for row in turns] == ["no_scorable_token"]
    assert sequences == []


texts = st.text(st.sampled_from("aZ é\n\n.,:# 12漢🙂"), max_size=40).filter(str.strip)
limits = st.integers(1, 40)


def published(tokenizer: Any, prompt: str, response: str, limit: int, prefix: str, slack: int) -> list[Any]:
    """What the published scripts compute for a row: (ids, first labelled position, end) conditioned, then alone.

    Each text is encoded by itself and cut at the right; the loss is the mean over the positions that have a label and
    something before them. The alone view has what the cut prompt leaves, and `slack` tokens more.
    """

    def view(before: str, room: int) -> tuple[list[int], int, int]:
        ids = tokenizer.encode(before + response, truncation=True, max_length=room)
        return ids, max(len(tokenizer.encode(before)), 1), len(ids)

    prompt_tokens = len(tokenizer.encode(prompt, truncation=True, max_length=limit))
    return [view(prompt, limit), view(prefix, limit - prompt_tokens + slack)]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("protocol", ["superfiltering", "cherry"])
def test_tokens_are_those_of_the_published_scripts(bpe: Any, protocol: str, adds_bos: bool) -> None:
    tokenizer = bos_tokenizer(bpe, "<|im_start|>", 1) if adds_bos else bpe
    prefix, slack = {"superfiltering": ("", 1), "cherry": ("### Response:", 4)}[protocol]
    seen = set()

    @settings(max_examples=60, deadline=None)
    @given(prompt=texts, extra=st.one_of(st.just(""), texts), response=texts, limit=limits)
    @example(prompt="a", extra="", response="\n.", limit=40)
    @example(prompt="a", extra="", response="a.", limit=1)
    @example(prompt="a", extra="", response="a. a. a.", limit=5)
    def check(prompt: str, extra: str, response: str, limit: int) -> None:
        if protocol == "superfiltering":
            before = f"{prompt}\n{extra}\n" if extra else f"{prompt}\n"
        else:  # the template alone is some thirty tokens
            limit += 30
            before = ALPACA_INPUT_HEAD if extra else ALPACA_HEAD
            before += f"### Instruction:\n{prompt}\n\n"
            before += f"### Input:\n{extra}\n\n### Response:" if extra else "### Response:"
        theirs = published(tokenizer, before, response, limit, prefix, slack)
        [row], sequences = encoder(protocol, limit, tokenizer).encode([single(prompt, response, extra)])
        seen.add(row.status)
        if all(first < end for _, first, end in theirs):
            assert row.status.scored
            assert [(s.token_ids, s.targets) for s in sequences] == [(i, (Span(0, f, e),)) for i, f, e in theirs]
            whole = published(tokenizer, before, response, 10_000, prefix, slack)
            cut = [ids for ids, _, _ in whole] != [ids for ids, _, _ in theirs]
            assert row.status == (RowStatus.TRUNCATED if cut else RowStatus.OK)
        else:
            assert row.status in (RowStatus.PROMPT_TOO_LONG, RowStatus.NO_SCORABLE_TOKEN)
            assert sequences == []

    check()
    assert {RowStatus.OK, RowStatus.TRUNCATED, RowStatus.PROMPT_TOO_LONG} <= seen, "the drawn texts show too little"


def scored_tokens(sequences: list[TokenSequence], number: int) -> list[tuple[View, list[int], int]]:
    """For each view of a turn, all tokens up to the end of its span, and where the span begins."""
    return [(s.view, s.token_ids[: t.end], t.start) for s in sequences for t in s.targets if t.turn == number]


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@settings(max_examples=25, deadline=None)
@given(data=st.lists(st.tuples(texts, texts), min_size=2, max_size=4), limit=st.integers(20, 200))
@example(data=[("a", "a\n"), ("a", "a"), ("a", "a\n\n"), ("a", "a")], limit=200)
def test_a_turn_is_scored_as_if_the_conversation_ended_there(
    bpe: Any, protocol: str, data: list[tuple[str, str]], limit: int
) -> None:
    turns = [turn(prompt, response) for prompt, response in data]
    mine = encoder(protocol, limit, bpe, 0)
    table, sequences = mine.encode([talk(*turns)])
    assert len(table) == len(turns)
    for sequence in sequences:
        ends = [0, *(t.end for t in sequence.targets)]
        assert all(end <= t.start < t.end for end, t in zip(ends, sequence.targets, strict=False)), "spans overlap"
        assert ends[-1] == len(sequence.token_ids)
    if protocol != "chat":
        assert sum(s.view == View.CONDITIONED for s in sequences) == any(row.status.scored for row in table)
    for number, row in enumerate(table):
        shorter, alike = mine.encode([talk(*turns[: number + 1])])
        assert row == shorter[number]
        assert scored_tokens(sequences, number) == scored_tokens(alike, number)


SENTENCES = [
    ("Name a colour.", "", "Red is a colour."),
    ("Translate into German.", "Good morning", "Guten Morgen"),
    ("Add the numbers.", "17 and 25", "17 + 25 = 42"),
    ("Write one line about the sea.", "", "The tide returns what the evening took.\n"),
    ("Fix the typo.", "I liek tea.", "I like tea."),
    ("Give three fruits.", "", "\n1. apple\n2. pear\n3. fig"),
    ("Was ist ein Berg?", "", "Ein Berg ist eine hohe Erhebung der Erdoberfläche. ⛰"),
    ("Reverse the word.", "stone", "enots"),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On busy cores torch's threads spend twenty times the work in waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_perplexities_are_those_of_a_plain_loop(smollm2: ModelFiles, bpe: Any) -> None:
    """From text to the score table with the embedded model, beside `model(ids, labels=labels).loss` of each row."""
    records = [single(prompt, response, extra, i) for i, (prompt, extra, response) in enumerate(SENTENCES)]
    turns, batch = encoder("superfiltering", tokenizer=bpe).encoder.encode(records)
    engine = ReferenceEngine(ScoreConfig(engine="reference", dtype="float32", device="cpu"), smollm2)
    scores = list(engine.score([batch]))  # a sequence at a time, in order
    table = score_table(
        turns, batch, *(np.concatenate([getattr(s, n) for s in scores]) for n in SCORES), two_views=True
    )
    assert table["status"].to_list() == ["ok"] * len(SENTENCES)
    for row, (prompt, extra, response) in zip(table.iter_rows(named=True), SENTENCES, strict=True):
        before = f"{prompt}\n{extra}\n" if extra else f"{prompt}\n"
        theirs = published(bpe, before, response, 1024, "", 1)
        for name, (ids, first, _) in zip(("ppl_conditioned", "ppl_alone"), theirs, strict=True):
            labels = torch.tensor([ids])
            labels[0, :first] = -100
            with torch.inference_mode():
                loss = float(engine.model(torch.tensor([ids]), labels=labels).loss)
            assert row[name] == pytest.approx(math.exp(loss), rel=1e-5)


def test_protocols_are_data() -> None:
    """A protocol of one's own is the fields of another, changed: nothing goes by its name."""
    mine = replace(PROTOCOLS["superfiltering"], name="mine", score_eos=True)
    _, sequences = ListEncoder(Encoder(BYTES, mine, 1024)).encode([single("Q", "yes")])
    assert shown(sequences) == [conditioned("Q\nyes¶", "yes¶"), alone("yes¶", "es¶")]
