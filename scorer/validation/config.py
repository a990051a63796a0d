"""The options of `scorer validate`, frozen and validated.

Knows names and limits only; neither runs nor models. How a model is trained is a recipe, scorer.validation.recipes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scorer.config import ScoreConfig, parse_names
from scorer.options import EVALUATION, MODEL, OUTPUT, SELECTION, TRAINING, check_fields, option, same_option
from scorer.types import ScorerError

SELECTED = "selected"
BASELINES = ("random", "length", "all")
EQUALS = ("rows", "tokens")
HOLDOUT = 500  # records


@dataclass(frozen=True, slots=True)
class ValidateConfig:
    """What is trained, on which arms, and how the trained models are compared.

    arms: `selected` is what `scorer.select` keeps of the records that are not held out; `random` draws as many of them,
        anew for each seed; `length` takes those with the longest responses; `all` takes all. Or the path of a TOML file
        with a table of options of `scorer.select` for each arm.
    equal: `tokens` gives the baselines as many response tokens, by the target's tokenizer, as the first arm has.
    """

    target: str | None = option(
        MODEL, None, "Model to fine-tune: embedded name, local folder, or Hugging Face name.", unset="must be given"
    )
    revision: str | None = same_option(ScoreConfig, "revision")
    device: str = same_option(ScoreConfig, "device")
    trust_remote_code: bool = same_option(ScoreConfig, "trust_remote_code")
    allow_pickle: bool = same_option(ScoreConfig, "allow_pickle")
    arms: tuple[str, ...] = option(
        SELECTION,
        (SELECTED, "random"),
        "What to train on and compare: selected, random, length, all; or a .toml file of arms.",
        unset="selected,random",
        metavar="NAME,...|FILE",
        parse=parse_names,
    )
    equal: str = option(
        SELECTION, "rows", "Whether baselines have as many rows, or as many response tokens.", choices=EQUALS
    )
    recipe: str = option(
        TRAINING, "lora", "How to train: lora, superfiltering, small2large, or a .toml file.", metavar="NAME|FILE"
    )
    full: bool = option(TRAINING, False, "Train all weights, not a LoRA adapter.")
    seeds: int = option(TRAINING, 3, "How often each arm is trained, with another seed each time.", maximum=1000)
    seed: int = option(TRAINING, 42, "The first seed; it draws the held-out records, too.", minimum=0)
    holdout: int | None = option(
        EVALUATION,
        None,
        "Records that no arm trains on, to compare on.",
        unset=f"{HOLDOUT}, or a quarter where there are few",
    )
    eval_file: str | Path | None = option(
        EVALUATION, None, "Compare on the records of this file instead.", unset="held-out records", flags="--eval"
    )
    resamples: int = option(
        EVALUATION, 1000, "Bootstrap resamples for the intervals; 0 is none.", minimum=0, maximum=100_000
    )
    judge: str | None = option(
        EVALUATION,
        None,
        "Let a model compare answers: the URL of an OpenAI-compatible server, http://HOST:PORT/v1.",
        unset="no",
        metavar="URL",
    )
    judge_model: str | None = option(EVALUATION, None, "The judge's name on that server.", unset="must be given")
    judge_prompts: int = option(EVALUATION, 100, "Prompts to answer and judge, drawn from the held-out records.")
    answer_tokens: int = option(EVALUATION, 512, "Maximum tokens of an answer.")
    keep_models: bool = option(OUTPUT, False, "Keep the trained models.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.target is None:
            raise ScorerError("target: name the model to fine-tune, with --target MODEL")
        if (self.judge is None) != (self.judge_model is None):
            raise ScorerError("judge: --judge URL and --judge-model NAME go together")
        if not isinstance(self.arms, tuple | list):
            raise ScorerError(f"arms: {self.arms!r} is not a tuple of names")
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ScorerError("arms: name each arm once, and at least one")
