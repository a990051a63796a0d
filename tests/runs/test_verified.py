"""Runs prove themselves: what is read is what was written, or one line says which file is not."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import scorer
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.runs.progress import Silent
from scorer.runs.shard_file import read_info
from scorer.types import ScorerError
from tests.lib.command import alpaca
from tests.lib.runs import edit_manifest, write_clusters

Write = Callable[..., Path]
ROWS, SHARD_ROWS = 60, 20


@pytest.fixture
def options(tiny: Callable[[str], ModelFiles]) -> dict[str, Any]:
    model = str(tiny("gpt2").path)
    return {"model": model, "device": "cpu", "dtype": "float32", "shard_rows": SHARD_ROWS, "progress": False}


@pytest.fixture
def data(write_jsonl: Write) -> Path:
    return write_jsonl(alpaca(ROWS))


@pytest.fixture
def run(data: Path, options: dict[str, Any], tmp_path: Path) -> Run:
    return scorer.score(data, tmp_path / "run", **options)


def cut(run: Run, other: Run) -> None:
    """Write half of a shard's rows again, as any program could."""
    path = run.shard(1)
    pl.read_parquet(path).head(10).write_parquet(path)


def stray(run: Run, other: Run) -> None:
    """Add a shard of the same run under a number that it does not have."""
    shutil.copy(run.shard(1), run.shard(77))


def swapped(run: Run, other: Run) -> None:
    """Exchange two whole shards."""
    one, two = run.shard(0), run.shard(1)
    one.rename(run.path / "aside")
    two.rename(one)
    (run.path / "aside").rename(two)


def foreign(run: Run, other: Run) -> None:
    """Put the whole shard of another run in the place of one."""
    shutil.copy(other.shard(1), run.shard(1))


def shorter(run: Run, other: Run) -> None:
    """Pretend that a shard was written with other rows: it is whole, and of this run."""
    edit_manifest(run.path, shards=[[20, "0" * 64], *run.manifest.shards[1:]])


@pytest.mark.parametrize(
    ("damage", "name", "fault"),
    [
        (cut, "part-00001", "is damaged (it has no digest)"),
        (stray, "part-00077", "is no part of this run"),
        (swapped, "part-00000", "is no part of this run, and 1 other"),
        (foreign, "part-00001", "is no part of this run"),
        (shorter, "part-00000", "is another than was counted"),
    ],
)
def test_a_faulty_shard_is_named_and_the_same_call_mends_it(
    damage: Callable[[Run, Run], None], name: str, fault: str, run: Run, data: Path, options: dict[str, Any]
) -> None:
    undisturbed = run.scores()
    other = scorer.score(data, run.path.with_name("other"), **options)
    damage(run, other)
    again = Run(run.path)
    for read in (
        again.scores,
        again.summary,
        lambda: scorer.select(again, keep=5),
        lambda: scorer.report([again], "r.html"),
    ):
        with pytest.raises(ScorerError, match=re.escape(f"{name}.parquet {fault}")):
            read()
    mended = scorer.score(data, run.path, **options)
    assert_frame_equal(mended.scores(), undisturbed, check_exact=True)
    assert [path.name for path in mended.shards()] == [f"part-0000{i}.parquet" for i in range(3)]


def test_names_that_only_look_like_a_shard(run: Run, data: Path, options: dict[str, Any]) -> None:
    undisturbed = run.scores()
    for name in ("part-0.parquet", "part-000000.parquet"):
        shutil.copy(run.shard(0), run.path / "scores" / name)
    (run.path / "scores" / "part-\u0660.parquet").write_bytes(b"another program's")
    with pytest.raises(ScorerError, match=r"part-0+\.parquet is no part of this run, and 1 other"):
        Run(run.path).scores()
    assert scorer.score(data, run.path, **options).scores().equals(undisturbed)
    assert len(list((run.path / "scores").iterdir())) == 4


