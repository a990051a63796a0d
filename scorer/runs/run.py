"""Scoring a whole dataset into a run directory: what is computed, what is left of it, and in what order.

Knows every other room by its public names; no formula, no file format, no model architecture.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorer.config import SERVERS, ScoreConfig
from scorer.data.dataset import InputFile, _count, _inputs, check_unchanged, inspect_input
from scorer.data.reader import read_raw
from scorer.engines.choose import (
    _check_length,
    check_engine,
    choose_engine,
    engine_versions,
    resolve_config,
    served_model,
)
from scorer.models.embedded import EMBEDDED
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.protocols import PROTOCOLS
from scorer.requirements import require
from scorer.runs.directory import STDIN, Run
from scorer.runs.local import _score_here
from scorer.runs.progress import Progress, Silent
from scorer.runs.shards import check_scored, open_encoder, statuses
from scorer.storage.atomic import replacing
from scorer.storage.paths import exists, expand, local_copy, to_path
from scorer.types import ScorerError

if TYPE_CHECKING:
    from scorer.runs.ray_driver import Cluster


MANIFEST_SECONDS = 1.0  # between two writings: a store takes longer for one than a GPU for a shard
UNKNOWN = "unknown"  # in `shards_by`: who scored the shards that nobody lived to count
FORMAT = 1  # raised whenever the meaning of a shard changes, so that an older run is not continued
# What may change between two parts of one run: how much is computed at once and on what, and where a model of one
# revision lies.
RESUMABLE_FIELDS = ("batch_tokens", "model", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len")


def score(
    data: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    strict: bool = False,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Score every record of `data` and return its run directory; the same call again resumes an unfinished one.

    data: JSON, JSON Lines or Parquet files, or s3:// URLs of them; "-" is standard input. output: the run directory, or
    an s3:// URL; None chooses one under
    `scorer-runs`, by the first file's name and what is computed. fresh: discard what an earlier run left there. strict:
    the first record that can't be scored raises. cluster: score on Ray, and not in this process. options: the fields of
    ScoreConfig.

    Raises ScorerError for input, options or a directory that the user has to mend, EngineError where the machine
    failed; what was scored until then stays.
    """
    progress = progress or Silent()
    config = ScoreConfig.from_dict(options)
    remote = config.engine.startswith(SERVERS)
    if cluster is not None:
        require("--ray")
    check_engine(config)
    paths = [name for p in ([data] if isinstance(data, str | Path) else data) for name in expand(str(p))]
    if not paths:
        raise ScorerError("no data: name at least one file, or - for standard input")
    paths = spool(paths, output, fresh=fresh)
    if output is not None:
        Run(output).check_usable()
    inputs = [inspect_input(p) for p in paths]
    if output is not None and not fresh:
        _check_known_fields(Run(output), config, inputs)
    counts = [] if output is not None and Run(output).begun else _count(paths, config)
    if cluster is None and not remote:
        choose_device(config.device)
    files = _find(config, progress, elsewhere=cluster is not None)
    served = served_model(config.engine, files) if remote else None
    engine, why = choose_engine(config, files)
    config = resolve_config(replace(config, engine=engine), files, served, elsewhere=cluster is not None)
    identity: dict[str, Any] = {
        "format": FORMAT,
        # where a server is, is no part of what it computes, and may hold a password
        "config": config.to_dict() | ({"engine": "http"} if served else {}),
        "model_revision": files.revision,
        "served": served and served["identity"],
        "inputs": [i.identity for i in inputs],
    }
    bound = identity | {
        "config": {name: value for name, value in identity["config"].items() if name not in RESUMABLE_FIELDS}
    }
    fingerprint = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()
    if output is None:
        output = Path("scorer-runs") / f"{to_path(paths[0]).name.split('.')[0]}-{fingerprint[:12]}"
    run = Run(output)
    with run.locked():
        if fresh:
            run.clear()
        if run.shards() and run.begun:
            manifest = run.manifest
            _check_same_run(run, manifest["identity"], identity)
            if manifest["inputs"] != _inputs(inputs):  # the same data lies elsewhere now
                manifest["inputs"] = _inputs(inputs)
                run.write_manifest(manifest)
            if strict:
                check_scored(read_raw(paths), statuses(run.scores(["record_id", "status"])))
            if run.complete:
                progress.say(f"{run.path} is complete already; --fresh would start over")
                return run
            manifest |= {"state": "running", "identity": identity}
        else:
            run.clear()  # a manifest without shards, or shards that no manifest describes: nothing to continue
            counts = counts or _count(paths, config)
            manifest = _manifest(config, identity, fingerprint, files, _inputs(inputs), counts) | {"server": served}
            run.write_manifest(manifest)
        what = f"{'http' if served else engine}{why and f': {why}'}; {config.dtype}; {manifest['device']}"
        progress.say(f"loading {files.name} ({what})")
        _score_missing(run, manifest, config, files, paths, cluster, strict, progress)
    return run


def _find(config: ScoreConfig, progress: Progress, *, elsewhere: bool) -> ModelFiles:
    """The model's files, without weights where a server has them.

    The small files come first: they tell whether the model can run here, before weights are fetched from the hub.
    """
    if embedded := EMBEDDED.get(config.model):
        if embedded.context_length is None:
            raise ScorerError(f"{config.model} embeds sentences and can't score: choose another --model")
        _check_length(config, embedded.context_length)
    find = partial(
        find_model, config.model, revision=config.revision, allow_pickle=config.allow_pickle, report=progress.say
    )
    files = find(weights=False)
    if config.engine.startswith(SERVERS):
        return files
    engine, _ = choose_engine(config, files)
    chosen = resolve_config(replace(config, engine=engine), files, elsewhere=elsewhere)
    open_encoder(chosen, files)
    return find()


