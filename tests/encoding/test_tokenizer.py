"""Bulk tokenising gives the ids of the model's own tokenizer, whichever library does it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from scorer.encoding.encoder import Encoder
from scorer.encoding.tokenizer import BulkTokenizer
from scorer.models.find import ModelFiles
from scorer.models.load import load_tokenizer
from scorer.protocols import PROTOCOLS
from scorer.tokens import Array
from scorer.types import ScorerError

LINES = [
    "The cat sat on the mat, and didn't move.",
    "1. Größe: 25 cm\n2. 漢字 and emoji 🙂",
    "def f(x):\n    return x + 1",
    "हिन्दी की किताब  77 777 7777, 'ſe 'ſt",
] * 20
SPLITS = {
    "llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek coder": r"[\r\n]|\s?\p{L}+|\s?\p{P}+|[一-龥가-힣]+|\p{N}|\s+(?!\S)",
    "words": r"\w+|\s+|[^\w\s]+",  # marks are part of words to tokenizers only
    "threes": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\P{N}+",  # fastokens resumes in the middle of a long number
}
LACKING = "\x04\x06\x13\x14\x16\x1d\U00040000"  # characters whose bytes SmolLM2's vocabulary lacks

characters = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(" \n\t\r'sStTaZ09.,é漢🙂\u200d\u0301\u00a0\ufeff\x00" + LACKING),
)
pieces = st.one_of(
    st.text(characters, max_size=12),
    st.sampled_from(
        ["<|endoftext|>", "<|im_start|>", "<s>", "<tool>", "   ", "\n\n", "'re", "don't", "a" * 300, "١٢٣"]
    ),
    st.sampled_from(["'ſt", "I'ſ", "  \u180e", "हिन्दी", "12345", " Größe", "größe", "it", "a <b", " <b> "]),
)
texts = st.lists(st.lists(pieces, max_size=6).map("".join), max_size=5)


def trained(kind: str) -> Tokenizer:
    """A tokenizer of each make, trained on LINES."""
    special = ["<s>", "<unk>"]
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.normalizer = normalizers.BertNormalizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    elif kind.startswith("llama 2"):
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "llama 2 of transformers 5":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Metaspace()
        hexadecimal = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *hexadecimal])
    else:
        made = Tokenizer(models.BPE(dropout=0.5 if kind == "dropout" else None))
        if kind in SPLITS:
            split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        else:
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "gpt2 with a space")
        if kind == "lower case":
            made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        made.decoder = decoders.ByteLevel()
        alphabet = [] if kind == "few bytes" else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(LINES, trainer)
    made.add_tokens(
        [AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False), AddedToken("Größe", single_word=True)]
    )
    if kind == "overlap":  # what one strips is the beginning of another
        made.add_tokens([AddedToken("it", rstrip=True), AddedToken(" <b"), AddedToken("<b>", lstrip=True)])
    return made


FAST = ("gpt2", "gpt2 with a space", "few bytes", "llama 3", "deepseek coder", "lower case", "llama 2")
KINDS = (*FAST, "words", "threes", "overlap", "llama 2 of transformers 5", "unigram", "wordpiece")


@lru_cache
def opened(kind: str) -> BulkTokenizer:
    return BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=trained(kind), bos_token="<s>", unk_token="<unk>"))


def lists(flat: tuple[Array, Array]) -> list[list[int]]:
    ids, offsets = flat
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    return [part.tolist() for part in np.split(ids, offsets[1:-1])] if len(offsets) > 1 else []


def own(tokenizer: Any, some: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in some]


@pytest.fixture(scope="module")
def smollm2_bulk(smollm2: ModelFiles) -> BulkTokenizer:
    return BulkTokenizer(load_tokenizer(smollm2))


@settings(max_examples=300, deadline=None)
@given(some=texts)
@example(some=[])
@example(some=["", "", ""])
@example(some=["plain", f"a{LACKING}b", "", LACKING, "plain again"])
def test_the_embedded_models_ids(smollm2_bulk: BulkTokenizer, some: list[str]) -> None:
    assert smollm2_bulk.name.startswith("fastokens")
    assert lists(smollm2_bulk.encode(some)) == own(smollm2_bulk.tokenizer, some)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(some=texts)
def test_other_makes_of_tokenizers(kind: str, some: list[str]) -> None:
    bulk = opened(kind)
    assert lists(bulk.encode(some)) == own(bulk.tokenizer, some)


def test_fastokens_does_what_it_does_right_and_no_more() -> None:
    chosen = {kind: opened(kind).name.partition(" ")[0] for kind in KINDS}
    assert chosen == dict.fromkeys(KINDS, "tokenizers") | dict.fromkeys(FAST, "fastokens")


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_and_texts_that_begin_alike(kind: str) -> None:
    bulk = opened(kind)
    for head in (LINES[0] * 150 + "7" * 200, "\n".join(LINES) * 30):
        for some in [[head], [head + "1"], [head + "\n", head, head + " \n", head[:5000] + " it"]]:
            assert lists(bulk.encode(some)) == own(bulk.tokenizer, some)


def test_many_texts_in_threads(smollm2_bulk: BulkTokenizer) -> None:
    some = [f"{line} {number}" + LACKING * (number % 7 == 0) for number in range(100) for line in LINES[:30]]
    expected = own(smollm2_bulk.tokenizer, some)
    with ThreadPoolExecutor(3) as pool:
        for flat in pool.map(smollm2_bulk.encode, [some] * 6):
            assert lists(flat) == expected


def test_a_random_tokenizer_is_left_to_transformers() -> None:
    """Any of its ids are right that stand for the text, and no other library is known to draw them alike."""
    bulk = opened("dropout")
    assert bulk.name.startswith("transformers")
    one, *others = (lists(bulk.encode(LINES[2:4])) for _ in range(5))
    assert any(other != one for other in others)
    for drawn in (one, *others):
        assert [bulk.tokenizer.decode(ids) for ids in drawn] == LINES[2:4]


class Letters(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in Python: one token a character of ASCII, and another for the others."""

    @property
    def vocab_size(self) -> int:
        return 129

    def get_vocab(self) -> dict[str, int]:
        return {"<unk>": 128, **{chr(number): number for number in range(128)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return min(ord(token), 128) if len(token) == 1 else 128

    def _convert_id_to_token(self, number: int) -> str:
        return chr(number) if number < 128 else "<unk>"


LETTERS = BulkTokenizer(Letters(unk_token="<unk>", eos_token="<s>"))


@settings(max_examples=60, deadline=None)
@given(some=texts)
def test_a_tokenizer_in_python(some: list[str]) -> None:
    assert LETTERS.name.startswith("transformers")
    assert lists(LETTERS.encode(some)) == own(LETTERS.tokenizer, some)


def test_saved_truncation_and_padding_are_left_out() -> None:
    backend = trained("gpt2")
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    bulk = BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    [ids] = lists(bulk.encode([LINES[0]]))
    assert bulk.tokenizer.decode(ids) == LINES[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"b": 0}, unk_token="?"), "does not work: .*Missing"),  # an error for nearly any text
        (models.BPE({}, []), "does not work"),
    ],
)
def test_a_tokenizer_that_fails_is_one_line(model: Any, message: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(ScorerError, match=message):
        Encoder(BulkTokenizer(tokenizer), PROTOCOLS["aligned"], 64)


def test_ids_far_apart_are_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorer.encoding.tokenizer.MOST_IDS", 290)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)} | {"<s>": 300}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bulk = BulkTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert bulk.name.startswith("tokenizers ")
    assert lists(bulk.encode(["ab<s>"])) == own(bulk.tokenizer, ["ab<s>"])
