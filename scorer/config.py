"""What is asked for: the options of scoring, Ray, training and clustering, frozen and validated.

Knows names and limits only; nothing of files, models or devices. Selection has its own, scorer.selection.config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from scorer.options import (
    CLUSTERS,
    DATA,
    ENGINE,
    MODEL,
    OUTPUT,
    RAY,
    TRAINING,
    VLLM,
    check_fields,
    option,
    same_option,
)
from scorer.protocols import PROTOCOLS
from scorer.types import ScorerError, one_of

DEFAULT_MODEL = "smollm2-135m"
ENGINES = ("auto", "packed", "reference", "vllm")
SERVERS = ("http://", "https://")  # how an engine begins that is the URL of a server
VLLM_OPTIONS = ("tensor_parallel_size", "quantization", "gpu_memory_utilization", "max_model_len", "vllm_args")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
COLUMNS = ("prompt", "input", "response", "messages", "chosen", "rejected", "system", "history", "tools")
REASONING = ("with", "without", "apart")
TOOL_CALLS = ("score", "skip")
SCHEDULERS = ("cosine", "linear", "constant_with_warmup")
AGGREGATES = ("mean", "min", "max", "last")  # methods of polars.Expr


def parse_names(text: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return tuple(name.strip() for name in text.split(","))


def parse_pairs(texts: Sequence[str]) -> dict[str, str]:
    """`a=b`, `c=d` as a dict. Raises ValueError."""
    pairs: dict[str, str] = {}
    for key, equals, value in (text.partition("=") for text in texts):
        if not key or not equals:
            raise ValueError(f"'{key}{equals}{value}': write it as KEY=VALUE")
        if key.strip() in pairs:
            raise ValueError(f"{key.strip()} is given twice")
        pairs[key.strip()] = value
    return pairs


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,response=answer` as a dict. Raises ValueError."""
    return {key: name.strip() for key, name in parse_pairs(text.split(",")).items()}


def parse_vllm_args(texts: Sequence[str]) -> dict[str, Any]:
    """`enforce_eager=false`, `block_size=32` as a dict of JSON values; what is not JSON is a string."""
    arguments: dict[str, Any] = dict(parse_pairs(texts))
    for key, value in arguments.items():
        with suppress(ValueError, RecursionError):
            arguments[key] = json.loads(value)
    return arguments