def spool(paths: Sequence[str], output: str | Path | None, *, fresh: bool) -> list[str]:
    """The paths, with standard input's copy in the run directory `output` in the place of "-".

    Raises ScorerError where standard input can't be read, or the directory can't hold it.
    """
    if "-" in paths:
        if output is None:
            raise ScorerError("data from standard input needs an output directory, which keeps a copy of it")
        if paths.count("-") > 1:
            raise ScorerError("-: standard input can be read once only; name it once")
        if sys.stdin is None:
            raise ScorerError("-: standard input is closed")
    return [_spool(Run(output), fresh) if output is not None and path == "-" else path for path in paths]


def _spool(run: Run, fresh: bool) -> str:
    """Keep standard input in the run directory, where resuming and selecting find it again.

    Raises ScorerError where the directory holds a run of other input, whose copy stays as it is.
    """
    path = run.path / STDIN
    with run.locked():
        kept = None
        if run.shards() and exists(path) and not fresh:
            with local_copy(path) as copy:
                kept = inspect_input(copy).sha256
        with replacing(path) as temporary, temporary.open("w+b") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.seek(0)
            if kept not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
                raise ScorerError(
                    f"{run.path} holds a run of other standard input: give the same again, or use --fresh or another -o"
                )
    return str(path)


def _check_known_fields(run: Run, config: ScoreConfig, inputs: list[InputFile]) -> None:
    """Raise ScorerError where `run` differs from what is asked for in something that is known before the model is."""
    if run.begun and run.shards():
        known = {name: value for name, value in config.to_dict().items() if value not in ("auto", None)}
        if config.engine.startswith(SERVERS):
            known["engine"] = "http"
        now = {"format": FORMAT, "config": known, "inputs": [i.identity for i in inputs]}
        _check_same_run(run, run.manifest["identity"], now)


def _check_same_run(run: Run, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ScorerError naming every field of `now` in which a run differs from what is now asked for."""
    changes = [
        f"{name} was {before['config'].get(name)}, is {value}"
        for name, value in now["config"].items()
        if before["config"].get(name) != value and name not in RESUMABLE_FIELDS
    ]
    changes += [f"{name} changed" for name in now if name != "config" and before.get(name) != now[name]]
    if changes:
        raise ScorerError(
            f"{run.path} holds another run ({'; '.join(changes)}): use --fresh to discard it, or another -o"
        )


def _manifest(
    config: ScoreConfig,
    identity: dict[str, Any],
    fingerprint: str,
    files: ModelFiles,
    inputs: list[dict[str, Any]],
    counts: list[int],
) -> dict[str, Any]:
    return {
        "state": "running",
        "fingerprint": fingerprint,
        "identity": identity,
        "inputs": inputs,
        "model": {"name": files.name, "revision": files.revision, "origin": files.origin, "path": str(files.path)},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ifd-scorer", "torch", "transformers", "polars")}
        | engine_versions(config.engine),
        "device": _device_name(config.device),
        "ranking": {"by": PROTOCOLS[config.protocol].rank_by, "lowest": PROTOCOLS[config.protocol].lowest},
        "records": sum(counts) if config.limit is None else min(sum(counts), config.limit),
        "input_records": counts,
        "status": {},
        "tokens": 0,
        "seconds": 0.0,  # of all engines together
        "shards_by": {},
    }


def _device_name(device: str) -> str:
    if device == "auto":
        return "the server's"
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _score_missing(
    run: Run,
    manifest: dict[str, Any],
    config: ScoreConfig,
    files: ModelFiles,
    paths: list[str],
    cluster: Cluster | None,
    strict: bool,
    progress: Progress,
) -> None:
    """Score the shards that are not there yet, here or on a cluster, and finish the manifest."""

    written = time.monotonic()

    def wrote(tokens: int, seconds: float, by: str) -> None:
        nonlocal written
        manifest["tokens"] += tokens
        manifest["seconds"] = round(manifest["seconds"] + seconds, 3)
        manifest["shards_by"][by] = manifest["shards_by"].get(by, 0) + 1
        if time.monotonic() - written >= MANIFEST_SECONDS:
            run.write_manifest(manifest)
            written = time.monotonic()

    if missing := run.missing():
        records, rows = manifest["records"], config.shard_rows
        progress.begin(records, records - sum(min(rows, records - index * rows) for index in missing))
        try:
            if cluster is None:
                _score_here(run, config, files, paths, missing, strict, progress, wrote)
            else:
                from scorer.runs.ray_driver import score_on_ray

                score_on_ray(run, config, files, paths, missing, cluster, strict=strict, progress=progress, wrote=wrote)
        except BaseException:
            with suppress(ScorerError):  # the error to see is the one that came before
                run.write_manifest(manifest)
            raise
    check_unchanged(manifest["inputs"])
    status = run.collect(lambda table: table.group_by("status").len().sort("len", "status", descending=[True, False]))
    # Between a shard and the line that counts it a worker may be killed, and between two manifests this process.
    if (uncounted := len(run.shards()) - sum(manifest["shards_by"].values())) > 0:
        manifest["shards_by"][UNKNOWN] = manifest["shards_by"].get(UNKNOWN, 0) + uncounted
    run.write_manifest(manifest | {"state": "complete", "status": dict(status.iter_rows())})
