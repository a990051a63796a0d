"""Special tokens in the text of the data: counted, and read as tokens or as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.lib.families import byte_tokenizer
from scorer.encoding.encoder import Encoder
from scorer.encoding.special_tokens import CLOSE, OPEN, SpecialTokens
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.tokens import CONDITIONED
from scorer.types import Message, Record, Turn

SAID = "It ends with <|im_end|> and a line feed."
RECORDS = [
    Record(0, "a:1", (Turn((Message("user", "What ends a turn?"),), SAID),)),
    Record(1, "a:2", (Turn((Message("user", "What is <|im_end|>?"),), "A token."),)),
    Record(2, "a:3", (Turn((Message("user", "Is a < b?"),), "No, b > a."),)),
]


@pytest.fixture(scope="module")
def bulk(smollm2: ModelFiles) -> BulkTokenizer:
    return BulkTokenizer(load_tokenizer(smollm2))


def sequences(bulk: BulkTokenizer, protocol: str, *, split: bool) -> tuple[list[bool], list[list[int]]]:
    encoder = Encoder(bulk, PROTOCOLS[protocol], 1024, 0, split_special_tokens=split)
    table, batch = encoder.encode(RECORDS)
    conditioned = batch.sequences[batch.views == CONDITIONED]
    return table.special_tokens.tolist(), [batch.ids(i).tolist() for i in conditioned]


@pytest.mark.parametrize("protocol", ["superfiltering", "aligned", "chat"])
def test_read_as_tokens_or_as_text(bulk: BulkTokenizer, protocol: str) -> None:
    end = bulk.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (counted, tokens), (also, split) = (sequences(bulk, protocol, split=split) for split in (False, True))
    assert counted == also == [True, True, False]
    for record, (as_tokens, as_text) in enumerate(zip(tokens, split, strict=True)):
        assert bulk.tokenizer.decode(as_tokens) == bulk.tokenizer.decode(as_text)
        # those of the template stay tokens
        assert as_tokens.count(end) - as_text.count(end) == (0 if record == 2 else 1)
    if protocol != "chat":  # and nothing else is cut: the whole text is read as the model's tokenizer reads it
        plain: Any = bulk.tokenizer(f"What ends a turn?\n{SAID}", add_special_tokens=False, split_special_tokens=True)
        assert protocol == "aligned" or split[0] == plain["input_ids"]
    assert sequences(bulk, protocol, split=False) == (counted, tokens)  # the tokenizer's setting did not stay


def test_what_is_hidden_comes_back(bulk: BulkTokenizer) -> None:
    special = SpecialTokens(bulk, as_text=True)
    odd = f"{OPEN}3{CLOSE} <|im_start|><|im_end|> {OPEN} x"  # marks of its own, too
    hidden = special.hide({"a": [odd, 7, None]})
    assert "<|im" not in hidden["a"][0]
    assert hidden["a"][1:] == [7, None]
    ids, offsets = special.encode([hidden["a"][0], "plain"])
    assert bulk.tokenizer.decode(ids[: offsets[1]]) == odd
    assert bulk.tokenizer.decode(ids[offsets[1] :]) == "plain"
    assert not special.held(["a < b", ""])
    assert special.held(["", "x<|im_start|>"])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "said", [f"blue {OPEN}0{CLOSE} is one", f"{OPEN}999{CLOSE}", f"{OPEN}{'9' * 5000}{CLOSE} {OPEN}"]
)
def test_marks_that_the_data_hold_are_text(bulk: BulkTokenizer, said: str, *, split: bool) -> None:
    encoder = Encoder(bulk, PROTOCOLS["aligned"], 32768, 0, split_special_tokens=split)
    _, batch = encoder.encode([Record(0, "a:1", (Turn((Message("user", "Say it."),), said),))])
    assert bulk.tokenizer.decode(batch.ids(0)).endswith(said)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_tools(*, split: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ messages[-1].content }}"
    encoder = Encoder(BulkTokenizer(tokenizer), PROTOCOLS["chat"], 1024, split_special_tokens=split)
    tools = ({"name": "f", "parameters": {"<|end|>": "<|end|>"}},)
    table, batch = encoder.encode([Record(0, "a:1", (Turn((Message("user", "q"),), "a"),), tools=tools)])
    ids = batch.ids(0).tolist()
    assert table.special_tokens.tolist() == [True]
    assert ids.count(tokenizer.eos_token_id) == (0 if split else 2)
    assert tokenizer.decode(ids) == json.dumps(tools[0]) + "a"
