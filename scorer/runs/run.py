"""Scoring a whole dataset into a run directory: resolve what is to be computed, resume what is there, execute the rest.

Formulas, file formats and model architectures are not known here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from scorer.config import SERVERS, Cluster, Part, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.encoding.encoder import Encoder
from scorer.engines.choose import (
    check_engine,
    check_length,
    choose_engine,
    engine_versions,
    resolve_config,
    served_model,
)
from scorer.keywords import ScoreKeywords
from scorer.models.embedded import EMBEDDED
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.options import keywords
from scorer.protocols import PROTOCOLS
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.local import score_locally
from scorer.runs.manifest import Manifest, differences
from scorer.runs.progress import Progress, shown
from scorer.runs.shards import Executor, Job, check_scored, open_encoder, statuses
from scorer.runs.sources import RUNS, open_dataset
from scorer.runs.writer import RunWriter
from scorer.scores.measures import LABELS
from scorer.scores.summary import count_rows
from scorer.storage.paths import to_path
from scorer.types import ScorerError

MANIFEST_SECONDS = 1.0  # between two writings: a store takes longer for one than a GPU for a shard
UNKNOWN = "unknown"  # in `shards_by`: who scored the shards that a killed process had not counted
FORMAT = 2  # raised whenever the meaning of a shard changes, so that an older run is not continued
# Fields that may change when a run is resumed: how much is computed at once and on how many devices, the path of a
# model whose revision is the same, and how many records are scored, if they become more.
RESUMABLE_FIELDS = ("batch_tokens", "model", "limit", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len")


@keywords(Part, ScoreConfig)
def score(
    data: Any,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    strict: bool = False,
    cluster: Cluster | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[ScoreKeywords],
) -> Run:
    """Score every record of `data` and return its run directory; the same call again resumes an unfinished one.

    data: a path or several, of files, folders, patterns, s3:// URLs or datasets on the hub, as
    `scorer.files.inputs.input_files` takes them; "-" is standard input. Or data in memory: a list of dicts, a Hugging
    Face dataset, a pandas or Polars frame, an Arrow table; a copy of it is kept with the run. Or the Dataset of another
    run, which is not hashed and counted again. output: the run directory, or an s3:// URL; None chooses one under
    `scorer-runs`, by the first file's name and what is computed.
    fresh: discard what an earlier run left there. strict: the first record that can't be scored raises. cluster: score
    on Ray, and not in this process. progress: True shows it on standard error, False does not, None does in a terminal
    or a notebook.

    Raises ScorerError for input, options or a directory that the user has to mend, EngineError where the machine
    failed; the shards scored until then stay.
    """
    given: dict[str, Any] = {**options}
    part = Part(**{name: given.pop(name) for name in ("split", "subset") if name in given})
    config = ScoreConfig.from_dict(given)
    if cluster is not None:
        require("--ray")
    check_engine(config)
    with (
        shown(progress) as receiver,
        open_dataset(data, output, config, part, fresh=fresh) as dataset,
    ):
        if output is not None:
            RunWriter(output).check_usable()
        _inspect(dataset, config, None if output is None or fresh else Run(output))
        model = resolve(config, elsewhere=cluster is not None, progress=receiver)
        identity = _identity(model, dataset)
        free = set(RESUMABLE_FIELDS) - {"limit"}
        bound = identity | {"config": {k: v for k, v in identity["config"].items() if k not in free}}
        fingerprint = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()
        if output is None:
            output = RUNS / f"{to_path(dataset.paths[0]).name.split('.')[0]}-{fingerprint[:12]}"
        run = RunWriter(output)
        with run.locked():
            if fresh:
                run.clear()
            if resumed := resume(run, dataset, identity):
                if strict:
                    check_scored(dataset.rows(), statuses(run.scores(["record_id", "status"])))
                if resumed.state == "complete":
                    receiver.say(f"{run.path} is complete already; --fresh would start over")
                    return Run(run.path)
            manifest = replace(resumed or _new_manifest(model, dataset, identity), fingerprint=fingerprint)
            model.encoder.set_date(manifest.began)
            run.write_manifest(manifest)
            receiver.say(f"loading {model.files.name} ({model.description}; {manifest.device})")
            job = Job(run, dataset, model.config, model.files, model.encoder, strict)
            executor: Executor = score_locally
            if cluster is not None:
                from scorer.runs.ray_driver import score_on_ray

                dataset.close()  # workers read the files themselves
                executor = partial(score_on_ray, cluster=cluster)
            execute(job, manifest, executor, receiver)
    return Run(run.path)


def _inspect(data: Dataset, config: ScoreConfig, run: Run | None) -> None:
    """Find out what `data` is. Raises ScorerError where `run` differs in what is known before the model is."""
    before = run.manifest if run is not None and run.begun and run.shards() else None
    if data.inputs:
        data.check_unchanged()
    elif before is not None:
        data.inspect(before.inputs, before.input_records)
    else:
        data.inspect()
    if run is None or before is None:
        return
    known = {name: value for name, value in config.to_dict().items() if value not in ("auto", None)}
    if config.engine.startswith(SERVERS):
        known["engine"] = "http"
    check_same_run(run, {"format": FORMAT, "config": known, "inputs": [entry.identity for entry in data.inputs]})


def check_same_run(run: Run, identity: Mapping[str, Any]) -> None:
    if changes := differences(run.manifest.identity, identity, RESUMABLE_FIELDS):
        raise ScorerError(
            f"{run.path} holds another run ({'; '.join(changes)}): use --fresh to discard it, or another -o"
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model to score with, and the configuration with nothing left open."""

    config: ScoreConfig
    files: ModelFiles
    encoder: Encoder
    served: Mapping[str, Any] | None  # what a server says of its model
    description: str  # the engine, why it was chosen, and the dtype


