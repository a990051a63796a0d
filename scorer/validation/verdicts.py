"""The verdicts of a judge on many pairs of answers, kept on disk as they come: they are paid for.

    FOLDER/part-00000.parquet    up to PART_PAIRS rows of SCHEMA; a later one of the same key counts

A part is whole or absent, and holds a digest of itself. A verdict is found again by its key, a digest of the judge's
model, the prompt and both answers: that of an answer that has changed since is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from scorer.runs.progress import Progress
from scorer.runs.shard_file import ShardInfo, read_info, write_shard_file
from scorer.storage.atomic import remove_temporaries
from scorer.types import ScorerError
from scorer.validation.comparison import Verdicts
from scorer.validation.judge import Judge, JudgeClient, Pair, PairStatus, Reply

PART_PAIRS = 20
CONCURRENT_PAIRS = 8
LOST_PAIRS = 20  # in a row that can't reach the judge: the others are not tried
LONGEST_TEXT = 4000  # characters of a reply that are kept
FOREVER = 1e9  # seconds; a wait without a limit ignores Ctrl-C once Polars has installed its signal handler
OUTCOMES = {1: "win", 0: "tie", -1: "loss"}
DISAGREED = "disagreed"
PAIR = {"key": pl.String, "row": pl.Int64, "arm": pl.String, "against": pl.String, "seed": pl.Int64}
# swapped: where the judge saw the other answer first. verdict: the one of both orders, or DISAGREED.
# papers_verdict: a win and a tie are a win, a loss and a tie a loss, a win and a loss a tie.
VERDICT = {
    "status": pl.String,
    "score": pl.Float64,
    "other_score": pl.Float64,
    "swapped_score": pl.Float64,
    "swapped_other_score": pl.Float64,
    "verdict": pl.String,
    "papers_verdict": pl.String,
    "text": pl.String,
    "swapped_text": pl.String,
}
SCHEMA = pl.Schema(PAIR | VERDICT)


def judge_pairs(judge: Judge, pairs: Sequence[Pair], folder: Path, progress: Progress) -> pl.DataFrame:
    """The verdict on each pair, a table of SCHEMA in the order of `pairs`; asks the judge for those that are missing.

    No other process may write in `folder`. Raises ScorerError as `JudgeClient.check`, where there is something to ask;
    EngineError where the disk is full. A fault of the judge on a pair is the status of that pair.
    """
    keys = [pair.key(judge) for pair in pairs]
    known = _read_parts(folder, progress)
    final = set(known.filter(pl.col("status").is_in([s.value for s in PairStatus if s.final]))["key"])
    asked = {key: pair for key, pair in zip(keys, pairs, strict=True) if key is not None}
    missing = {key: pair for key, pair in asked.items() if key not in final}
    if missing:
        client = JudgeClient(judge)
        client.check()
        progress.say(f"judging {len(missing):,} pairs of answers with {judge.model}")
        progress.begin(len(asked), len(asked) - len(missing))
        _ask_for(missing, client, folder, progress)
        known = _read_parts(folder, progress)
    rows = [(key, pair.row, pair.arm, pair.against, pair.seed) for key, pair in zip(keys, pairs, strict=True)]
    table = pl.DataFrame(rows, schema=PAIR, orient="row").join(
        known.select("key", *VERDICT), on="key", how="left", maintain_order="left"
    )
    without = pl.when(pl.col("key").is_null()).then(pl.lit(PairStatus.NO_ANSWER.value))
    return table.with_columns(pl.col("status").fill_null(without.otherwise(pl.lit(PairStatus.UNREACHABLE.value))))


def _ask_for(missing: Mapping[str, Pair], client: JudgeClient, folder: Path, progress: Progress) -> None:
    """Write the verdicts on pairs, by key, in parts as they come; all that there are if this is interrupted."""
    pool = ThreadPoolExecutor(CONCURRENT_PAIRS, "scorer-judge")
    waiting = dict[Future[tuple[Reply, ...]], str]()
    rows, to_submit = list[dict[str, Any]](), iter(missing)
    left, lost = len(missing), 0
    try:
        while left and lost < LOST_PAIRS:
            # Submitted pairs may be asked about before it is noticed that the judge has gone away: few at a time.
            for key in islice(to_submit, 2 * CONCURRENT_PAIRS - len(waiting)):
                waiting[pool.submit(client.compare, missing[key])] = key
            future = next(as_completed(list(waiting), FOREVER))
            key, replies = waiting.pop(future), future.result()
            rows.append(_row(key, missing[key], replies))
            progress.advance(1, 0)
            if len(rows) == PART_PAIRS:
                _write_part(folder, rows)
                rows = []
            left -= 1
            lost = lost + 1 if replies[-1].status is PairStatus.UNREACHABLE else 0
        if lost == LOST_PAIRS:
            progress.say(
                f"judge: {client.judge.url} {replies[-1].text}; {left:,} pairs are left: the same command judges them"
            )
    finally:
        client.stopped.set()
        pool.shutdown(cancel_futures=True)
        done = [future for future in waiting if not future.cancelled() and future.exception() is None]
        rows += [_row(waiting[future], missing[waiting[future]], future.result()) for future in done]
        if rows:
            _write_part(folder, rows)


def _row(key: str, pair: Pair, replies: tuple[Reply, ...]) -> dict[str, Any]:
    row = dict.fromkeys(SCHEMA) | {"key": key, "status": replies[-1].status.value}
    row |= {name: getattr(pair, name) for name in PAIR if name != "key"}
    for name, reply in zip(("text", "swapped_text"), replies, strict=False):
        row[name] = reply.text[:LONGEST_TEXT]
    if replies[-1].status is PairStatus.JUDGED:
        (score, other), (swapped_other, swapped) = (reply.scores or (0, 0) for reply in replies)
        row |= {"score": score, "other_score": other, "swapped_score": swapped, "swapped_other_score": swapped_other}
        one, two = replies[0].sign, -replies[1].sign
        row["verdict"] = OUTCOMES[one] if one == two else DISAGREED
        row["papers_verdict"] = OUTCOMES[max(-1, min(1, one + two))]
    return row


def _write_part(folder: Path, rows: list[dict[str, Any]]) -> None:
    index = max((_number(path) for path in folder.glob("part-*.parquet")), default=-1) + 1
    info = ShardInfo(run_id="verdicts", index=index, records=len(rows), rows=len(rows))
    write_shard_file(folder / f"part-{index:05d}.parquet", pl.DataFrame(rows, schema=SCHEMA), info)


def _read_parts(folder: Path, progress: Progress) -> pl.DataFrame:
    """The latest verdict of each key. Removes what a killed process left half written, and parts that are faulty."""
    remove_temporaries(folder / "part-*.parquet")
    tables = [SCHEMA.to_frame()]
    for path in sorted(folder.glob("part-*.parquet"), key=_number):
        try:
            read_info(path)
            table = pl.read_parquet(path)
            if table.schema != SCHEMA:
                raise ValueError("it has the columns of another version")
            tables.append(table)
        except OSError as error:
            raise ScorerError(f"{path}: can't be read ({error.strerror or error})") from error
        except ValueError as error:
            progress.say(f"{path} is faulty ({error}): removed, and its pairs are judged again")
            path.unlink()
    return pl.concat(tables).unique("key", keep="last", maintain_order=True)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1


def count_verdicts(table: pl.DataFrame) -> tuple[Verdicts, ...]:
    """The verdicts on each arm and what it was compared with, in the order of a table of `judge_pairs`."""
    found = []
    for (arm, against), group in table.group_by("arm", "against", maintain_order=True):
        counts, papers, failed = (Counter(group[name]) for name in ("verdict", "papers_verdict", "status"))
        judged = failed.pop(PairStatus.JUDGED, 0)
        score = 1 + (papers["win"] - papers["loss"]) / judged if judged else None
        wins, ties, losses, disagreed = (counts[name] for name in (*OUTCOMES.values(), DISAGREED))
        found.append(Verdicts(str(arm), str(against), wins, ties, losses, disagreed, dict(failed), score))
    return tuple(found)