@pytest.mark.parametrize("name", ["manifest.json", "scores/part-00001.parquet"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file(
    name: str, run: Run, data: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed, path = run.scores(), run.path / name
    kept = path.rename(tmp_path / "kept")
    for make, take_away in ((os.mkfifo, os.unlink), (os.mkdir, None)):
        make(path)
        with pytest.raises(ScorerError, match="not a file"):
            Run(run.path).scores()
        if take_away:
            take_away(path)
    with pytest.raises(ScorerError, match=r"can't be r"):
        scorer.score(data, run.path, **options)
    path.rmdir()
    kept.rename(path)
    assert scorer.score(data, run.path, **options).scores().equals(undisturbed)


def test_a_copy_without_hidden_files_is_a_run(run: Run, data: Path, options: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    copy = Run(tmp_path / "copy")
    with pytest.raises(ScorerError, match="would replace a part of the run"):
        scorer.select(copy, copy.path / "manifest.json", keep=3)
    copy.shard(1).unlink()
    assert scorer.score(data, copy.path, **options).scores().equals(run.scores())


def test_a_link_in_the_place_of_the_lock_is_not_followed(data: Path, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "run" / "scores").mkdir(parents=True)
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(ScorerError, match="can't be written"):
        scorer.score(data, tmp_path / "run", **options)
    assert (tmp_path / "file").read_text() == "years of work"


class Swapping(Silent):
    """Another program replaces the model's weights as soon as they are to be loaded."""

    def __init__(self, weights: Path):
        self.weights = weights

    def say(self, message: str) -> None:
        if message.startswith("loading"):
            self.weights.write_bytes(self.weights.read_bytes()[:-4] + b"\0\0\0\1")


def test_a_model_that_changes_as_it_is_loaded(data: Path, run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(options["model"], tmp_path / "model"))
    weights, given = folder / "model.safetensors", options | {"model": str(folder)}
    content = weights.read_bytes()
    with pytest.raises(ScorerError, match="the model changed while it was used"):
        scorer.score(data, tmp_path / "other", **(given | {"progress": Swapping(weights)}))
    assert not Run(tmp_path / "other").shards()
    weights.write_bytes(content)
    assert scorer.score(data, tmp_path / "other", **given).scores().equals(run.scores())


def test_clusters_of_fewer_records(data: Path, options: dict[str, Any], tmp_path: Path) -> None:
    few = scorer.score(data, tmp_path / "few", **(options | {"limit": 10}))
    write_clusters(few, {"record_id": range(10), "cluster": [0, 1] * 5})
    kept = shutil.copy(few.path / "clusters.parquet", tmp_path)
    grown = scorer.score(data, few.path, **options)
    shutil.copy(kept, grown.path)
    with pytest.raises(ScorerError, match=r"clusters\.parquet can't be read.*of another run, or of fewer records"):
        scorer.select(grown, keep=4, per_cluster=True)


@pytest.mark.parametrize(
    "values", [{"input_records": [61]}, {"records": 30}, {"state": "done"}, {"shards": []}, {"records": "many"}]
)
def test_a_manifest_that_was_edited_is_refused(
    values: dict[str, Any], run: Run, data: Path, options: dict[str, Any]
) -> None:
    path = run.path / "manifest.json"
    (name, value), text = next(iter(values.items())), path.read_text()
    path.write_text(re.sub(rf'"{name}": (\[[^"]*?\]|"\w*"|\d+)', f'"{name}": {str(value)!r}', text, count=1))
    assert path.read_text() != text
    for use in (lambda: Run(run.path).scores(), lambda: scorer.score(data, run.path, **options)):
        with pytest.raises(ScorerError, match=r"manifest\.json can't be read"):
            use()
    path.write_text(re.sub(r"\n +", " ", text))  # the layout of the file is free
    assert Run(run.path).complete


def test_scores_without_a_manifest_are_not_thrown_away(run: Run, data: Path, options: dict[str, Any]) -> None:
    (run.path / "manifest.json").rename(run.path.with_name("kept.json"))
    with pytest.raises(ScorerError, match=r"scores and no manifest\.json"):
        scorer.score(data, run.path, **options)
    assert len(run.shards()) == 3
    run.path.with_name("kept.json").rename(run.path / "manifest.json")
    assert scorer.score(data, run.path, **options).scores().equals(run.scores())


def test_a_run_that_is_started_over_while_it_is_read(
    run: Run, data: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    with run.snapshot() as table:
        assert table.scores(["ifd"]).height == ROWS
        scorer.score(data, run.path, fresh=True, **(options | {"limit": 5}))
        with pytest.raises(ScorerError, match="changed by another process while it was read"):
            table.scores()
    with pytest.raises(ScorerError, match="changed by another process"):
        scorer.select(run, tmp_path / "best.jsonl", keep=2)  # what was known of it is of the run before
    assert not (tmp_path / "best.jsonl").exists()
    assert scorer.select(Run(run.path), tmp_path / "best.jsonl", keep=2).kept.height == 2


def test_other_software_is_said_and_recorded(
    data: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, given = torch.get_num_threads(), options | {"progress": True}
    try:
        for count, limit in ((1, 20), (2, 40)):
            torch.set_num_threads(count)
            run = scorer.score(data, tmp_path / "run", **(given | {"limit": limit}))
            said = capsys.readouterr().err
            assert ("other software or another device: device" in said) == (count == 2)
        assert "1 threads then" in said
    finally:
        torch.set_num_threads(threads)
    one, two = run.manifest.environments
    assert [(entry["device"][-9:], entry["shards"]) for entry in (one, two)] == [("1 threads", 1), ("2 threads", 1)]
    assert {**one, "device": "", "shards": 0} == {**two, "device": "", "shards": 0}


def test_equal_texts_have_equal_scores(write_jsonl: Write, options: dict[str, Any], tmp_path: Path) -> None:
    """However they are batched and cut into shards, so that the first of them are kept."""
    rows = alpaca(50)
    copied = rows[7]
    for place in (0, 13, 21, 22, 40, 49):
        rows.insert(place, copied)
    data = write_jsonl(rows)
    copies = [i for i, row in enumerate(rows) if row == copied]
    assert len(copies) == 7
    kept: list[list[int]] = []
    for shard_rows, batch_tokens in ((1000, 4096), (20, 4096), (9, 300), (3, 1100)):
        given = options | {"shard_rows": shard_rows, "batch_tokens": batch_tokens}
        run = scorer.score(data, tmp_path / f"run{shard_rows}", **given)
        scores = run.scores().filter(pl.col("record_id").is_in(copies))
        assert scores.drop("record_id").unique().height == 1
        assert run.scores()["tokens_hash"].n_unique() == 50
        better = run.scores().filter(pl.col("ifd") > scores["ifd"][0]).height
        selection = scorer.select(run, keep=better + 3, max_ifd=None)
        kept.append([i for i in selection.kept["record_id"].to_list() if i in copies])
    assert kept == [copies[:3]] * 4


def test_the_hash_of_tokens_tells_sequences_apart(write_jsonl: Write, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"instruction": "ab", "output": "cdef"},
        {"instruction": "abc", "output": "def"},  # the same tokens, of which fewer are scored
        {"instruction": "ab", "output": "cde"},  # the beginning of the first
        {"instruction": "ba", "output": "cdef"},
        {"instruction": "ab", "output": "cdef"},
        {"instruction": "ab", "output": ""},
    ]
    run = scorer.score(write_jsonl(rows), tmp_path / "run", **(options | {"protocol": "aligned"}))
    hashes = run.scores()["tokens_hash"].to_list()
    assert hashes[0] == hashes[4]
    assert hashes[5] is None
    assert len(set(hashes)) == 5


def _mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one small change."""
    kind, begin, size = draw.randrange(6), draw.randrange(len(content)), draw.randint(1, 40)
    end = begin + size
    if kind <= 1:
        changed = bytearray(content)
        changed[begin] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 2:
        return content[:begin]
    if kind == 3:
        return content[:begin] + content[end:]
    if kind == 4:
        return content[:end] + content[begin:]
    return content[:begin] + draw.randbytes(size) + content[end:]


def test_mutations_of_a_run_give_its_table_or_one_line(
    run: Run, data: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """Of a complete run that is read, and of an unfinished one that is resumed."""
    undisturbed, draw = run.scores(), random.Random(17)
    best = scorer.select(run, keep=7).kept
    shutil.copytree(run.path, tmp_path / "half")
    half = Run(tmp_path / "half")
    edit_manifest(half.path, state="running", shards=())
    half.shard(2).unlink()
    same = Counter[str]()
    for number in range(500):
        path = run.path if number % 50 else tmp_path / f"half-{number}"
        if path != run.path:
            shutil.copytree(half.path, path)
        victim = draw.choice([path / "manifest.json", *Run(path).shards()])
        content = victim.read_bytes()
        victim.write_bytes(_mutated(content, draw))
        try:
            mutated = Run(path) if path == run.path else scorer.score(data, path, **options)
            assert_frame_equal(mutated.scores(), undisturbed, check_exact=True)
            assert scorer.select(mutated, keep=7).kept.equals(best)
            same["read" if path == run.path else "resumed"] += 1
        except ScorerError as error:
            said = str(error)
            assert "\n" not in said
        victim.write_bytes(content)
    assert same["read"] < 50  # the layout of the manifest is free, and little else
    assert same["resumed"] > 4  # shards are scored again; a manifest can't be mended


def test_every_flipped_bit_is_found(run: Run, tmp_path: Path) -> None:
    shard = run.shard(1)
    content, draw = shard.read_bytes(), random.Random(3)
    copy = tmp_path / "part-00001.parquet"
    for bit in draw.sample(range(8 * len(content)), 500):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(changed)
        with pytest.raises(ValueError, match=r"digest|bytes are not"):
            read_info(copy)
    copy.write_bytes(content)
    assert read_info(copy).records == SHARD_ROWS