def resolve(config: ScoreConfig, *, elsewhere: bool, progress: Progress) -> Resolved:
    """Find the model, and choose what `config` leaves open. elsewhere: other machines compute.

    The small files come first: they tell whether the model can run, before weights are fetched from the hub. Raises
    ScorerError where it can't.
    """
    if embedded := EMBEDDED.get(config.model):
        if embedded.context_length is None:
            raise ScorerError(f"{config.model} embeds sentences and can't score: choose another --model")
        check_length(config, embedded.context_length)
    remote = config.engine.startswith(SERVERS)
    if not elsewhere and not remote:
        choose_device(config.device)
    find = partial(
        find_model, config.model, revision=config.revision, allow_pickle=config.allow_pickle, report=progress.say
    )
    files = find(weights=False)
    if remote:
        served = served_model(config.engine, files)
        chosen = resolve_config(config, files, served)
        return Resolved(chosen, files, open_encoder(chosen, files), served, f"http; {chosen.dtype}")
    engine, _ = choose_engine(config, files)
    encoder = open_encoder(resolve_config(replace(config, engine=engine), files, elsewhere=elsewhere), files)
    files = find()
    engine, why = choose_engine(config, files)
    chosen = resolve_config(replace(config, engine=engine), files, elsewhere=elsewhere)
    return Resolved(chosen, files, encoder, None, f"{engine}{why and f': {why}'}; {chosen.dtype}")


def _identity(model: Resolved, data: Dataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        # where a server is, is no part of what it computes, and may hold a password
        "config": model.config.to_dict() | ({"engine": "http"} if model.served else {}),
        "model_revision": model.files.revision,
        "served": model.served and model.served["identity"],
        "inputs": [entry.identity for entry in data.inputs],
    }


def resume(run: RunWriter, data: Dataset, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of the run to go on with; None where there is nothing, and the directory is then empty.

    Raises ScorerError where the directory holds another run.
    """
    if not (run.shards() and run.begun):
        run.clear()  # a manifest without shards, or shards that no manifest describes
        if not data.counts:
            data.inspect()
        return None
    check_same_run(run, identity)
    if data.height != run.manifest.records:
        return replace(_grown(run, data), identity=identity, inputs=data.inputs)
    if run.complete:
        if run.manifest.inputs != data.inputs:  # the same data lies elsewhere now
            run.write_manifest(replace(run.manifest, inputs=data.inputs))
        return run.manifest
    return replace(run.manifest, state="running", identity=identity, inputs=data.inputs)


def _grown(run: RunWriter, data: Dataset) -> Manifest:
    """The manifest of a run that is to have more records. Its last shard is scored again if it is not full.

    Clusters and embeddings, which lack the new records, are removed.
    """
    known = run.manifest
    if data.height < known.records:
        raise ScorerError(
            f"{run.path} has {known.records:,} records, and --limit {data.limit} is fewer: use another -o, or --fresh"
        )
    run.clear_extras()
    shards_by = dict(known.shards_by)
    if run.remove_partial_shard() and shards_by:
        shards_by[max(shards_by, key=lambda name: shards_by[name])] -= 1
    return replace(known, state="running", records=data.height, input_records=data.counts, shards_by=shards_by)


def _new_manifest(model: Resolved, data: Dataset, identity: dict[str, Any]) -> Manifest:
    files, config = model.files, model.config
    return Manifest(
        began=datetime.now().isoformat(timespec="seconds"),
        identity=identity,
        inputs=data.inputs,
        model={"name": files.name, "revision": files.revision, "origin": files.origin, "path": str(files.path)},
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("ifd-scorer", "torch", "transformers", "polars")}
        | engine_versions(config.engine),
        tokenizer=model.encoder.bulk.name,
        device=_device_name(config.device),
        ranking={"by": PROTOCOLS[config.protocol].rank_by, "lowest": PROTOCOLS[config.protocol].lowest},
        records=data.height,
        input_records=data.counts,
        server=model.served,
    )


def _device_name(device: str) -> str:
    if device == "auto":
        return "the server's"
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def execute(job: Job, manifest: Manifest, executor: Executor, progress: Progress) -> None:
    """Score the shards that are missing, and complete the manifest. Raises what the executor raises."""
    run, written = job.run, time.monotonic()
    if missing := run.missing():
        records, rows = manifest.records, job.config.shard_rows
        progress.begin(records, records - sum(min(rows, records - index * rows) for index in missing))
        try:
            with closing(executor(job, missing, progress)) as shards:
                for shard in shards:
                    manifest = replace(
                        manifest,
                        tokens=manifest.tokens + shard.tokens,
                        seconds=round(manifest.seconds + shard.seconds, 3),
                        shards_by=_counted(manifest.shards_by, shard.by, 1),
                    )
                    if time.monotonic() - written >= MANIFEST_SECONDS:
                        run.write_manifest(manifest)
                        written = time.monotonic()
        except BaseException:
            with suppress(ScorerError):  # the error to see is the one that came before
                run.write_manifest(manifest)
            raise
    job.data.check_unchanged()
    with run.snapshot() as table:
        counts = count_rows(table.scores([name for name in ("record_id", "status", *LABELS) if name in table.schema]))
    # Between a shard and the line that counts it a worker may be killed, and between two manifests this process.
    if (uncounted := len(run.shards()) - sum(manifest.shards_by.values())) > 0:
        manifest = replace(manifest, shards_by=_counted(manifest.shards_by, UNKNOWN, uncounted))
    run.write_manifest(replace(manifest, state="complete", **counts))


def _counted(shards_by: Mapping[str, int], by: str, count: int) -> dict[str, int]:
    return {**shards_by, by: shards_by.get(by, 0) + count}
