"""Texts -> token ids in bulk, as arrays: the ids of the model's own tokenizer, by the fastest library that gives them.

fastokens writes all ids into one buffer, and takes 3.5 µs for a row of Alpaca on two cores; tokenizers takes 130 to
260. gigatoken (3.9) is as fast, but brings awkward arrays; tokie (6.5) gave other ids for some texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from typing import Any

import fastokens
import numpy as np
import orjson
from tokenizers.pre_tokenizers import ByteLevel

from scorer.faults import faults_of
from scorer.protocols import PROTOCOLS, Protocol
from scorer.tokens import Array, bounds_of, ranges

# fastokens takes U+180E for a space, and tokenizers takes 'ſ for the contraction 's: such texts are for tokenizers.
SEPARATOR, LONG_S = "\u180e", "ſ"
# The parts of a regular expression that mean the same to both, but for these two characters. \w, scripts and POSIX
# classes don't, and with other lookaheads the ids of a long text depend on the texts before it.
ALIKE = re.compile(r"\\[dDsSrnt]|\\p\{[CLMNPSZ][a-z]?\}|\(\?!\\S\)|\(\?i?:|\\\W")
# Blocks of 128 characters: those of nearly every script, and few of the many Han characters, syllables and hieroglyphs.
BLOCKS = (*range(0, 0x3400, 128), 0x4E00, *range(0xA480, 0xAC80, 128), *range(0xF900, 0x12000, 128))
MOST_IDS = 1 << 22  # ten times the largest vocabulary
CHARACTERS = 1 << 20  # tokenised at once by tokenizers, whose encodings take fifty times as much memory as their text
# Texts -> their ids end to end, int32, and where each begins, int64 [len(texts) + 1].
Encode = Callable[[list[str]], tuple[Array, Array]]


class BulkTokenizer:
    """Tokenises many texts at once, without special tokens before or after them.

    tokenizer: a transformers tokenizer, whose ids are the right ones: another library takes its place where it has the
    same ids for all of `hard_texts`. `name` says which it is, with its version.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._what = f"{tokenizer.name_or_path or 'this model'}: the tokenizer does not work"
        with self.checked():
            self.name, self.encode = _fastest(tokenizer)

    def checked(self) -> AbstractContextManager[None]:
        """In the block the tokenizer's errors, which may be any and come at any text, are ScorerError."""
        return faults_of(self._what)


def _fastest(tokenizer: Any) -> tuple[str, Encode]:
    """The library that gives the right ids for all of `hard_texts`, with its version, and its function."""
    texts = hard_texts(tokenizer)
    name = f"transformers {version('transformers')}"
    encode: Encode = partial(_encode_in_chunks, partial(_transformers_ids, tokenizer))
    expected = encode(texts)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return name, encode
    by_tokenizers = partial(_encode_in_chunks, partial(_tokenizers_ids, backend))
    if not _same(by_tokenizers(texts), expected):
        return name, encode
    by_fastokens = _by_fastokens(backend, by_tokenizers)
    if by_fastokens is not None and _same(by_fastokens(texts), expected):
        return f"fastokens {version('fastokens')}", by_fastokens
    return f"tokenizers {version('tokenizers')}", by_tokenizers


def hard_texts(tokenizer: Any) -> list[str]:
    """Texts on which tokenizers tend to differ, and what the protocols write.

    Special tokens in text, spaces, scripts, emoji, controls, random words of every script, and mixes of the
    tokenizer's own tokens.
    """
    special = [str(token) for token in tokenizer.all_special_tokens]
    texts = [
        "",
        "a" * 5000,
        " " * 300 + "x" + "\n" * 300,
        "don't I'LL we've it's 'S  'tis can''t",
        "1234567890 3.14159 1,000,000 ½ ² ٣٤ १२",
        "\r\n\r\n \t\t a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029",
        "漢字かな交じり文。안녕하세요 สวัสดี नमस्ते مرحبا שלום Ωμέγα",
        "e\u0301 \u00e9 \uac00 \u1100\u1161 ﬁ Å \u212b ǆ İ ı ß ẞ",
        "👩‍👩‍👧‍👦 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏽 ☃️",
        "def f(x):\n\tif x:\n        return {'a': [1, 2]}  # note\n",
        "https://example.org/a?b=c&d=%20e#f <b>bold</b> \\frac{1}{2}",
        "".join(map(chr, range(256))),
        "\x00 \x01\x04\x1b\x7f\x85 \ufffd \uffff \U0010ffff",
        *(f"{before}{token}{after}" for token in special for before, after in (("", ""), ("a ", " b"), ("x", "y "))),
        " ".join(special),
        *(token[:-1] for token in special),
        *(text for protocol in PROTOCOLS.values() for text in _protocol_texts(protocol)),
    ]
    draw = random.Random(0)
    for low in (*BLOCKS, *range(0x1D000, 0x1FB00, 128)):
        words = ["".join(chr(low + draw.randrange(128)) for _ in range(draw.randint(1, 9))) for _ in range(6)]
        texts.append(draw.choice(("", " ", "  ", "\n", "'", ".")).join(words))
    return texts + _mixed_texts(tokenizer, draw)


