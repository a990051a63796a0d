"""The engines: token sequences in, NLL sums of their spans out. Each gives the same numbers at another speed.

Knows the contract and which engines there are; not what a record, a file or a score is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from scorer.config import SERVERS, ScoreConfig
from scorer.models import ModelFiles, weight_bytes
from scorer.requirements import VLLM
from scorer.types import ScorerError, SpanNLL, TokenSequence

# What a weak model is, in 16 bits; beyond it, vLLM is worth its start.
PACKED_BYTES = 5 << 30


class Engine(Protocol):
    """What every engine does. Opening one loads its model; closing it gives the memory back."""

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The SpanNLL of every target of every sequence, a batch at a time, in any order.

        Sums are in nats, added in float64. A sequence that does not fit in memory gives spans of status OOM, one with
        infinite or undefined sums NON_FINITE. Raises EngineError where the engine itself fails.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def check_engine(config: ScoreConfig) -> None:
    """Raise ScorerError where the engine is not installed, lacks an argument, or no server that scores answers.

    This is known before a model is fetched.
    """
    if config.engine.startswith(SERVERS):
        from scorer.engines.remote import Server

        Server(config.engine).close()
    if config.engine == "vllm" or (config.engine == "auto" and config.vllm_options()):
        from scorer.engines.vllm import check_vllm, check_vllm_args

        check_vllm()
        check_vllm_args(config)


def choose_engine(config: ScoreConfig, files: ModelFiles) -> tuple[str, str]:
    """The engine that is asked for; what `auto` means for this model, and why. ScorerError where none can run it.

    Before the weights are fetched only the error can be relied on: `auto` decides by their size.
    """
    from scorer.engines.packed import check_packable, why_not_packed
    from scorer.engines.vllm import vllm_version

    if config.engine == "packed":
        check_packable(files)
    if config.engine != "auto":
        return config.engine, ""
    if asked := config.vllm_options():
        return "vllm", f"{', '.join(asked)} asked for it"
    size = weight_bytes(files)
    sized = f"{size / 1e9:.1f} GB of weights"
    reason = why_not_packed(files)
    installed = vllm_version()
    if reason is None and (size <= PACKED_BYTES or installed is None):
        return "packed", sized if size <= PACKED_BYTES else f"{sized}, and vLLM is not installed"
    if installed is not None:
        return "vllm", f"the packed engine can't run it: {reason}" if reason else sized
    raise ScorerError(
        f"the packed engine can't run {files.name}: {reason}; "
        f"install vLLM (pip install {VLLM}), or use --engine reference"
    )


def engine_versions(engine: str) -> dict[str, str]:
    """The packages that an engine's numbers depend on beside torch and transformers, and their versions."""
    from scorer.engines.vllm import vllm_version

    found = vllm_version() if engine == "vllm" else None
    return dict([found]) if found else {}


def served_model(url: str, files: ModelFiles) -> dict[str, Any]:
    """What a server says of its model. Raises ScorerError where no server scores there, or one scores by another."""
    from scorer.engines.remote import Server

    server = Server(url, files)
    server.close()
    return server.model


def open_engine(config: ScoreConfig, files: ModelFiles) -> Engine:
    """The engine of a configuration whose engine, dtype, device and batch_tokens have been chosen."""
    if config.engine.startswith(SERVERS):
        from scorer.engines.remote import RemoteEngine

        return RemoteEngine(config, files)
    match config.engine:
        case "packed":
            from scorer.engines.packed import PackedEngine

            return PackedEngine(config, files)
        case "reference":
            from scorer.engines.reference import ReferenceEngine

            return ReferenceEngine(config, files)
        case "vllm":
            from scorer.engines.vllm import VllmEngine

            return VllmEngine(config, files)
        case other:
            raise ScorerError(f"no engine '{other}'")
