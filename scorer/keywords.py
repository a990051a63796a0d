"""The options of the public functions as types, for type checkers and editors.

tests/test_python_api.py compares them with the dataclasses of options, which have the defaults and the explanations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

from scorer.config import Cluster

Size = str | int | float | Fraction


class DataKeywords(TypedDict, total=False):
    """The fields of scorer.config.Part and ScoreConfig, but for protocol."""

    split: str | None
    subset: str | None
    model: str
    revision: str | None
    engine: str
    dtype: str
    device: str
    max_length: int | None
    batch_tokens: int | None
    compile: bool | None
    shard_rows: int
    limit: int | None
    columns: Mapping[str, str] | None
    reasoning: str
    tool_calls: str
    records_at: str | None
    split_special_tokens: bool
    trust_remote_code: bool
    allow_pickle: bool
    tensor_parallel_size: int | None
    quantization: str | None
    gpu_memory_utilization: float | None
    max_model_len: int | None
    vllm_args: Mapping[str, Any] | None


class ScoreKeywords(DataKeywords, total=False):
    """Options of `scorer.score`."""

    protocol: str


class LearnKeywords(DataKeywords, total=False):
    """Options of `scorer.learn`."""

    strict: bool


class ChoiceKeywords(TypedDict, total=False):
    """The options that say which records are chosen by their scores: scorer.selection.config.CHOICES."""

    keep: Size | None
    by: str | None
    lowest: bool | None
    max_ifd: float | str | None
    aggregate: str
    response: str | None
    per: str | None
    per_cluster: bool
    rounding: str
    bucket: str | None
    diverse: Size | None
    pool: Size | None
    drop_flagged: tuple[str, ...]


class SelectKeywords(ChoiceKeywords, total=False):
    """Options of `scorer.select`: the fields of scorer.selection.config.SelectConfig."""

    random: bool
    seed: int
    form: str | None
    dataset_info: bool
    order: str
    with_scores: bool
    rejected: str | Path | None


class FilterKeywords(ScoreKeywords, SelectKeywords, total=False):
    """Options of `scorer.filter`: those of `scorer.score` and `scorer.select`."""

    fresh: bool
    strict: bool
    cluster: Cluster | None


class ClusterKeywords(TypedDict, total=False):
    """Options of `scorer.cluster`: the fields of scorer.config.ClusterConfig."""

    embedder: str
    max_tokens: int
    device: str
    allow_pickle: bool
    trust_remote_code: bool
    clusters: int | None
    min_mean_size: int
    iterations: int
    seed: int
    flags: bool
    far_below: float
    duplicate_above: float


class CompareKeywords(TypedDict, total=False):
    """Options of `scorer.compare`: the fields of scorer.agreement.config.CompareConfig."""

    by: str | Sequence[str] | None
    lowest: bool | None
    at: str | Sequence[str | float | Fraction]
    resamples: int
    seed: int


class ValidateKeywords(ChoiceKeywords, total=False):
    """Options of `scorer.validate`: the fields of scorer.validation.config.ValidateConfig, and what is selected."""

    target: str | None
    revision: str | None
    device: str
    trust_remote_code: bool
    allow_pickle: bool
    arms: tuple[str, ...]
    equal: str
    recipe: str
    full: bool
    seeds: int
    seed: int
    holdout: int | None
    eval_file: str | Path | None
    resamples: int
    judge: str | None
    judge_model: str | None
    judge_prompts: int
    answer_tokens: int
    keep_models: bool