def _mixed_texts(tokenizer: Any, draw: random.Random) -> list[str]:
    """Random tokens of the vocabulary between added ones: what merges, and what is stripped, across a boundary."""
    ids = sorted(tokenizer.get_vocab().values())
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()] or [""]
    some = draw.sample(added, min(len(added), 50))
    spaces = (" ", "  ", "\t", "\n", "\r\n", "\xa0", "\u3000", "")
    texts = []
    for _ in range(200):
        parts = [tokenizer.decode(draw.choices(ids, k=3)) for _ in range(2)]
        if not draw.randrange(4):  # a character that no vocabulary holds
            parts[0] = parts[0][:2] + "\U000f0000" + parts[0][2:]
        parts += [draw.choice((token, token, token.swapcase())) for token in draw.choices(some, k=4)]
        parts += draw.choices(spaces, k=3)
        draw.shuffle(parts)
        texts.append("".join(parts))
    return texts


def _protocol_texts(protocol: Protocol) -> list[str]:
    template, alone = protocol.template, protocol.alone
    written = [] if template is None else [template.with_input, template.without_input, template.separator]
    return written if alone is None else [*written, alone.prefix]


def _by_fastokens(backend: Any, by_tokenizers: Encode) -> Encode | None:
    """fastokens for the definition of a tokenizers.Tokenizer; None where it does not support that."""
    definition = orjson.loads(backend.to_str())
    definition |= {"decoder": None, "post_processor": None}  # not for ids, and some are unknown to fastokens
    first_added = _complete(definition)
    if first_added is None or any(re.search(r"\\|\(\?|\[:", ALIKE.sub("", regex)) for regex in _regexes(definition)):
        return None
    try:
        fast = fastokens.Tokenizer.from_json_str(orjson.dumps(definition).decode())
    except (ValueError, RuntimeError, OSError):
        return None

    def encode(texts: list[str]) -> tuple[Array, Array]:
        try:
            buffer, bounds = fast.encode_batch_flat(texts)
        except (ValueError, RuntimeError):  # a limit of its regular expressions on some text
            return by_tokenizers(texts)
        ids, offsets = np.frombuffer(buffer, np.int32), np.frombuffer(bounds, np.int64)
        lacking = np.flatnonzero(ids >= first_added)
        unsure = [i for i, text in enumerate(texts) if SEPARATOR in text or LONG_S in text]
        if not len(lacking) and not unsure:
            return ids, offsets
        again = np.union1d(np.searchsorted(offsets, lacking, side="right") - 1, np.array(unsure, np.int64))
        return replaced((ids, offsets), again, by_tokenizers([texts[i] for i in again]))

    return encode


def _regexes(part: Any) -> Iterator[str]:
    """The regular expressions of a tokenizer's definition."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "Regex":
                yield value
            elif name != "model":
                yield from _regexes(value)
    elif isinstance(part, list):
        for value in part:
            yield from _regexes(value)


def _complete(definition: dict[str, Any]) -> int | None:
    """Add the bytes that a byte-level vocabulary lacks, without which fastokens refuses a text that holds one.

    tokenizers leaves such bytes out, so a text with an id from the returned one on is not for fastokens. None where the
    ids are too many to fill their gaps.
    """
    vocabulary = definition["model"].get("vocab")
    added = [token["id"] for token in definition["added_tokens"]]
    if not isinstance(vocabulary, dict):
        return np.iinfo(np.int32).max
    first = max([*vocabulary.values(), *added], default=-1) + 1
    if first > MOST_IDS:
        return None
    if "ByteLevel" in orjson.dumps(definition["pre_tokenizer"]).decode():
        lacking = sorted(set(ByteLevel.alphabet()) - vocabulary.keys())
        vocabulary |= {symbol: first + i for i, symbol in enumerate(lacking)}
        # fastokens wants no id left out either: names for them that are in no text.
        vocabulary |= {f"\0{i}": i for i in set(range(first)) - set(vocabulary.values())}
    return first


def replaced(flat: tuple[Array, Array], where: Array, other: tuple[Array, Array]) -> tuple[Array, Array]:
    """`flat`, with the texts numbered `where` (ascending) replaced by those of `other`."""
    (ids, offsets), (new_ids, new_offsets) = flat, other
    lengths, starts = np.diff(offsets), offsets[:-1].copy()
    lengths[where] = np.diff(new_offsets)
    starts[where] = len(ids) + new_offsets[:-1]
    return np.concatenate((ids, new_ids))[ranges(starts, lengths)], bounds_of(lengths)


def _encode_in_chunks(encode: Callable[[list[str]], list[list[int]]], texts: list[str]) -> tuple[Array, Array]:
    arrays: list[Array] = []
    start = 0
    while start < len(texts):
        end, characters = start, 0
        while end < len(texts) and characters < CHARACTERS:
            characters += len(texts[end])
            end += 1
        arrays += [np.array(ids, np.int32) for ids in encode(texts[start:end])]
        start = end
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), bounds_of(lengths)


def _tokenizers_ids(backend: Any, texts: list[str]) -> list[list[int]]:
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _transformers_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = batch["input_ids"]
    return ids


def _same(one: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
