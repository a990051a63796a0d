"""The model to fine-tune, and the template by which it reads conversations.

Knows tokenizers and templates; neither training nor scores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from scorer.config import ScoreConfig
from scorer.engines.choose import resolve_config
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import check_causal, choose_device, load_tokenizer
from scorer.runs.progress import Progress
from scorer.types import ScorerError
from scorer.validation.config import ValidateConfig
from scorer.validation.recipes import Recipe

TEMPLATES = ("alpaca", "vicuna", "chatml")
TEMPLATE_SUFFIX = ".jinja"
OWN = "the model's own"
MARK = re.compile(r"<\|[^|<>\s]+\|>")  # how the tokens of a chat template look


@dataclass(frozen=True, slots=True)
class Target:
    """A model, its tokenizer with the chat template that it is trained by, and how it is loaded and evaluated.

    config: the device, the length of the recipe, and what loading may do.
    """

    files: ModelFiles
    tokenizer: Any
    config: ScoreConfig


def open_target(config: ValidateConfig, recipe: Recipe, progress: Progress) -> Target:
    """Find the target, and give its tokenizer the recipe's template. Raises ScorerError where they don't fit."""
    assert config.target is not None
    scoring = ScoreConfig(
        model=config.target,
        engine="reference",
        protocol="chat",
        device=choose_device(config.device),
        max_length=recipe.max_length,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    files = find_model(config.target, revision=config.revision, allow_pickle=config.allow_pickle, report=progress.say)
    check_causal(files)
    tokenizer = load_tokenizer(files, trust_remote_code=config.trust_remote_code)
    template = recipe.template
    if template == "auto":
        template = OWN if tokenizer.chat_template else "alpaca"
    if template != OWN:
        tokenizer.chat_template = _read_template(template)
    _check_tokens(tokenizer, files.name, template)
    resolve_config(scoring, files)  # refuses more tokens than the model's context has
    return Target(files, tokenizer, scoring)


def _read_template(name: str) -> str:
    if name in TEMPLATES:
        return package_files("scorer.validation").joinpath(f"templates/{name}{TEMPLATE_SUFFIX}").read_text("utf-8")
    if not name.endswith(TEMPLATE_SUFFIX):
        raise ScorerError(f"template: '{name}' is not auto, {', '.join(TEMPLATES)} or a {TEMPLATE_SUFFIX} file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ScorerError(f"template: {name} can't be read ({error})") from error


def _check_tokens(tokenizer: Any, model: str, template: str) -> None:
    """Raise ScorerError where the template writes a token that the tokenizer would read as text."""
    text = str(tokenizer.chat_template)
    known = tokenizer.get_vocab()
    absent = [mark for mark in dict.fromkeys(MARK.findall(text)) if mark not in known]
    absent += [name for name in ("bos_token", "eos_token") if name in text and getattr(tokenizer, name) is None]
    if absent:
        raise ScorerError(
            f"target: {model} has no token {', '.join(absent)}, which the template ({template}) writes: "
            'give a recipe with another template, such as template = "alpaca"'
        )
