"""LP, how a model learns each sample: perplexities before training and after each epoch.

    RUN/                 an ordinary run directory; its score table has ppl_0 .. ppl_n, lp1 and lp1_approx
    RUN/epoch-0 ..       the ordinary run directories of each scoring
    RUN/checkpoints/     the trainer's, and with `keep_checkpoints` the model after each epoch, as epoch-1 ..

Knows runs; the formulas are in scorer.scores.measures, and scorer.learning.trainer trains the model.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import polars as pl

from scorer.config import SERVERS, Part, ScoreConfig, Training
from scorer.data.dataset import Dataset
from scorer.keywords import LearnKeywords
from scorer.models.find import find_model
from scorer.models.load import choose_device
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest, digest
from scorer.runs.progress import Progress, Silent, shown
from scorer.runs.run import check_same_run, say_removed, score
from scorer.runs.shards import open_encoder
from scorer.runs.writer import RunWriter
from scorer.scores.measures import learning_table
from scorer.tokens import concatenate
from scorer.types import ScorerError

if TYPE_CHECKING:
    from scorer.learning.trainer import EpochTrainer

PROTOCOL = "small2large"
FORMAT = "learning 1"  # raised whenever the meaning of the table changes
DEVICE_BATCH = {"cpu": 4, "cuda": 16}  # records


@keywords(score, Part, ScoreConfig, without=("protocol", "cluster"))
def learn(
    data: Any,
    output: str | Path,
    *,
    training: Training | None = None,
    keep_checkpoints: bool = False,
    fresh: bool = False,
    progress: Progress | bool | None = None,
    **options: Unpack[LearnKeywords],
) -> Run:
    """Score every record of `data`, fine-tune the model on it, score again after each epoch; the run directory of LP.

    The same call again resumes, training from its last checkpoint. The loss covers only the response tokens that are
    scored. The protocol is small2large; a `dtype` of auto is float32 on a CPU, since LP is a small difference of
    perplexities. See `scorer.score` for data, output, fresh, strict and progress.
    """
    training = training or Training()
    require("lp")
    given: dict[str, Any] = {**options}
    strict = given.pop("strict", False)
    device = _resolve(given)
    from scorer.learning.trainer import device_batch

    training = replace(
        training,
        schedule_epochs=training.schedule_epochs or max(3, training.epochs),
        device_batch=device_batch(training.device_batch or DEVICE_BATCH[device], training.batch_size),
    )
    run = RunWriter(output)
    run.require_disk("training")
    checkpoints = run.path / "checkpoints"
    with shown(progress) as receiver, run.locked():
        clear_or_check(run, fresh=fresh)
        before = Run(run.path / "epoch-0")
        quiet = Silent() if _is_complete(before) else receiver  # a complete one is only checked against the options
        runs = [score(data, before.path, strict=strict, progress=quiet, protocol=PROTOCOL, **given)]
        settings = asdict(training) | {"device": device}
        del settings["save_steps"]  # it may change when a training is resumed
        manifest = learning_manifest(runs[0].manifest, {"learning": settings}, training.epochs)
        config = from_options(ScoreConfig, manifest.config)
        with runs[0].data as records:
            if not is_done(run, manifest, receiver):
                run.write_manifest(manifest)
                checkpoints.mkdir(exist_ok=True)
                trainer = None
                for epoch in range(1, training.epochs + 1):
                    runs.append(Run(run.path / f"epoch-{epoch}"))
                    if not _is_complete(runs[-1]):
                        trainer = trainer or _open_trainer(checkpoints, records, config, training, receiver)
                        model = trainer.train_to(epoch)
                        again = asdict(config) | {"model": str(model), "revision": None}
                        runs[-1] = score(records, runs[-1].path, strict=strict, progress=receiver, **again)
                        if not keep_checkpoints:
                            shutil.rmtree(model)
                finish(run, manifest, [r.scores() for r in runs], [r.manifest for r in runs])
        # An optimizer's state serves an unfinished training only.
        for path in checkpoints.glob("checkpoint-*") if keep_checkpoints else [checkpoints]:
            shutil.rmtree(path, ignore_errors=True)
    return run


def _resolve(options: dict[str, Any]) -> str:
    """The device to train on; sets the `dtype` of `options`. Raises ScorerError for options that LP can't have."""
    if "protocol" in options:
        raise ScorerError(f"LP is defined by the protocol {PROTOCOL}: leave protocol out")
    if str(options.get("engine")).startswith(SERVERS):
        raise ScorerError(
            "LP scores the model that it trains, and a server can't load that model: give another --engine"
        )
    device = choose_device(options.get("device", "auto"))
    if options.get("dtype", "auto") == "auto" and device == "cpu":
        options["dtype"] = "float32"
    return device


