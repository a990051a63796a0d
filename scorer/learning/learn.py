"""LP, how a model learns each sample: perplexities before training and after each epoch.

    RUN/                 an ordinary run directory; its score table has ppl_0 .. ppl_n, lp1 and lp1_approx
    RUN/epoch-0 ..       the ordinary run directories of each scoring
    RUN/checkpoints/     the trainer's, and with `keep_checkpoints` the model after each epoch, as epoch-1 ..

Knows runs; the formulas are in scorer.scores.measures, and scorer.learning.trainer trains the model.
"""

from __future__ import annotations

import hashlib
import json
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
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.options import from_options, keywords
from scorer.requirements import require
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest
from scorer.runs.progress import Progress, Silent, shown
from scorer.runs.run import check_same_run, say_removed, score
from scorer.runs.shards import open_encoder
from scorer.runs.writer import RunWriter
from scorer.scores.measures import learning_table
from scorer.tokens import TokenBatch, concatenate
from scorer.types import ScorerError

if TYPE_CHECKING:
    from scorer.learning.trainer import TrainingPlan

PROTOCOL = "small2large"
FORMAT = "learning 1"  # raised whenever the meaning of the table changes
DEVICE_BATCH = {"cpu": 4, "cuda": 16}  # records
NOT_IDENTITY = ("save_steps", "trust_remote_code", "allow_pickle")  # may change when a training is resumed


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
    plan = _plan(training, _resolve(given), given)
    run = RunWriter(output)
    run.require_disk("training")
    with shown(progress) as receiver, run.locked():
        if fresh:
            discard(run)
        check_run_kind(run)
        before = Run(run.path / "epoch-0")
        quiet = Silent() if _is_complete(before) else receiver  # a complete one is only checked against the options
        runs = [score(data, before.path, strict=strict, progress=quiet, protocol=PROTOCOL, **given)]
        settings = {k: v for k, v in (asdict(plan) | {"epochs": training.epochs}).items() if k not in NOT_IDENTITY}
        manifest = learning_manifest(runs[0].manifest, {"learning": settings}, training.epochs)
        with runs[0].data as records:
            trainer = _Trainer(run.path / "checkpoints", records, manifest.config, plan, training.epochs)
            if not is_done(run, manifest, receiver):
                run.write_manifest(manifest)
                trainer.folder.mkdir(exist_ok=True)
                for epoch in range(1, training.epochs + 1):
                    runs.append(Run(run.path / f"epoch-{epoch}"))
                    if not _is_complete(runs[-1]):
                        model = trainer.train(epoch, receiver)
                        again = asdict(trainer.config) | {"model": str(model), "revision": None}
                        runs[-1] = score(records, runs[-1].path, strict=strict, progress=receiver, **again)
                        if not keep_checkpoints:
                            shutil.rmtree(model)
                finish(run, manifest, [r.scores() for r in runs], [r.manifest for r in runs])
        _clean(trainer.folder, keep_checkpoints)
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


def _plan(training: Training, device: str, options: Mapping[str, Any]) -> TrainingPlan:
    """The options of training with the defaults that depend on the device or on other options."""
    from scorer.learning.trainer import TrainingPlan, device_batch

    settings = asdict(training) | {
        "schedule_epochs": training.schedule_epochs or max(3, training.epochs),
        "device_batch": device_batch(training.device_batch or DEVICE_BATCH[device], training.batch_size),
        "device": device,
        "trust_remote_code": options.get("trust_remote_code", False),
        "allow_pickle": options.get("allow_pickle", False),
    }
    del settings["epochs"]
    return TrainingPlan(**settings)


class _Trainer:
    """Trains the model that `config` names, epoch by epoch, on the sequences of `data` that were scored."""

    def __init__(self, folder: Path, data: Dataset, config: Mapping[str, Any], plan: TrainingPlan, epochs: int):
        self.folder, self.data, self.plan, self.epochs = folder, data, plan, epochs
        self.config = from_options(ScoreConfig, config)
        self.rows: TokenBatch | None = None

    def train(self, epoch: int, progress: Progress) -> Path:
        """Train up to the end of `epoch`, and return the folder of the model."""
        from scorer.learning.trainer import train_to

        files = find_model(self.config.model, revision=self.config.revision, allow_pickle=self.config.allow_pickle)
        if self.rows is None:
            self.rows = self._read(files)
        count = len(self.rows)
        progress.say(f"training {files.name}, epoch {epoch}: {count:,} rows in batches of {self.plan.batch_size}")
        progress.begin(count, 0)
        return train_to(epoch, files, self.rows, self.folder, self.plan, progress)

    def _read(self, files: ModelFiles) -> TokenBatch:
        """The conditioned sequences, exactly as they are scored; those of rejected responses are not trained on."""
        encoder = open_encoder(self.config, files)
        records = (
            replace(record, turns=tuple(turn for turn in record.turns if turn.branch != "rejected"))
            for record in self.data.records()
        )
        chunks = iter(lambda: list(islice(records, self.config.shard_rows)), [])
        rows = concatenate([encoder.encode(chunk)[1] for chunk in chunks])
        if not len(rows):
            raise ScorerError("no record has a response to train on: see the status column of epoch-0")
        if self.epochs * -(-len(rows) // self.plan.batch_size) == 1 and self.plan.warmup_ratio > 0:
            raise ScorerError(
                f"{len(rows)} rows are one step of batch size {self.plan.batch_size}, at the warm-up's learning rate "
                "of 0: nothing would be learned; give a smaller --batch-size, or --warmup-ratio 0"
            )
        return rows


def learning_manifest(base: Manifest, identity: Mapping[str, Any], epochs: int) -> Manifest:
    """The manifest of an LP run: `base`, from before training, with `identity` added to its identity."""
    identity = {**base.identity, **identity, "format": FORMAT}
    return replace(
        base,
        state="running",
        run_id=uuid.uuid4().hex,
        shards=(),
        identity=identity,
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        ranking={"by": "lp1" if epochs > 1 else "lp1_approx", "lowest": True},
    )


def finish(run: RunWriter, manifest: Manifest, tables: list[pl.DataFrame], runs: list[Manifest]) -> None:
    """Write the table, in shards of whole records, and the finished manifest."""
    table = learning_table(tables)
    shard = table["record_id"].rle_id() // manifest.config["shard_rows"]
    for index, part in enumerate(table.with_columns(shard=shard).partition_by("shard", include_key=False)):
        run.write_shard(index, part)
    known = {
        "tokens": sum(r.tokens for r in runs),
        "seconds": round(sum(r.seconds for r in runs), 3),
        "environments": manifest.environments,
    }
    run.finish(manifest, **known)


def check_run_kind(run: Run) -> None:
    """Raise ScorerError where the directory holds a run that is not of LP."""
    if run.begun and run.manifest.identity.get("format") != FORMAT:
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


def discard(run: RunWriter) -> None:
    """Remove everything of an earlier run."""
    run.clear()
    for path in (*run.path.glob("epoch-*"), run.path / "checkpoints"):
        shutil.rmtree(path, ignore_errors=True)


def _clean(checkpoints: Path, keep: bool) -> None:
    """Remove the optimizer states, which only an unfinished training needs, and unless `keep` the models."""
    for path in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not keep:
        shutil.rmtree(checkpoints, ignore_errors=True)