def parse_workers(text: str) -> int | None:
    """`auto` as None. Raises ValueError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"'{text}' is neither auto nor a whole number of at least 1")
    return int(text)


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read as samples.

    reasoning: with scores reasoning and answer as one response; without leaves it out; apart makes it a turn of its
    own, before the answer.
    """

    columns: Mapping[str, str] | None = option(
        DATA,
        None,
        f"The data's names of the columns {', '.join(COLUMNS)}.",
        unset="recognised",
        metavar="KEY=NAME,...",
        parse=parse_columns,
    )
    reasoning: str = option(
        DATA, "with", "Score reasoning (<think>...</think>) with the answer, without it, or apart.", choices=REASONING
    )
    tool_calls: str = option(
        DATA, "score", "Whether responses that call tools are scored, or history only.", choices=TOOL_CALLS
    )
    records_at: str | None = option(
        DATA,
        None,
        "Key of the list of records, in a JSON file that is one object.",
        unset="the only one",
        metavar="KEY",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.columns is None:
            return
        if not isinstance(self.columns, Mapping):
            raise ScorerError(
                f"columns: {self.columns!r} is not a dict such as {{'prompt': 'ask', 'response': 'tell'}}"
            )
        for column, name in self.columns.items():
            one_of("columns", column, COLUMNS)
            if not name:
                raise ScorerError(f"columns: {column} has no name; write it as {column}=NAME")
        named = set(self.columns) - {"system", "history", "tools"}
        pairs = ({"prompt", "response"}, {"chosen", "rejected"})
        if named != {"messages"} and not any(pair <= named <= {*pair, "prompt", "input"} for pair in pairs):
            raise ScorerError(
                "columns: name prompt=... and response=... (input=... is optional), or messages=..., or chosen=... and "
                "rejected=...; with any, system=..., history=... and tools=... are optional"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of its input is read, where a dataset has several."""

    split: str | None = option(DATA, None, "Split of a dataset.", unset="train, or the only one")
    subset: str | None = option(DATA, None, "Subset (configuration) of a dataset.", unset="default, or the only one")


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Everything that a score depends on, except the data itself. None means: chosen for the model and device."""

    model: str = option(MODEL, DEFAULT_MODEL, "Embedded name, local folder, or Hugging Face name.")
    revision: str | None = option(MODEL, None, "Revision of a Hugging Face model.", unset="what is cached, else newest")
    engine: str = option(
        ENGINE,
        "auto",
        "auto: packed for weak models, vllm for larger ones and for what packed can't run. URL: a server, http://HOST:PORT.",
        metavar=f"{'|'.join(ENGINES)}|URL",
    )
    protocol: str = option(DATA, "superfiltering", "How text becomes tokens.", choices=tuple(PROTOCOLS))
    dtype: str = option(MODEL, "auto", "auto: bfloat16 if the hardware supports it, else float32.", choices=DTYPES)
    device: str = option(ENGINE, "auto", "auto: cuda if there is a GPU, else cpu.", choices=DEVICES)
    max_length: int | None = option(MODEL, None, "Maximum tokens of prompt and response.", unset="the protocol's")
    batch_tokens: int | None = option(ENGINE, None, "Tokens per batch.", unset="by engine and device")
    compile: bool | None = option(
        ENGINE,
        None,
        "Compile the model's blocks for the packed engine.",
        unset="for long runs that gain by it",
        flags="--compile/--no-compile",
    )
    shard_rows: int = option(OUTPUT, 1000, "Records per shard; an unfinished shard is scored again.")
    limit: int | None = option(
        DATA, None, "Score only the first N records.", unset="all", metavar="N", maximum=2**63 - 1
    )
    columns: Mapping[str, str] | None = same_option(Reading, "columns")
    reasoning: str = same_option(Reading, "reasoning")
    tool_calls: str = same_option(Reading, "tool_calls")
    records_at: str | None = same_option(Reading, "records_at")
    split_special_tokens: bool = option(DATA, False, "Read special tokens that the data's text holds as text.")
    trust_remote_code: bool = option(MODEL, False, "Run Python code that comes with the model.")
    allow_pickle: bool = option(MODEL, False, "Load pickled weights, which can run code.")
    tensor_parallel_size: int | None = option(VLLM, None, "Devices that share one model.", unset="1")
    quantization: str | None = option(VLLM, None, "Quantization method.", unset="the model's own")
    gpu_memory_utilization: float | None = option(VLLM, None, "Share of the device's memory to use.", unset="vLLM's")
    max_model_len: int | None = option(VLLM, None, "Tokens of the longest sequence.", unset="--max-length")
    vllm_args: Mapping[str, Any] | None = option(
        VLLM,
        None,
        "Any other engine argument, its value as JSON or as a string; may be repeated.",
        unset="none",
        flags="--vllm-arg",
        metavar="KEY=VALUE",
        parse=parse_vllm_args,
        multiple=True,
    )

    def __post_init__(self) -> None:
        if not self.engine.startswith(SERVERS):
            one_of("engine", self.engine, ENGINES)
        check_fields(self)
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ScorerError(f"gpu_memory_utilization: {self.gpu_memory_utilization} is not above 0 and at most 1")
        if self.engine not in ("auto", "vllm") and (set_ := self.vllm_options()):
            raise ScorerError(f"{', '.join(set_)}: for the vllm engine, and not for {self.engine}")
        if self.compile and self.engine not in ("auto", "packed"):
            raise ScorerError(f"compile: for the packed engine, and not for {self.engine}")
        _ = self.reading  # checks its fields

    @property
    def reading(self) -> Reading:
        """How rows are read."""
        return Reading(**{f.name: getattr(self, f.name) for f in fields(Reading)})

    def vllm_options(self) -> list[str]:
        """The options that are set and that only the vllm engine has."""
        return [name for name in VLLM_OPTIONS if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that scores a run: `local` starts one on this machine, anything else is the address of a running one.

    gpus_per_worker: None is as many GPUs as the model is spread over, and none where there are none. cpus_per_worker:
    None is 1 beside a GPU, else an even share.
    """

    address: str = option(
        RAY, "local", "Score on Ray: local, auto, or the address of a cluster.", flags="--ray", metavar="ADDRESS"
    )
    workers: int | None = option(
        RAY, None, "Number of engines.", unset="auto: one per GPU, else one", metavar="N", parse=parse_workers
    )
    gpus_per_worker: float | None = option(RAY, None, "GPUs per engine; may be a fraction.", unset="1 if there is one")
    cpus_per_worker: float | None = option(RAY, None, "CPUs per engine; may be a fraction.", unset="an even share")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ScorerError(f"{name}: {value} is not above 0")
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ScorerError(f"gpus_per_worker: {self.gpus_per_worker} is neither a share of one GPU nor whole GPUs")


def check_rates(learning_rate: float, warmup_ratio: float, weight_decay: float) -> None:
    """Raise ScorerError for what no training can use."""
    if not 0 < learning_rate < 1 or not 0 <= warmup_ratio < 1 or not 0 <= weight_decay < 1:
        raise ScorerError("learning_rate, warmup_ratio and weight_decay are numbers from 0 to 1")


@dataclass(frozen=True, slots=True)
class Training:
    """How the model is trained; the defaults are those of Small2Large (arXiv 2402.10430, section 4).

    schedule_epochs may exceed `epochs`, so that the first epoch of three and an only one are the same. device_batch is
    a maximum; gradients add up to `batch_size`.
    """

    epochs: int = option(TRAINING, 3, "Epochs to train; 1 gives lp1_approx only.")
    schedule_epochs: int | None = option(
        TRAINING, None, "Epochs of the learning-rate schedule.", unset="3, or --epochs"
    )
    learning_rate: float = option(TRAINING, 2e-5, "Peak learning rate.")
    scheduler: str = option(TRAINING, "cosine", "Learning-rate schedule.", choices=SCHEDULERS)
    warmup_ratio: float = option(TRAINING, 0.03, "Share of the schedule that is warm-up.")
    batch_size: int = option(TRAINING, 128, "Records per step.")
    device_batch: int | None = option(TRAINING, None, "Records per forward pass.", unset="4 on cpu, 16 on cuda")
    weight_decay: float = option(TRAINING, 0.0, "Weight decay of AdamW.")
    seed: int = option(TRAINING, 42, "Seed for the order of the records and for dropout.", minimum=0)
    save_steps: int = option(TRAINING, 100, "Steps between two checkpoints.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ScorerError(f"schedule_epochs: {self.schedule_epochs} ends before the {self.epochs} epochs")
        check_rates(self.learning_rate, self.warmup_ratio, self.weight_decay)


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    """Which sentence-transformers model embeds, how much of a text, and what the model may do on this machine."""

    embedder: str = option(MODEL, "all-minilm-l6-v2", "Embedded name, local folder, or Hugging Face name.")
    max_tokens: int = option(MODEL, 256, "Maximum tokens of a text, up to the embedder's own limit.")
    device: str = same_option(ScoreConfig, "device")
    allow_pickle: bool = same_option(ScoreConfig, "allow_pickle")
    trust_remote_code: bool = same_option(ScoreConfig, "trust_remote_code")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class ClusterConfig(EmbedderConfig):
    """How a run's records are clustered.

    A record without text has a null cluster. With `flags`, a record is far_from_instruction where the cosine of the
    embeddings of its instruction and its response is below `far_below` (null where either has no text), and a
    near_duplicate where the cosine with a record of smaller record_id is above `duplicate_above`.
    """

    clusters: int | None = option(CLUSTERS, None, "Number of clusters.", unset="records / --min-mean-size")
    min_mean_size: int = option(CLUSTERS, 50, "Mean records per cluster, if --clusters is not given.")
    iterations: int = option(CLUSTERS, 20, "Iterations of k-means.")
    seed: int = option(CLUSTERS, 42, "Seed for k-means.", minimum=0)
    flags: bool = option(CLUSTERS, False, "Also flag far responses and near-duplicates.")
    far_below: float = option(
        CLUSTERS, 0.1, "Flag a response whose cosine with its instruction is below this.", minimum=-1, maximum=1
    )
    duplicate_above: float = option(
        CLUSTERS, 0.98, "Flag a record whose cosine with an earlier one is above this.", minimum=-1, maximum=1
    )