def _is_complete(run: Run) -> bool:
    return run.begun and run.complete


def _open_trainer(
    folder: Path, data: Dataset, config: ScoreConfig, training: Training, progress: Progress
) -> EpochTrainer:
    """The trainer of the model on the conditioned sequences of `data`, exactly as they are scored.

    Rejected responses are not trained on. Raises ScorerError where nothing would be learned.
    """
    from scorer.learning.trainer import EpochTrainer

    files = find_model(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
    encoder = open_encoder(config, files)
    records = (
        replace(record, turns=tuple(turn for turn in record.turns if turn.branch != "rejected"))
        for record in data.records()
    )
    chunks = iter(lambda: list(islice(records, config.shard_rows)), [])
    rows = concatenate([encoder.encode(chunk)[1] for chunk in chunks])
    if not len(rows):
        raise ScorerError("no record has a response to train on: see the status column of epoch-0")
    trainer = EpochTrainer(files, rows, folder, training, config, progress)
    if training.epochs * trainer.epoch_steps == 1 and training.warmup_ratio > 0:
        raise ScorerError(
            f"{len(rows)} rows are one step of batch size {training.batch_size}, at the warm-up's learning rate "
            "of 0: nothing would be learned; give a smaller --batch-size, or --warmup-ratio 0"
        )
    return trainer


def learning_manifest(base: Manifest, identity: Mapping[str, Any], epochs: int) -> Manifest:
    """The manifest of an LP run: `base`, from before training, with `identity` added to its identity."""
    identity = {**base.identity, **identity, "format": FORMAT}
    return replace(
        base,
        state="running",
        run_id=uuid.uuid4().hex,
        shards=(),
        identity=identity,
        fingerprint=digest(identity),
        ranking={"by": "lp1" if epochs > 1 else "lp1_approx", "lowest": True},
    )


def finish(run: RunWriter, manifest: Manifest, tables: list[pl.DataFrame], runs: list[Manifest]) -> None:
    """Write the table, in shards of whole records, and the finished manifest."""
    table = learning_table(tables)
    shard = table["record_id"].rle_id() // manifest.config["shard_rows"]
    for index, part in enumerate(table.with_columns(shard=shard).partition_by("shard", include_key=False)):
        run.write_shard(index, part)
    run.finish(
        manifest,
        tokens=sum(r.tokens for r in runs),
        seconds=round(sum(r.seconds for r in runs), 3),
        environments=manifest.environments,
    )


def clear_or_check(run: RunWriter, *, fresh: bool) -> None:
    """Remove an earlier run if `fresh`; else raise ScorerError where the directory holds one that is not of LP."""
    if fresh:
        run.clear()
        for path in (*run.path.glob("epoch-*"), run.path / "checkpoints"):
            shutil.rmtree(path, ignore_errors=True)
    elif run.begun and run.manifest.identity.get("format") != FORMAT:
        raise ScorerError(f"{run.path} holds a run of another kind: use --fresh to discard it, or another -o")


def is_done(run: RunWriter, manifest: Manifest, progress: Progress) -> bool:
    """Whether the run that `manifest` describes is complete. Raises ScorerError where the directory holds another."""
    if not run.begun:
        return False
    check_same_run(run, manifest.identity)
    say_removed(run.remove_faulty_shards(run.manifest), progress)
    if run.complete:
        progress.say(f"{run.path} is complete already; --fresh would start over")
    return run.complete
