"""What a run is asked to do: the options, and the protocols that turn text into tokens. Frozen and validated.

Knows names and limits only; nothing of files, models or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from scorer.protocols import PROTOCOLS
from scorer.types import ScorerError, one_of

DEFAULT_MODEL = "smollm2-135m"
ENGINES = ("auto", "packed", "reference", "vllm")
SERVERS = ("http://", "https://")  # what the name of an engine that is served elsewhere begins with
VLLM_OPTIONS = ("tensor_parallel_size", "quantization", "gpu_memory_utilization", "max_model_len", "vllm_args")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
COLUMNS = ("prompt", "input", "response", "messages", "system")


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
