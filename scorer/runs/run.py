"""Scoring a whole dataset into a run directory: resolve what is to be computed, resume what is there, execute the rest.

Formulas, file formats and model architectures are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from scorer.config import SERVERS, Cluster, Part, ScoreConfig
from scorer.data.dataset import Dataset
from scorer.encoding.encoder import Encoder
from scorer.engines.choose import (
    check_engine,
    check_length,
    check_unchanged,
    choose_compile,
    choose_engine,
    resolve_config,
)
from scorer.keywords import ScoreKeywords
from scorer.models.embedded import EMBEDDED
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.options import from_options, keywords, take
from scorer.protocols import PROTOCOLS
from scorer.requirements import require
from scorer.runs.directory import Run, describe_faults
from scorer.runs.environment import changes, environment
from scorer.runs.local import score_locally
from scorer.runs.manifest import Manifest, differences, digest
from scorer.runs.progress import Progress, shown
from scorer.runs.shards import Executor, Job, check_scored, open_encoder, statuses
from scorer.runs.sources import RUNS, open_dataset
from scorer.runs.writer import RunWriter
from scorer.storage.paths import to_path
from scorer.types import ScorerError

FORMAT = 3  # raised whenever the meaning of a shard changes, so that an older run is not continued
# Fields that may change when a run is resumed: how much is computed at once, by what code and on how many devices, the
# path of a model whose revision is the same, and how many records are scored, if they become more.
RESUMABLE_FIELDS = (
    "batch_tokens",
    "compile",
    "model",
    "limit",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_model_len",
)


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
    part = Part(**take(Part, given))
    config = from_options(ScoreConfig, given)
    if cluster is not None:
        require("--ray")
    check_engine(config)
    with shown(progress) as receiver, open_dataset(data, output, config, part, fresh=fresh) as dataset:
        if output is not None:
            RunWriter(output).check_usable()
        _inspect(dataset, config, None if output is None or fresh else Run(output))
        model = resolve(config, dataset.height, elsewhere=cluster is not None, progress=receiver)
        identity = _identity(model, dataset)
        fingerprint = _fingerprint(identity)
        if output is None:
            output = RUNS / f"{to_path(dataset.paths[0]).name.split('.')[0]}-{fingerprint[:12]}"
        run = RunWriter(output)
        with run.locked():
            if fresh:
                run.clear()
            if resumed := resume(run, dataset, identity, receiver):
                if strict and run.shards():
                    check_scored(dataset.rows(), statuses(run.scores(["record_id", "status"])))
                if resumed.state == "complete":
                    receiver.say(f"{run.path} is complete already; --fresh would start over")
                    return Run(run.path)
            manifest = resumed or _new_manifest(model, dataset, identity)
            manifest = _continued(manifest, model.config, receiver, elsewhere=cluster is not None)
            manifest = replace(manifest, fingerprint=fingerprint)
            model.encoder.set_date(manifest.began)
            run.write_manifest(manifest)
            receiver.say(f"loading {model.files.name} ({model.description}; {manifest.environments[-1]['device']})")
            job = Job(run, dataset, model.config, model.files, model.encoder, strict)
            execute(job, manifest, _executor(cluster, dataset), receiver)
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
    known = {name: value for name, value in asdict(config).items() if value not in ("auto", None)}
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


def resolve(config: ScoreConfig, records: int, *, elsewhere: bool, progress: Progress) -> Resolved:
    """Find the model, and choose what `config` leaves open. elsewhere: other machines compute `records`.

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
        from scorer.engines.vllm_client import Server

        served = Server(config.engine, files).model
        chosen = resolve_config(config, files, served)
        return Resolved(chosen, files, open_encoder(chosen, files), served, f"http; {chosen.dtype}")
    engine, _ = choose_engine(config, files)
    encoder = open_encoder(resolve_config(replace(config, engine=engine), files, elsewhere=elsewhere), files)
    files = find()
    engine, why = choose_engine(config, files)
    chosen = resolve_config(replace(config, engine=engine), files, elsewhere=elsewhere)
    compiled, note = choose_compile(chosen, records)
    chosen = replace(chosen, compile=compiled)
    return Resolved(chosen, files, encoder, None, f"{engine}{why and f': {why}'}; {chosen.dtype}{note and f', {note}'}")


