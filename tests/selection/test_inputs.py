"""Selecting with what stands beside a run's scores, from the command line: clusters, columns, embeddings, flags."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from scorer.data.dataset import Dataset
from scorer.runs import extras
from scorer.runs.directory import FLAGS, Run
from scorer.selection.inputs import column_groups
from tests.lib.command import Commands, read_jsonl
from tests.lib.runs import make_run, write_clusters

COUNT = 20
LANGUAGES: list[object] = ["de", "fr", None, 3]
ANSWERS = {2: "I'm sorry, but I can't.", 5: "https://example.org"}


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Twenty records, ifd rising from 0.00 to 0.95; the language goes by fours, and every fourth has the key not."""
    rows = [{"instruction": f"q{i}", "output": ANSWERS.get(i, f"a{i}"), "n": i} for i in range(COUNT)]
    for i, row in enumerate(rows):
        if LANGUAGES[i % 4] is not None:
            row["lang"] = LANGUAGES[i % 4]
    ppl = [100.0 + i if i != 7 else 1e9 for i in range(COUNT)]
    return make_run(tmp_path / "run", rows, ifd=[i / COUNT for i in range(COUNT)], ppl_alone=ppl)


def cluster(run: Run) -> None:
    """Ten records in cluster 1, nine in cluster 0, and one without."""
    write_clusters(run, {"record_id": range(COUNT - 1), "cluster": [1] * 10 + [0] * 9})


def embed(run: Run) -> None:
    """Record i looks along axis i % 4, in two parts of 12 and 8."""
    folder = run.path / "embeddings"
    folder.mkdir()
    rows = np.eye(4, dtype=np.float32)[np.arange(COUNT) % 4]
    digests = {}
    for path, part in ((folder / "part-00000.npy", rows[:12]), (folder / "part-00001.npy", rows[12:])):
        np.save(path, part)
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({extras.DIGESTS: digests}))


def chosen(path: Path) -> list[int]:
    return [row["n"] for row in read_jsonl(path)]


def test_per_cluster(command: Commands, run: Run, tmp_path: Path) -> None:
    given = ("select", "run", "-o", "a.jsonl", "--per-cluster")
    line = command(*given).line()
    assert "clusters.parquet: no such file" in line
    assert "scorer cluster run" in line
    cluster(run)
    command(*given, "--keep", "20%").done()
    assert chosen(tmp_path / "a.jsonl") == [8, 9, 17, 18]  # 2, 1.8 and 0.2 of ten, nine and one
    command(*given, "--keep", "20%", "--rounding", "paper", "--lowest").done()
    assert chosen(tmp_path / "a.jsonl") == [0, 1, 10, 11, 19]
    command(*given, "--bucket", "mid", "--keep", "100%").done()
    assert chosen(tmp_path / "a.jsonl") == [4, 5, 6, 13, 14, 15]  # 4 3 3, 3 3 3, 1 0 0
    draws = []
    for seed in (1, 1, 2):
        command(*given, "--random", "--seed", seed, "--keep", "50%").done()
        draws.append(chosen(tmp_path / "a.jsonl"))
    assert draws[0] == draws[1] != draws[2]
    assert [sum(i < 10 for i in draw) for draw in draws] == [5, 5, 5]
    assert "paper's needs a share" in command(*given, "--rounding", "paper", "--keep", 5).line()
    assert "not by both" in command(*given, "--per", "lang").line()


def test_per_column(command: Commands, run: Run, tmp_path: Path) -> None:
    command("select", "run", "-o", "a.jsonl", "--per", "lang", "--keep", 8).done()
    assert chosen(tmp_path / "a.jsonl") == list(range(12, 20))  # the two best of each four
    assert column_groups(run.data, "lang")["group"].to_list()[:4] == ["de", "fr", None, "3"]
    line = command("select", "run", "-o", "b.jsonl", "--per", "language").line()
    assert "no record of" in line
    assert "'language'" in line


