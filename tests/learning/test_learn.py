"""LP: its formulas by hand, tables joined, and a tiny model that really learns, killed on the way too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from scorer.config import Training
from scorer.learning.join import join_runs
from scorer.learning.learn import learn
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.runs.run import score
from scorer.scores.measures import SCHEMA, learning_table
from scorer.selection.export import select
from scorer.types import ScorerError
from tests.lib.command import Commands, alpaca, wait

Write = Callable[..., Path]


def epoch(ppls: Sequence[float | None], statuses: Sequence[str] | None = None) -> pl.DataFrame:
    rows = {
        "record_id": range(len(ppls)),
        "turn": [0] * len(ppls),
        "status": statuses or ["ok"] * len(ppls),
        "prompt_tokens": [7] * len(ppls),
        "response_tokens": [3] * len(ppls),
        "ppl_conditioned": ppls,
        "ppl_alone": [9.0] * len(ppls),
        "ifd": [0.5] * len(ppls),
    }
    frame = pl.DataFrame(rows, strict=False)
    return frame.select(
        (pl.col(name) if name in rows else pl.lit(None)).cast(dtype).alias(name) for name, dtype in SCHEMA.items()
    )


def test_lp_by_hand() -> None:
    """One record a case: learns; learns most late; rises at first; overshoots; ends where it began; ends worse."""
    table = learning_table([epoch([10, 10, 10, 10, 10, 10]), epoch([6, 9, 12, 1, 8, 8]), epoch([5, 2, 5, 2, 10, 20])])
    assert table["lp1"].to_list() == [0.8, 0.125, -0.4, 1.125, None, None]
    assert table["lp1_approx"].to_list() == [0.4, 0.1, -0.2, 0.9, 0.2, 0.2]
    assert table["rose"].to_list() == [False, False, True, False, False, False]
    assert table["not_learned"].to_list() == [False, False, False, False, True, True]
    assert table["status"].to_list() == ["ok"] * 6
    assert table["ppl_2"].to_list() == [5, 2, 5, 2, 10, 20]
    assert table["ppl_conditioned"].to_list() == table["ppl_0"].to_list() == [10] * 6
    assert table["prompt_tokens"].to_list() == [7] * 6
    assert table["ifd"].null_count() == table["ppl_alone"].null_count() == 6  # of another measure


def test_one_epoch_gives_the_approximation_only() -> None:
    table = learning_table([epoch([8, 8, 8]), epoch([6, 8, 10])])
    assert table["lp1_approx"].to_list() == [0.25, 0.0, -0.25]
    assert table["rose"].to_list() == [False, False, True]
    assert table["lp1"].to_list() == table["not_learned"].to_list() == [None] * 3


def test_a_row_that_any_epoch_did_not_score_has_no_values() -> None:
    before = epoch([10, None, 10, 10, 0], ["ok", "empty_response", "truncated", "ok", "ok"])
    between = epoch([6, None, 6, None, 6], ["ok", "empty_response", "truncated", "non_finite", "ok"])
    after = epoch([5, None, 5, 5, 5], ["ok", "empty_response", "truncated", "ok", "ok"])
    table = learning_table([before, between, after])
    assert table["status"].to_list() == ["ok", "empty_response", "truncated", "non_finite", "non_finite"]
    for name in ("lp1", "lp1_approx", "rose", "not_learned", "ppl_0", "ppl_2", "ppl_conditioned"):
        assert table[name].is_null().to_list() == [False, True, False, True, True], name


def test_rows_are_joined_by_id_and_turn_not_by_place() -> None:
    before, after = epoch([10, 20, 40]), epoch([5, 5, 5])
    table = learning_table([before, after[[2, 0, 1]]])
    assert table["lp1_approx"].to_list() == [0.5, 0.75, 0.875]


def table_files(folder: Path) -> list[Path]:
    """The same three records before training and after two epochs, in three formats, rows in another order each."""
    paths = [folder / "before.csv", folder / "first.jsonl", folder / "second.parquet"]
    paths[0].write_text("ppl_conditioned,record_id\n10,7\n20,9\n,8\n")
    paths[1].write_text(
        "".join(json.dumps({"record_id": i, "ppl_conditioned": p}) + "\n" for i, p in ((9, 7.5), (8, 3)))
    )
    with paths[1].open("a") as file:
        file.write('{"record_id": 7, "ppl_conditioned": 6}\n')
    ids = pl.Series([8, 7, 9], dtype=pl.UInt64)
    pl.DataFrame({"record_id": ids, "ppl_conditioned": [2.0, 5.0, 10.0]}).write_parquet(paths[2])
    return paths


def test_tables_of_every_format_are_joined(tmp_path: Path) -> None:
    command = Commands(tmp_path)
    paths = table_files(tmp_path)
    command("lp", "--runs", *paths, "-o", "run").done()
    run = Run(tmp_path / "run")
    table = run.scores()
    assert table["record_id"].to_list() == [7, 8, 9]
    assert table["lp1"].to_list() == [0.8, None, 1.25]
    assert table["status"].to_list() == ["ok", "missing_field", "ok"]
    assert run.complete
    assert run.manifest.ranking == {"by": "lp1", "lowest": True}
    assert "complete already" in command("lp", "--runs", *paths, "-o", "run").done()
    assert select(run, keep=1).kept["record_id"].to_list() == [7]
    assert "has no data" in command("select", "run", "-o", "kept.jsonl", "--keep", "1").line()
    assert (
        "--runs computes nothing: leave out --epochs"
        in command("lp", "--runs", *paths, "-o", "other", "--epochs", 2).usage_error()
    )
    assert "holds another run" in command("lp", "--runs", *paths[:2], "-o", "run").line()
    command("lp", "--runs", *paths[:2], "-o", "run", "--fresh").done()
    assert Run(run.path).manifest.ranking["by"] == "lp1_approx"


def test_tables_that_do_not_match_are_refused_with_counts(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for path, ids in zip(paths, ([0, 1, 2, 3], [2, 3, 4], [0, 1, 1, 1]), strict=True):
        pl.DataFrame({"record_id": ids, "ppl_conditioned": [2.0] * len(ids)}).write_parquet(path)
    with pytest.raises(ScorerError, match=r"1\.parquet: 2 of the 4 rows .*0\.parquet are not in it, and 1 of its own"):
        join_runs(paths[:2], tmp_path / "run")
    with pytest.raises(ScorerError, match=r"2\.parquet: 2 rows repeat"):
        join_runs([paths[0], paths[2]], tmp_path / "run")
    with pytest.raises(ScorerError, match="two at least"):
        join_runs(paths[:1], tmp_path / "run")
    with pytest.raises(ScorerError, match="is one of the runs to join"):
        join_runs(paths[:2], paths[0], fresh=True)
    other = tmp_path / "other.csv"
    other.write_text("id,ppl\n1,2\n")
    with pytest.raises(ScorerError, match="has no column ppl_conditioned and no column record_id"):
        join_runs([paths[0], other], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_bring_their_data(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl(alpaca(6))
    options: dict[str, Any] = {"protocol": "small2large", "device": "cpu", "dtype": "float32", "shard_rows": 4}
    runs = [
        score(data, tmp_path / f"run-{f}", model=str(tiny(f).path), **options).path for f in ("gpt2", "llama")
    ]  # two models stand for two epochs
    joined = join_runs(runs, tmp_path / "joined")
    assert len(joined.shards()) == 2
    first, second = (Run(path).scores()["ppl_conditioned"] for path in runs)
    assert joined.scores()["lp1_approx"].to_list() == pytest.approx(((first - second) / first).to_list())
    selection = select(joined, tmp_path / "kept.jsonl", keep=2)
    assert selection.kept["record_id"].to_list() == sorted(((first - second) / first).arg_sort().to_list()[:2])
    assert [json.loads(line)["n"] for line in (tmp_path / "kept.jsonl").open()] == selection.kept["record_id"].to_list()
    limited = score(data, tmp_path / "limited", model=str(tiny("gpt2").path), limit=3, **options)
    with pytest.raises(ScorerError, match=r"the runs differ \(limit was"):
        join_runs([runs[0], limited.path], tmp_path / "other")


def test_what_cannot_learn_is_refused(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl(alpaca(3))
    model = str(tiny("gpt2").path)
    with pytest.raises(ScorerError, match="3 rows are one step of batch size 128"):
        learn(data, tmp_path / "run", training=Training(epochs=1), model=model, device="cpu")
    with pytest.raises(ScorerError, match="ends before the 2 epochs"):
        Training(epochs=2, schedule_epochs=1)
    with pytest.raises(ScorerError, match="leave protocol out"):
        learn(data, tmp_path / "run", model=model, protocol="aligned")  # type: ignore[call-arg]
    scored = score(data, tmp_path / "scored", model=model, device="cpu")
    with pytest.raises(ScorerError, match="holds a run of another kind"):
        learn(data, scored.path, model=model, device="cpu")


def _is_json(path: Path) -> bool:
    """Whether the file is there and whole."""
    try:
        return bool(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return False


@pytest.mark.slow
def test_training_learns_killed_or_not(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> None:
    """Perplexity of the training rows falls; kill -9 in each epoch, and the same command ends with the same bits."""
    rows = alpaca(49)
    rows[3]["output"] = ""
    data = write_jsonl(rows)
    command = Commands(tmp_path)
    arguments: list[object] = ["--model", tiny("gpt2").path, "--device", "cpu", "--epochs", 2, "--shard-rows", 20]
    arguments += ["--batch-size", 4, "--learning-rate", "1e-3", "--save-steps", 2]  # 12 steps an epoch
    command("lp", data, "-o", "whole", *arguments, "--keep-checkpoints").done()
    whole = Run(tmp_path / "whole")

    table = whole.scores()
    ok = table.filter(pl.col("status") == "ok")
    assert table["status"].value_counts().sort("status").rows() == [("empty_response", 1), ("ok", 48)]
    assert len(whole.shards()) == 3
    assert ok["lp1_approx"].is_finite().all()
    assert ok["ppl_0"].mean() > ok["ppl_1"].mean() > ok["ppl_2"].mean()  # type: ignore[operator]
    assert (ok["ppl_1"] < ok["ppl_0"]).mean() > 0.9  # type: ignore[operator]
    for i in range(3):
        assert Run(whole.path / f"epoch-{i}").scores()["ppl_conditioned"].equals(table[f"ppl_{i}"])
    kept = sorted(path.name for path in (whole.path / "checkpoints").iterdir())
    assert kept == ["epoch-1", "epoch-2"]
    again = score(
        data, tmp_path / "again", model=str(whole.path / "checkpoints" / "epoch-1"), protocol="small2large",
        device="cpu", dtype="float32", shard_rows=20,
    )  # fmt: skip
    assert again.scores()["ppl_conditioned"].equals(table["ppl_1"])  # a kept checkpoint is an ordinary model

    run = tmp_path / "killed"
    for step in (4, 14):
        process = command.start("lp", data, "-o", run, *arguments)
        wait(partial(_is_json, run / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"))
        process.kill()
    assert not (run / "epoch-2" / "manifest.json").exists()
    (run / "checkpoints" / "checkpoint-99").mkdir()  # what a kill while one is written leaves
    assert "training goes on after step 1" in command("lp", data, "-o", run, *arguments).done()
    assert_frame_equal(Run(run).scores(), table, check_exact=True)
    assert Run(run).complete
    assert not (run / "checkpoints").exists()
    assert "complete already" in command("lp", data, "-o", run, *arguments).done()
    assert "epochs was 2, is 1" in command("lp", data, "-o", run, *arguments, "--epochs", 1).line()


@pytest.mark.slow
def test_one_epoch_is_the_first_of_three(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> None:
    """The schedule spans three epochs whether or not they are trained."""
    data = write_jsonl(alpaca(8))
    options: dict[str, Any] = {"model": str(tiny("opt").path), "device": "cpu"}
    one, three = (
        learn(data, tmp_path / str(n), training=Training(epochs=n, batch_size=2, learning_rate=1e-3), **options)
        for n in (1, 3)
    )
    assert one.scores()["ppl_1"].equals(three.scores()["ppl_1"])
    assert one.scores()["lp1_approx"].equals(three.scores()["lp1_approx"])
    other = Training(epochs=1, schedule_epochs=1, batch_size=2, learning_rate=1e-3)
    short = learn(data, tmp_path / "short", training=other, **options)
    assert not short.scores()["ppl_1"].equals(one.scores()["ppl_1"])