def _identity(model: Resolved, data: Dataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        # where a server is, is no part of what it computes, and may hold a password
        "config": asdict(model.config) | ({"engine": "http"} if model.served else {}),
        "model_revision": model.files.revision,
        "served": model.served and model.served["identity"],
        "inputs": [entry.identity for entry in data.inputs],
    }


def _fingerprint(identity: Mapping[str, Any]) -> str:
    """The digest of an identity without RESUMABLE_FIELDS, but with the limit."""
    free = set(RESUMABLE_FIELDS) - {"limit"}
    bound = {**identity, "config": {k: v for k, v in identity["config"].items() if k not in free}}
    return digest(bound)


def resume(run: RunWriter, data: Dataset, identity: dict[str, Any], progress: Progress) -> Manifest | None:
    """The manifest of the run to go on with; None where there is nothing, and the directory is then empty.

    Shards that are not what was written are removed. Raises ScorerError where the directory holds another run.
    """
    shards = run.shards()
    if shards and not run.begun:
        raise ScorerError(f"{run.path} has scores and no manifest.json, which says of what: restore it, or use --fresh")
    if not shards:  # a run without scores binds nobody
        run.clear()
        return None
    check_same_run(run, identity)
    known = run.manifest
    manifest = replace(known, identity=identity, inputs=data.inputs)
    if data.height != known.records:
        manifest = _grown(run, manifest, data)
    say_removed(run.remove_faulty_shards(manifest), progress)
    if manifest.state == "complete" and not run.missing():
        if known.inputs != data.inputs:  # the same data lies elsewhere now
            manifest = replace(known, inputs=data.inputs)
            run.write_manifest(manifest)
        return manifest
    return replace(manifest, state="running", shards=())


def say_removed(faults: Mapping[str, str], progress: Progress) -> None:
    """Tell the user of shards that were removed, if any."""
    if faults:
        found = describe_faults(faults)
        progress.say(f"scores/{found}: removed, and scored again where the run has such records")


def _grown(run: RunWriter, manifest: Manifest, data: Dataset) -> Manifest:
    """The manifest of a run that is to have more records. Its last shard is scored again if it is not full.

    Clusters and embeddings, which lack the new records, are removed.
    """
    if data.height < manifest.records:
        raise ScorerError(
            f"{run.path} has {manifest.records:,} records, and --limit {data.limit} is fewer: use another -o, or "
            "--fresh"
        )
    run.clear_extras()
    run.remove_partial_shard()
    return replace(manifest, state="running", records=data.height, input_records=data.counts, shards=())


def _continued(manifest: Manifest, config: ScoreConfig, progress: Progress, *, elsewhere: bool) -> Manifest:
    """The manifest with the environment of this process; the user is told of one that differs from the last."""
    now, before = environment(config), [dict(entry) for entry in manifest.environments]
    for entry in before:
        entry.pop("shards", None)
    if now in before:
        before.remove(now)
    elif before and not elsewhere:
        progress.say(f"the run goes on with other software or another device: {changes(before[-1], now)}")
    return replace(manifest, environments=(*before, now))


def _new_manifest(model: Resolved, data: Dataset, identity: dict[str, Any]) -> Manifest:
    files, config = model.files, model.config
    return Manifest(
        began=datetime.now().isoformat(timespec="seconds"),
        identity=identity,
        inputs=data.inputs,
        model={"name": files.name, "revision": files.revision, "origin": files.origin, "path": str(files.path)},
        tokenizer=model.encoder.bulk.name,
        ranking={"by": PROTOCOLS[config.protocol].rank_by, "lowest": PROTOCOLS[config.protocol].lowest},
        records=data.height,
        input_records=data.counts,
        server=model.served,
    )


def _executor(cluster: Cluster | None, data: Dataset) -> Executor:
    """What scores the shards: Ray where a cluster is asked for, else this process."""
    if cluster is None:
        return score_locally
    from scorer.runs.ray_driver import score_on_ray

    data.close()  # workers read the files themselves
    return partial(score_on_ray, cluster=cluster)


def execute(job: Job, manifest: Manifest, executor: Executor, progress: Progress) -> None:
    """Score the shards that are missing, and complete the manifest. Raises what the executor raises."""
    run = job.run
    if missing := run.missing():
        progress.begin(manifest.records, manifest.records - sum(map(manifest.records_of, missing)))
        executor(job, missing, progress)
    job.data.check_unchanged()
    check_unchanged(job.config, job.files)
    run.finish(manifest)
