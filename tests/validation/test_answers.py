"""Greedy answers of a tiny model, whose tokens are bytes: in batches, up to the token that ends one, and none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from bench.lib.families import VOCABULARY
from scorer.config import ScoreConfig
from scorer.encoding.chat import Conversation
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import load_tokenizer
from scorer.runs.progress import Silent
from scorer.types import ScorerError
from scorer.validation.answers import AnswerOptions, answer
from tests.lib.command import assert_gone

Tiny = Callable[[str], ModelFiles]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = AnswerOptions(ScoreConfig(device="cpu", dtype="float32"), max_tokens=24, by="transformers")
QUESTIONS = ("Why?", "Count from one to ten, and then back again. " * 3, "a", "Name two rivers in Europe.", "z" * 500)


@pytest.fixture(scope="module")
def chat(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny("llama").path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return find_model(str(folder))


def ask(text: str, role: str = "user") -> Conversation:
    return Conversation([{"role": role, "content": text}])


def answers(files: ModelFiles, *texts: str, options: AnswerOptions = OPTIONS) -> list[str | None]:
    return answer(files, list(map(ask, texts)), options, Silent())


def test_a_batch_answers_as_each_prompt_alone(chat: ModelFiles) -> None:
    together = answers(chat, *QUESTIONS)
    assert together == [answers(chat, question)[0] for question in QUESTIONS]
    assert len(set(together)) == len(QUESTIONS)
    assert answers(chat) == []


def test_an_answer_ends_where_model_or_template_say(chat: ModelFiles, tmp_path: Path) -> None:
    """A letter that the model says becomes an EOS, and then a special token that the template ends turns with."""
    (whole,) = answers(chat, "Why?")
    assert whole
    letter = next(c for c in whole[1:] if c.isascii() and c.isalpha() and c not in TEMPLATE + "Why?")
    short = whole.partition(letter)[0]

    model = shutil.copytree(chat.path, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text()) | {"eos_token_id": [256, VOCABULARY[letter]]}
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}  # which is not followed
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert answers(find_model(str(model)), "Why?") == [short]

    template = shutil.copytree(chat.path, tmp_path / "template")
    tokenizer = load_tokenizer(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": [letter]})
    tokenizer.save_pretrained(template)
    ends = f"{{% if m.role == 'assistant' %}}{letter}{{% else %}}<|end|>{{% endif %}}"
    (template / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", ends))
    assert answers(find_model(str(template)), "Why?") == [short]


def test_a_prompt_without_an_answer(chat: ModelFiles) -> None:
    """2,048 tokens of context, 24 for the answer; <user>, <|end|> and <assistant> are 6, 1 and 11."""
    fits, tight = "x" * (2048 - 24 - 18), "x" * (2048 - 24 - 17)
    assert [found is None for found in answers(chat, fits, tight, "Why?")] == [False, True, False]
    assert answer(chat, [ask("Be brief.", "system")], OPTIONS, Silent()) == [None]


def test_a_model_that_cannot_chat(tiny: Tiny, chat: ModelFiles) -> None:
    with pytest.raises(ScorerError, match="has no chat template to answer with"):
        answers(tiny("llama"), "Why?")
    with pytest.raises(ScorerError, match="by: 'magic' is not one of auto, transformers, vllm"):
        answers(chat, "Why?", options=replace(OPTIONS, by="magic"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM for CPU")
def test_vllm_gives_the_same_answers_and_ends(
    chat: ModelFiles, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(chat, *QUESTIONS)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(temporary))
    assert answers(chat, *QUESTIONS, options=replace(OPTIONS, by="vllm")) == expected
    assert os.environ["VLLM_RPC_BASE_PATH"] == str(temporary)
    assert not list(temporary.iterdir())
    assert_gone([process for process in psutil.Process().children(recursive=True) if "VLLM::" in process.name()])