def test_per_column_of_values_that_no_table_holds(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(f'{{"k":{value}}}\n' for value in ('"\\ud800"', '"a\\u0000"', '{"\\ud800":1}', "null")))
    with Dataset([path]) as data:
        groups = column_groups(data, "k")["group"].to_list()
    assert groups == ['"\\ud800"', "a\0", '{"\\ud800": 1}', None]


def test_diverse(command: Commands, run: Run, tmp_path: Path) -> None:
    given = ("select", "run", "-o", "a.jsonl", "--diverse", "20%", "--from", "40%")
    assert "has no embeddings: run `scorer cluster run` first" in command(*given).line()
    embed(run)
    command(*given, "--rejected", "r.jsonl").done()
    assert chosen(tmp_path / "a.jsonl") == [12, 13, 14, 15]  # one of each axis, of 12 to 19 the first
    reasons = [row["scorer"]["reason"] for row in read_jsonl(tmp_path / "r.jsonl")]
    assert reasons == ["below_cut"] * 12 + ["not_diverse"] * 4
    command("select", "run", "-o", "a.jsonl", "--diverse", 1, "--lowest").done()  # from 20%
    assert chosen(tmp_path / "a.jsonl") == [0]
    assert "leave --keep out" in command(*given, "--keep", "5%").line()
    assert "give --diverse too" in command("select", "run", "-o", "a.jsonl", "--from", "40%").line()
    assert "can't be kept of the 4" in command("select", "run", "-o", "a.jsonl", "--diverse", 5).line()
    (run.path / "embeddings" / "part-00001.npy").unlink()
    assert "holds 12 of 20 embeddings" in command(*given).line()


def test_embeddings_of_some_records(run: Run) -> None:
    embed(run)
    rows = extras.embeddings(extras.embedding_parts(run), pl.Series([1, 11, 12, 19], dtype=pl.Int64))
    assert rows.dtype == np.float32
    assert rows.argmax(axis=1).tolist() == [1, 3, 0, 3]


def test_flags(command: Commands, run: Run, tmp_path: Path) -> None:
    given = ("select", "run", "-o", "a.jsonl", "--keep", "100%", "--rejected", "r.jsonl", "--drop-flagged")
    command(*given, "refusal,gibberish, empty_or_link_only").done()
    dropped = [(row["n"], row["scorer"]["reason"]) for row in read_jsonl(tmp_path / "r.jsonl")]
    assert dropped == [(2, "refusal"), (5, "empty_or_link_only"), (7, "gibberish")]
    assert "flags.parquet: no such file" in command(*given, "near_duplicate").line()
    stored = {"record_id": [4, 9], "far_from_instruction": [True, False], "near_duplicate": [None, True]}
    write_clusters(run, stored, FLAGS)
    command(*given, "near_duplicate,far_from_instruction,ifd_above_1").done()
    dropped = [(row["n"], row["scorer"]["reason"]) for row in read_jsonl(tmp_path / "r.jsonl")]
    assert dropped == [(4, "far_from_instruction"), (9, "near_duplicate")]
    assert "ifd_above_1, gibberish" in command(*given, "ugly").line()


def test_the_lowest_lp_is_the_best(command: Commands, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a", "n": i} for i in range(4)]
    make_run(tmp_path / "lp", rows, lp1_approx=[0.4, -0.1, 0.3, 0.2])
    command("select", "lp", "-o", "a.jsonl", "--by", "lp1_approx", "--keep", 2).done()
    assert chosen(tmp_path / "a.jsonl") == [1, 3]
    command("select", "lp", "-o", "a.jsonl", "--by", "lp1_approx", "--keep", 2, "--highest").done()
    assert chosen(tmp_path / "a.jsonl") == [0, 2]


def test_filter_refuses_at_once_what_needs_clusters(command: Commands, run: Run, tmp_path: Path) -> None:
    for option in (("--per-cluster",), ("--diverse", "2%"), ("--drop-flagged", "near_duplicate")):
        line = command("filter", "run.jsonl", "-o", "a.jsonl", *option).line()
        assert "`scorer score`, `cluster` and `select`" in line
    assert not (tmp_path / "a.jsonl.run").exists()
