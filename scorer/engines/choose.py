"""Chooses the engine, device, dtype and batch size, and opens the engine.

An engine's module is imported only when that engine is chosen.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from scorer.config import SERVERS, ScoreConfig
from scorer.engines import Engine
from scorer.models.find import ModelFiles, model_settings, weight_bytes
from scorer.models.find import check_unchanged as check_files
from scorer.models.load import choose_device, choose_dtype
from scorer.protocols import PROTOCOLS
from scorer.requirements import VLLM
from scorer.types import ScorerError

# The largest weak model, in 16 bits; above it, vLLM is worth the time that it takes to start.
PACKED_BYTES = 5 << 30
BATCH_TOKENS = {  # by engine and device
    ("packed", "cpu"): 1024,
    ("packed", "cuda"): 65536,
    ("vllm", "cpu"): 2048,
    ("vllm", "cuda"): 32768,
}
# The least records for which compiling, some 10 to 20 s on a CPU and 4 s on a GPU, takes less time than it saves.
COMPILE_RECORDS = {"cpu": 10_000, "cuda": 100_000}
COMPILERS = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang")}  # a variable that names one, and others
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")


def check_engine(config: ScoreConfig) -> None:
    """Raise ScorerError where the engine is not installed, lacks an argument, or its server does not score.

    Needs no model, so that a run fails before it downloads one.
    """
    if config.engine.startswith(SERVERS):
        from scorer.engines.vllm_client import Server

        Server(config.engine)
    if config.engine == "vllm" or (config.engine == "auto" and config.vllm_options()):
        from scorer.engines.vllm import check_vllm, check_vllm_args

        check_vllm()
        check_vllm_args(config)


def choose_engine(config: ScoreConfig, files: ModelFiles) -> tuple[str, str]:
    """The engine, and why `auto` chose it ("" where the user did). ScorerError where no engine can run the model.

    `auto` goes by the size of the weights: before they are downloaded, rely on the error only, not on the choice.
    """
    from scorer.engines.architecture import check_packable, why_not_packed
    from scorer.engines.vllm import vllm_version

    if config.engine == "packed":
        check_packable(files)
    if config.engine != "auto":
        return config.engine, ""
    if asked := config.vllm_options():
        return "vllm", f"only vLLM has {', '.join(asked)}"
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
    """Versions of the packages, beside torch and transformers, that an engine's numbers depend on."""
    from scorer.engines.vllm import vllm_version

    found = vllm_version() if engine == "vllm" else None
    return dict([found]) if found else {}


def open_engine(config: ScoreConfig, files: ModelFiles) -> Engine:
    """Open the engine of a resolved configuration. Raises ScorerError where the model changed while it was loaded."""
    engine = _open_engine(config, files)
    try:
        check_unchanged(config, files)
    except BaseException:
        engine.close()
        raise
    return engine


def check_unchanged(config: ScoreConfig, files: ModelFiles) -> None:
    """Raise ScorerError where the files that an engine loads are not those that were found."""
    if not config.engine.startswith(SERVERS):
        check_files(files)


def _open_engine(config: ScoreConfig, files: ModelFiles) -> Engine:
    if config.engine.startswith(SERVERS):
        from scorer.engines.vllm_client import RemoteEngine

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


def resolve_config(
    config: ScoreConfig, files: ModelFiles, served: dict[str, Any] | None = None, *, elsewhere: bool = False
) -> ScoreConfig:
    """The configuration with device, dtype, max_length and batch_tokens resolved.

    served: the description from a server, which has chosen device, dtype and batch size itself. elsewhere: another
    machine computes; where device or dtype is "auto", it is assumed to be like this one. Raises ScorerError for a
    setting that the model or the server does not support.
    """
    if served:
        if asked := [name for name in ("device", "batch_tokens") if getattr(config, name) not in ("auto", None)]:
            raise ScorerError(f"{asked[0]}: the server sets this; leave it out")
        if config.dtype not in ("auto", served["dtype"]):
            raise ScorerError(f"dtype: {config.engine} computes in {served['dtype']}, not in {config.dtype}")
    named = elsewhere and "auto" not in (config.device, config.dtype)
    device = "auto" if served else config.device if named else choose_device(config.device)
    protocol = PROTOCOLS[config.protocol]
    context = context_length(files)
    if context is not None:
        check_length(config, context)
    resolved = replace(
        config,
        device=device,
        dtype=served["dtype"] if served else choose_dtype(config.dtype, device),
        max_length=config.max_length or min(protocol.max_length, context or protocol.max_length),
        batch_tokens=config.batch_tokens or BATCH_TOKENS.get((config.engine, device)),
    )
    if config.engine == "vllm" and not elsewhere:
        from scorer.engines.vllm import check_model

        check_model(resolved, files)
    return resolved


def choose_compile(config: ScoreConfig, records: int) -> tuple[bool, str]:
    """Whether the packed engine compiles the blocks of a resolved configuration, and what to tell the user of it.

    Raises ScorerError where the user asks for it and it can't be done.
    """
    if config.engine != "packed":
        if config.compile:
            raise ScorerError(f"compile: for the packed engine, and {config.model} runs in {config.engine}")
        return False, ""
    # float32 gains nothing on a CPU: 1.01 times as fast with GPT-2, which in bfloat16 becomes 1.74 times as fast.
    gains = config.device == "cuda" or config.dtype != "float32"
    default = gains and records >= COMPILE_RECORDS[config.device]
    if not (default if config.compile is None else config.compile):
        return False, ""
    if reason := why_not_compiled(config.device):
        if config.compile:
            raise ScorerError(f"compile: {reason}; install it, or use --no-compile")
        return False, f"not compiled: {reason}"
    return True, "compiled"


def why_not_compiled(device: str) -> str | None:
    """Why torch can't compile here; None where it can."""
    variable, *names = COMPILERS[device]
    if not any(shutil.which(name) for name in (os.environ.get(variable), *names) if name):
        return f"there is no compiler ({' or '.join(names)})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Python.h, of python3-dev) are missing"
    return None


def check_length(config: ScoreConfig, context: int) -> None:
    if config.max_length is not None and config.max_length > context:
        raise ScorerError(
            f"max_length: {config.max_length} is more than the {context} tokens of {config.model}'s context"
        )


def context_length(files: ModelFiles) -> int | None:
    """The tokens of the model's context; None where its configuration does not say."""
    settings = model_settings(files)
    return next((int(settings[key]) for key in CONTEXT_KEYS if isinstance(settings.get(key), int)), None)
