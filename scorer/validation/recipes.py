"""Recipes: how a target is fine-tuned. Some have names, others are TOML files with the fields of Recipe.

Knows names and limits only; scorer.validation.trainer trains.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scorer.config import Training, check_rates
from scorer.options import TRAINING, check_fields, from_options, option, same_option
from scorer.types import ScorerError

SUFFIX = ".toml"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter (arXiv 2106.09685), in the terms of PEFT's LoraConfig."""

    rank: int = option(TRAINING, 16, "Rank of the adapter.")
    alpha: int = option(TRAINING, 32, "Scale: the adapter's product is multiplied by alpha / rank.")
    dropout: float = option(TRAINING, 0.0, "Dropout before the adapter.", maximum=0.99)
    target_modules: str = option(TRAINING, "all-linear", "Modules that get an adapter, as PEFT names them.")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a target is fine-tuned: the loss is the mean over the tokens of the responses alone, AdamW the optimizer.

    max_length: tokens of prompt and response; longer ones are cut at the right. template: how a conversation becomes
    text; `auto` is the target's own chat template, or alpaca where it has none; or one of TEMPLATES, or a .jinja file.
    lora: None trains all weights.
    """

    learning_rate: float = same_option(Training, "learning_rate")
    epochs: int = same_option(Training, "epochs")
    batch_size: int = same_option(Training, "batch_size")
    device_batch: int | None = same_option(Training, "device_batch")
    scheduler: str = same_option(Training, "scheduler")
    warmup_ratio: float = same_option(Training, "warmup_ratio")
    weight_decay: float = same_option(Training, "weight_decay")
    save_steps: int = same_option(Training, "save_steps")
    max_length: int = option(TRAINING, 1024, "Maximum tokens of prompt and response.")
    template: str = option(TRAINING, "auto", "auto, alpaca, vicuna, chatml, or a .jinja file.")
    lora: Lora | None = option(TRAINING, None, "The LoRA adapter.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_rates(self.learning_rate, self.warmup_ratio, self.weight_decay)

    @property
    def least_records(self) -> int:
        """How many records make a training: a whole batch, and not one step at the warm-up's learning rate of 0."""
        return self.batch_size + (self.epochs == 1 and self.warmup_ratio > 0)


# The papers train all weights of a LLaMA for three epochs: Superfiltering by FastChat with Vicuna's prompts,
# Small2Large (arXiv 2402.10430, section 4) with Alpaca's.
RECIPES: Mapping[str, Recipe] = {
    "lora": Recipe(learning_rate=2e-4, epochs=1, batch_size=16, lora=Lora()),
    "superfiltering": Recipe(max_length=2048, template="vicuna"),
    "small2large": Recipe(max_length=512, template="alpaca"),
}


def read_recipe(name: str, *, full: bool = False) -> Recipe:
    """The recipe of a name or a file; `full` leaves out its LoRA. Raises ScorerError where it can't be read."""
    recipe = _read_file(Path(name)) if name.endswith(SUFFIX) else RECIPES.get(name)
    if recipe is None:
        raise ScorerError(f"recipe: '{name}' is not one of {', '.join(RECIPES)}, nor a {SUFFIX} file")
    return replace(recipe, lora=None) if full else recipe


def _read_file(path: Path) -> Recipe:
    values = read_toml(path)
    lora = values.pop("lora", False)
    if not isinstance(lora, bool | dict):
        raise ScorerError(f"{path}: lora is true, false or a table such as [lora] with rank = 16")
    try:
        adapter = from_options(Lora, lora) if isinstance(lora, dict) else Lora() if lora else None
        return from_options(Recipe, {**values, "lora": adapter})
    except ScorerError as error:
        raise ScorerError(f"{path}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises ScorerError where it can't be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScorerError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ScorerError(f"{path}: is no TOML file that can be read ({error})") from error
