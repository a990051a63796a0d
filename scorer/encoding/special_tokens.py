"""Special tokens that the data's own text holds, such as <|im_end|> in an answer about chat formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from scorer.encoding.tokenizer import BulkTokenizer, replaced
from scorer.tokens import Array, bounds_of

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode keeps for a program's own use
HIDDEN = re.compile(f"{OPEN}([0-9]+){CLOSE}")


class SpecialTokens:
    """The special tokens of a tokenizer, found in texts, and with `as_text` tokenised as text.

    A template writes special tokens, too, so those of the data are hidden before it is applied: each is replaced by its
    number between OPEN and CLOSE, and so is each OPEN and CLOSE that the data hold, which are no marks of ours.
    """

    def __init__(self, bulk: BulkTokenizer, *, as_text: bool):
        self._bulk, self._tokenizer, self.as_text = bulk, bulk.tokenizer, as_text
        added = bulk.tokenizer.added_tokens_decoder.values()
        self.tokens = sorted({token.content for token in added if token.special and token.content})
        self._first = {token[0] for token in self.tokens}
        self._texts = [*self.tokens, OPEN, CLOSE]  # what is hidden, by number; longer tokens first in the pattern
        self._number = {text: str(i) for i, text in enumerate(self._texts)}
        self._visible = re.compile("|".join(map(re.escape, sorted(self._texts, key=len, reverse=True))))
        self._special = re.compile(f"({'|'.join(map(re.escape, sorted(self.tokens, key=len, reverse=True)))})")

    def held(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts holds one."""
        for text in texts:
            for first in self._first:  # most texts hold no character that one begins with
                if first in text and any(token in text for token in self.tokens):
                    return True
        return False

    def hide(self, value: Any) -> Any:
        """A text with its special tokens hidden; or a dict or list with those of all its texts."""
        if isinstance(value, str):
            return self._visible.sub(lambda found: f"{OPEN}{self._number[found[0]]}{CLOSE}", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def encode(self, texts: list[str]) -> tuple[Array, Array]:
        """`BulkTokenizer.encode`, with hidden tokens read as text. Beside other special tokens texts are cut.

        Without `as_text` nothing is hidden, and an OPEN is one of the data.
        """
        flat = self._bulk.encode(texts)
        where = [i for i, text in enumerate(texts) if OPEN in text] if self.as_text else []
        if not where:
            return flat
        try:
            ids = [np.array(self._ids(texts[i]), np.int32) for i in where]
        finally:
            self._tokenizer("", split_special_tokens=False)  # tokenizers keeps the setting
        other = np.concatenate(ids), bounds_of(np.array([len(some) for some in ids], np.int64))
        return replaced(flat, np.array(where), other)

    def _ids(self, text: str) -> list[int]:
        parts = self._special.split(text) if self.tokens else [text]
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(part))
            elif part:
                shown = HIDDEN.sub(lambda found: self._texts[int(found[1])], part)
                ids += self._tokenizer(shown, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
