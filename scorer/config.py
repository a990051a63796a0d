"""What a run is asked to do: the options, and the protocols that turn text into tokens. Frozen and validated.

Knows names and limits only; nothing of files, models or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from scorer.types import ScorerError

DEFAULT_MODEL = "smollm2-135m"
ENGINES = ("auto", "packed", "reference", "vllm")
SERVERS = ("http://", "https://")  # what the name of an engine that is served elsewhere begins with
VLLM_OPTIONS = ("tensor_parallel_size", "quantization", "gpu_memory_utilization", "max_model_len", "vllm_args")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
COLUMNS = ("prompt", "input", "response", "messages", "system")


class Join(StrEnum):
    """How a prompt and its response become one token sequence."""

    RETOKENISED = "retokenised"  # the whole text at once; the response starts at the prompt's own token count
    CONCATENATED = "concatenated"  # ids(prompt) ++ ids(response)


@dataclass(frozen=True, slots=True)
class Template:
    """Prompt text by `str.format` of `instruction` and `input`; `separator` stands before a later turn's prompt."""

    with_input: str
    without_input: str
    separator: str = "\n"


PLAIN = Template("{instruction}\n{input}\n", "{instruction}\n")
ALPACA = Template(  # Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
    separator="\n\n",
)


@dataclass(frozen=True, slots=True)
class AloneView:
    """The response without its prompt.

    `prefix` text stands before it and is not scored. `document_bos` puts the token that separates documents before it,
    so that its first token is scored too. The view is cut to the conditioned view's room for the response,
    `max_length - prompt_tokens`, plus `slack` tokens (which the published scripts leave for the prefix).
    """

    prefix: str = ""
    document_bos: bool = False
    slack: int = 0


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a record's text becomes its two token sequences. It changes the score, so it is named in every manifest."""

    name: str
    template: Template | None  # None: the model's own chat template
    join: Join
    alone: AloneView | None  # None: conditioned only
    max_length: int  # tokens of the conditioned view; cut at the right
    score_eos: bool  # whether the EOS text follows the response and is scored
    rank_by: str  # the column that `select` ranks by, unless told
    lowest: bool  # whether low values of it are worth keeping
    source: str


PROTOCOLS: Mapping[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "superfiltering", PLAIN, Join.RETOKENISED, AloneView(slack=1), 1024, False, "ifd", False, "arXiv 2402.00530"
        ),
        Protocol(
            "cherry",
            ALPACA,
            Join.RETOKENISED,
            AloneView(prefix="### Response:", slack=4),
            512,
            False,
            "ifd_loss",
            False,
            "arXiv 2308.12032",
        ),
        Protocol(
            "small2large", ALPACA, Join.RETOKENISED, None, 512, True, "ppl_conditioned", False, "arXiv 2402.10430"
        ),
        Protocol(
            "aligned",
            PLAIN,
            Join.CONCATENATED,
            AloneView(document_bos=True, slack=1),
            1024,
            False,
            "ifd",
            False,
            "both views score the same tokens",
        ),
        Protocol(
            "chat",
            None,
            Join.CONCATENATED,
            AloneView(document_bos=True, slack=1),
            1024,
            False,
            "ifd",
            False,
            "the model's own chat template",
        ),
    )
}


def one_of(option: str, value: str, allowed: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raise ScorerError naming the allowed values, unless `value` is one."""
    if value not in allowed:
        raise ScorerError(f"{option}: '{value}' is not one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Everything that a score depends on, but for the data itself. None means: chosen for the model and device."""

    model: str = DEFAULT_MODEL
    revision: str | None = None
    engine: str = "auto"
    protocol: str = "superfiltering"
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None  # tokens; None: the protocol's, or the model's context where that is shorter
    batch_tokens: int | None = None  # tokens in one batch
    shard_rows: int = 1000  # records in one Parquet shard: what a killed run computes again
    limit: int | None = None  # records, over all inputs
    columns: Mapping[str, str] | None = None  # of COLUMNS, to the data's own names
    trust_remote_code: bool = False
    allow_pickle: bool = False
    # Of the vllm engine, and given to vLLM as they are:
    tensor_parallel_size: int | None = None  # devices that share one model
    quantization: str | None = None  # a method of vLLM's
    gpu_memory_utilization: float | None = None  # the share of the device's memory that vLLM may take
    max_model_len: int | None = None  # tokens; None: max_length
    vllm_args: Mapping[str, Any] | None = None  # other engine arguments of vLLM, by name

    def __post_init__(self) -> None:
        if not self.engine.startswith(SERVERS):
            one_of("engine", self.engine, ENGINES)
        one_of("protocol", self.protocol, PROTOCOLS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("device", self.device, DEVICES)
        for name in ("max_length", "batch_tokens", "shard_rows", "limit", "tensor_parallel_size", "max_model_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ScorerError(f"{name}: {value!r} is not a whole number of at least 1")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ScorerError(f"gpu_memory_utilization: {self.gpu_memory_utilization} is not above 0 and at most 1")
        if self.engine not in ("auto", "vllm") and (set_ := self.vllm_options()):
            raise ScorerError(f"{', '.join(set_)}: for the vllm engine, and not for {self.engine}")
        if self.columns is not None:
            for column in self.columns:
                one_of("columns", column, COLUMNS)
            if not ({"prompt", "response"} <= (named := set(self.columns) - {"system"}) or named == {"messages"}):
                raise ScorerError(
                    "columns: name prompt=... and response=... (input=... is optional), or messages=...; "
                    "with either, system=... is optional"
                )

    def vllm_options(self) -> list[str]:
        """The options that are set and that only the vllm engine has."""
        return [name for name in VLLM_OPTIONS if getattr(self, name) is not None]

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ScoreConfig:
        """The configuration of `options`; an unknown key raises ScorerError."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ScorerError(f"unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, by option name."""
        return asdict(self)
