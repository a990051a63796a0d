"""Runs and what is left of them: killed, interrupted, out of disk, contended, changed; and every kind of odd row."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from polars.testing import assert_frame_equal
from transformers import GPT2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import scorer
from bench.lib.families import SIZES, byte_tokenizer
from scorer.config import ScoreConfig
from scorer.engines.choose import BATCH_TOKENS, resolve_config
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest
from scorer.runs.progress import Silent
from scorer.runs.run import RESUMABLE_FIELDS
from scorer.runs.shard_file import read_info
from scorer.runs.writer import RunWriter
from scorer.types import ScorerError
from tests.lib.command import CONSOLE_SCRIPT, FORKS, SECONDS, Commands, alpaca, end, read_jsonl, shards, start, wait
from tests.lib.runs import edit_manifest

Write = Callable[..., Path]


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
def options(tiny: Callable[[str], ModelFiles]) -> list[str]:
    model = str(tiny("gpt2").path)
    return ["--model", model, "--device", "cpu", "--dtype", "float32", "--shard-rows", "20"]


def assert_same(run: Path, other: Path) -> None:
    """Both tables hold the same bits, and nothing half written lies about."""
    assert_frame_equal(Run(run).scores(), Run(other).scores(), check_exact=True)
    assert not list(run.rglob("*.tmp"))


def _ahead(run: Path, target: int) -> bool:
    return shards(run) > target


@pytest.mark.slow
def test_kills_change_nothing(command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl(alpaca(800))
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    began = time.monotonic()
    command("score", data, "-o", undisturbed, *options).done()
    whole = time.monotonic() - began
    draw = random.Random(7)
    found: list[int] = []
    for kill in range(8):
        process = command.start("score", data, "-o", run, *options)
        if kill % 4 == 0:  # at any moment of loading
            time.sleep(draw.uniform(0, whole / 20))
        else:  # at any moment of the second shard from here on
            target = shards(run) + draw.randint(0, 1)
            wait(partial(_ahead, run, target))
            time.sleep(draw.uniform(0, whole / 40))
        assert process.kill().code == -signal.SIGKILL  # it was not over
        found.append(shards(run))
    assert found == sorted(found)  # no shard is lost again
    assert 5 <= found[-1] < 40
    assert "resuming after" in command("score", data, "-o", run, *options).done()
    assert_same(run, undisturbed)
    assert Run(run).scores()["record_id"].to_list() == list(range(800))
    before, after = Run(undisturbed).manifest, Run(run).manifest
    for name in ("fingerprint", "status", "state", "records"):
        assert getattr(after, name) == getattr(before, name)
    assert before.shards_by == after.shards_by == {"this process": 40}
    assert before.tokens == after.tokens > 0


@pytest.mark.slow
def test_control_c_says_that_the_same_command_resumes(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data = write_jsonl(alpaca(300))
    arguments = ["score", data, "-o", tmp_path / "run", *options]
    process = start(tmp_path, *arguments, OMP_NUM_THREADS="2")  # two batches at a time
    wait(lambda: shards(tmp_path / "run") > 1)
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.err.strip().splitlines()[-1] == ("scorer: interrupted; the same command goes on after what is done")
    left = shards(tmp_path / "run")
    assert 1 < left < 15
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert f"resuming after {left * 20:,} of 300 records" in command(*arguments).done()
    assert Run(tmp_path / "run").scores()["record_id"].to_list() == list(range(300))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_full_disk_ends_in_one_line_and_resumes(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path, small_disk: Path
) -> None:
    data = write_jsonl(alpaca(200))
    command("score", data, "-o", tmp_path / "undisturbed", *options).done()
    filler, run = small_disk / "filler", small_disk / "run"
    found = []
    for kib in (256, 252, 248, 230, 210):  # down to room for nothing, a lock, a manifest, some shards
        filler.write_bytes(b"x" * (kib << 10))
        ended = command("score", data, "-o", run, *options)
        assert ended.code == 1
        last = ended.err.splitlines()[-1]
        assert last.startswith("scorer: ")
        assert "the disk is full; free some space and run the same command again" in last
        assert "Traceback" not in ended.err
        assert not list(run.rglob("*.tmp"))
        found.append(shards(run))
        filler.unlink()
    assert found[0] == 0 < found[-1] < 10
    command("score", data, "-o", run, *options).done()
    assert_same(run, tmp_path / "undisturbed")


def test_one_writer_at_a_time_and_its_lock_dies_with_it(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    arguments = ["score", write_jsonl(alpaca(400)), "-o", tmp_path / "run", *options]
    first = command.start(*arguments)
    wait(lambda: shards(tmp_path / "run") > 0)
    os.kill(first.pid, signal.SIGSTOP)
    left = shards(tmp_path / "run")
    assert "another process is writing this run" in command(*arguments).line()
    assert "another process is writing this run" in command(*arguments, "--fresh").line()
    assert shards(tmp_path / "run") == left
    first.kill()
    assert "resuming after" in command(*arguments).done()


def test_changes_are_refused_by_name_and_fresh_starts_over(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data, run = write_jsonl(alpaca(40)), tmp_path / "run"
    command("score", data, "-o", run, *options).done()
    before = {path: path.stat().st_mtime_ns for path in (run / "manifest.json", *run.glob("scores/*"))}
    refusal = command("score", data, "-o", run, *options, "--max-length", 100, "--protocol", "aligned").line()
    assert "protocol was superfiltering, is aligned" in refusal
    assert "max_length was 1024, is 100" in refusal
    assert "engine" not in refusal
    assert "--fresh" in refusal
    assert "has 40 records, and --limit 5 is fewer" in command("score", data, "-o", run, *options, "--limit", 5).line()

    again = command("score", data, "-o", run, *options).done()
    assert "is complete already" in again
    assert "loading" not in again
    assert {path: path.stat().st_mtime_ns for path in before} == before

    write_jsonl(alpaca(40, seed=1))
    assert "inputs changed" in command("score", data, "-o", run, *options).line()
    old = Run(run).scores()
    assert "loading" in command("score", data, "-o", run, *options, "--fresh", "--limit", 30).done()
    assert Run(run).scores().height == 30
    assert not Run(run).scores().equals(old.head(30))


def test_a_limit_that_grows_continues_the_run(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    files = [write_jsonl(alpaca(45), "a.jsonl"), write_jsonl(alpaca(20, seed=1), "b.jsonl")]
    run, whole = tmp_path / "run", tmp_path / "whole"
    for limit, resumed in ((30, 0), (50, 20), (60, 40)):  # the second file is first counted with the second limit
        said = command("score", *files, "-o", run, *options, "--limit", limit).done()
        assert (f"resuming after {resumed} of {limit} records" in said) == bool(resumed)
        assert Run(run).manifest.records == Run(run).scores().height == limit
        assert sum(Run(run).manifest.shards_by.values()) == -(-limit // 20)
    assert "resuming after 60 of 65 records" in command("score", *files, "-o", run, *options).done()
    command("score", *files, "-o", whole, *options).done()
    assert_same(run, whole)
    before, after = Run(whole).manifest, Run(run).manifest
    for name in ("fingerprint", "status", "formats", "records", "input_records", "inputs"):
        assert getattr(after, name) == getattr(before, name)
    command("select", run, "-o", tmp_path / "kept.jsonl", "--keep", 65).done()
    # a kill between the removal of the shard that was not full and the new manifest
    RunWriter(run).remove_partial_shard()
    assert "resuming after 60 of 65" in command("score", *files, "-o", run, *options).done()
    assert_same(run, whole)


def test_a_resumed_run_keeps_the_date_of_its_beginning(
    tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("gpt2").path, model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (  # as many characters as years since 2000
        "{{ 'x' * (strftime_now('%Y') | int - 2000) }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    data = write_jsonl([{"prompt": "q", "response": "yes"}] * 4)
    options: dict[str, Any] = {"model": str(model), "device": "cpu", "protocol": "chat", "shard_rows": 2}
    run = scorer.score(data, tmp_path / "run", **options)
    now = int(run.manifest.began[:4]) - 2000
    assert run.scores()["prompt_tokens"].to_list() == [now + len("<user>q<assistant>")] * 4
    edit_manifest(run.path, began="2001-01-01T00:00:00")
    run.shard(1).unlink()
    again = scorer.score(data, run.path, **options).scores()["prompt_tokens"].to_list()
    assert [now - tokens + len("<user>q<assistant>") for tokens in again] == [0, 0, now - 1, now - 1]


def test_moved_data_and_another_batch_size_are_the_same_run(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data, run, moved = write_jsonl(alpaca(60)), tmp_path / "run", tmp_path / "moved.jsonl"
    command("score", data, "-o", run, *options).done()
    (run / "scores" / "part-00002.parquet").unlink()
    data.rename(moved)
    command("score", moved, "-o", run, *options, "--batch-tokens", "300").done()
    assert Run(run).manifest.config["batch_tokens"] == 300
    command("select", run, "-o", tmp_path / "best.jsonl").done()
    assert len(read_jsonl(tmp_path / "best.jsonl")) == 6


def test_a_linked_file_is_known_by_the_links_name(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    write_jsonl(alpaca(20)).rename(tmp_path / "0f3a")  # as a hub's cache keeps it: without a suffix
    (tmp_path / "data.jsonl").symlink_to("0f3a")
    command("filter", "data.jsonl", "-o", "best.jsonl", "--keep", 2, "--no-max-ifd", *options).done()
    assert len(read_jsonl(tmp_path / "best.jsonl")) == 2
    (tmp_path / "other.jsonl").symlink_to("0f3a")
    for taken in ("other.jsonl", "data.jsonl"):
        assert "would be overwritten" in command("select", "best.jsonl.run", "-o", taken).line()


class Rewriting(Silent):
    """While the first shard is scored, another program begins to write the same data file again."""

    def __init__(self, data: Path):
        self.data = data

    def advance(self, records: int, tokens: int) -> None:
        self.data.write_bytes(b"")


@pytest.mark.slow
def test_data_that_is_rewritten_while_it_is_read(
    tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path
) -> None:
    """No shard of it is short, the run is not called complete, and with the data back the same call finishes it."""
    data = write_jsonl(alpaca(600))
    options: dict[str, Any] = {"model": str(tiny("gpt2").path), "device": "cpu", "dtype": "float32", "shard_rows": 20}
    content, run = data.read_bytes(), tmp_path / "run"
    with pytest.raises(ScorerError, match="changed while it was read"):
        scorer.score(data, run, progress=Rewriting(data), **options)
    assert 0 < shards(run) < 30
    assert not Run(run).complete
    data.write_bytes(content)
    scorer.score(data, run, **options)
    scorer.score(data, tmp_path / "whole", **options)
    assert_same(run, tmp_path / "whole")


def test_data_that_is_another_at_the_end(tiny: Callable[[str], ModelFiles], write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl(alpaca(5))  # which is read before the first of it is scored
    options: dict[str, Any] = {"model": str(tiny("gpt2").path), "device": "cpu", "dtype": "float32"}
    with pytest.raises(ScorerError, match="changed since it was scored"):
        scorer.score(data, tmp_path / "run", progress=Rewriting(data), **options)
    assert not Run(tmp_path / "run").complete


def test_a_limit_leaves_files_beyond_it_alone(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data = write_jsonl(alpaca(12))
    other = write_jsonl([{"text": "of no format"}] * 3, "other.jsonl")
    command("score", data, other, "-o", tmp_path / "run", *options, "--limit", "12").done()
    ended = command("score", data, other, "-o", tmp_path / "refused", *options, "--limit", "14")
    assert ended.code == 2
    assert "other.jsonl" in ended.err
    assert shards(tmp_path / "refused") == 0


def test_a_run_without_scores_binds_nobody(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data = write_jsonl([{"ask": f"what is {i}?", "tell": f"it is {i}"} for i in range(5)])
    assert "--columns" in command("score", data, "-o", tmp_path / "run", *options).line()
    columns = ("--columns", "prompt=ask,response=tell")
    command("score", data, "-o", tmp_path / "run", *options, *columns).done()
    assert Run(tmp_path / "run").scores()["status"].to_list() == ["ok"] * 5


def test_every_file_is_looked_at_before_any_is_scored(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    good, bad = write_jsonl(alpaca(40)), write_jsonl([{"a": 1}, {"a": 2}], "bad.jsonl")
    assert str(bad) in command("score", good, bad, "-o", tmp_path / "run", *options).line()
    assert shards(tmp_path / "run") == 0


def test_a_deleted_shard_is_scored_again(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    data, run = write_jsonl(alpaca(100)), tmp_path / "run"
    command("score", data, "-o", run, *options).done()
    shutil.copytree(run, tmp_path / "undisturbed")
    (run / "scores/part-00002.parquet").unlink()
    assert "unfinished" in command("select", run, "-o", "best.jsonl").line()
    assert "resuming after 80 of 100" in command("score", data, "-o", run, *options).done()
    assert_same(run, tmp_path / "undisturbed")
    (run / "scores/part-00002.parquet").write_bytes(b"PAR1")
    line = command("select", run, "-o", "best.jsonl").line()
    assert "part-00002.parquet is damaged" in line
    assert "run the same command that scored it again" in line
    assert not (tmp_path / "best.jsonl").exists()
    said = command("score", data, "-o", run, *options).done()
    assert "part-00002.parquet is damaged" in said
    assert "resuming after 80 of 100" in said
    assert_same(run, tmp_path / "undisturbed")


def test_strict_names_file_and_line(command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path) -> None:
    rows = [*alpaca(30), {"instruction": "one more", "output": " "}, *alpaca(5)]
    data, run = write_jsonl(rows), tmp_path / "run"
    ended = command("score", data, "-o", run, *options, "--strict")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == (f"scorer: {data}:31: empty_response (--strict refuses what can't be scored)")
    assert shards(run) == 1  # what was written stays
    command("score", data, "-o", run, *options).done()
    assert Run(run).scores().filter(pl.col("status") != "ok")["record_id"].to_list() == [30]
    assert f"{data}:31: empty_response" in command("score", data, "-o", run, *options, "--strict").line()


def test_standard_input_is_kept_and_has_to_stay_the_same(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    text = "".join(json.dumps(row) + "\n" for row in alpaca(400))
    run = tmp_path / "run"
    first = command.start("score", "-", "-o", run, *options, stdin=text)
    wait(lambda: shards(run) > 0)
    first.kill()
    assert "other standard input" in command("score", "-", "-o", run, *options, stdin=text[:-900]).line()
    assert "other standard input" in command("score", "-", "-o", run, *options).line()
    assert "resuming after" in command("score", "-", "-o", run, *options, stdin=text).done()
    assert "complete already" in command("score", "-", "-o", run, *options, stdin=text).done()
    command("score", write_jsonl(alpaca(400)), "-o", tmp_path / "file", *options).done()
    assert_same(run, tmp_path / "file")
    command("select", run, "-o", "best.jsonl", "--keep", 3).done()
    assert len(read_jsonl(tmp_path / "best.jsonl")) == 3
    closed = subprocess.run(
        f"{CONSOLE_SCRIPT} score - -o closed <&-", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert (closed.returncode, closed.stderr) == (2, "scorer: -: standard input is closed\n")
    assert "read once" in command("score", "-", "-", "-o", tmp_path / "two", *options, stdin=text).line()
    assert "no records" in command("score", "-", "-o", tmp_path / "none", *options, stdin="\n").line()


def test_record_ids_count_over_all_inputs(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    rows = alpaca(70)
    parts = [write_jsonl(rows[:25], "a.jsonl"), tmp_path / "b.json.gz", tmp_path / "c.parquet"]
    parts[1].write_bytes(gzip.compress(json.dumps(rows[25:40]).encode()))
    pl.DataFrame(rows[40:]).write_parquet(parts[2])
    command("score", *parts, "-o", tmp_path / "parts", *options).done()
    command("score", write_jsonl(rows), "-o", tmp_path / "whole", *options).done()
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_places_that_are_no_run(command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl(alpaca(5))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert "not a run directory, and not empty" in command("score", data, "-o", taken, *options, "--fresh").line()
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    assert "File name too long" in command("score", data, "-o", "long" * 80, *options).line()
    for place, words in ((data, "is a file"), (data / "run", "is a file"), ("/proc/run", "can't be written")):
        assert words in command("score", data, "-o", place, *options).line()
    (tmp_path / "empty").mkdir()
    command("score", data, "-o", tmp_path / "empty", *options).done()


def test_odd_rows_get_a_status_and_harm_no_other(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path
) -> None:
    good = {"instruction": "Name a colour.", "output": "Blue, as the sky is."}
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}
    odd: list[tuple[Any, list[str]]] = [  # every token is a byte; the context holds 1,024
        ({"instruction": "Write.", "output": "word " * 200_000}, ["truncated"]),
        ({"instruction": "Pick one.", "output": "y"}, ["no_scorable_token"]),
        ({"instruction": "long " * 300, "output": "short"}, ["prompt_too_long"]),
        ({"instruction": "Surrogate \ud83d", "output": "half"}, ["not_text"]),
        ({"instruction": "Surrogate", "output": "\udc00 half"}, ["not_text"]),
        ({"instruction": "NUL \0", "output": "a\0b"}, ["ok"]),
        ({"instruction": "🙂 👩‍👩‍👧", "output": "🎉🎉"}, ["ok"]),
        ({"instruction": "תרגם", "output": "\u202eمرحبا\u202c"}, ["ok"]),
        ({"instruction": "a", "input": None, "output": "null input"}, ["ok"]),
        ({"instruction": "a", "output": None}, ["missing_field"]),
        ({"instruction": "a", "output": 7}, ["not_text"]),
        ({"instruction": "a", "output": ["b"]}, ["not_text"]),
        ({"instruction": "a", "output": " \n"}, ["empty_response"]),
        ({"instruction": "a"}, ["missing_field"]),
        ({"weather": "fine"}, ["unknown_format"]),
        ([1, 2], ["unknown_format"]),
        ({"prompt": "Which?", "completion": "This one."}, ["ok"]),
        ({"messages": [user, assistant, user, assistant, user, assistant]}, ["ok"] * 3),
        ({"messages": [user, assistant, user, {"role": "assistant", "content": ""}]}, ["ok", "empty_response"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "an answer"}]}, ["ok"]),
        ({"messages": [user, user]}, ["no_assistant_turn"]),
    ]
    rows = [row for pair in odd for row in (pair[0], good)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"instruction": "a", "outp\n')
    command("score", path, "-o", tmp_path / "run", *options, "--shard-rows", 7).done()
    scores = Run(tmp_path / "run").scores()
    expected = [statuses for pair in odd for statuses in (pair[1], ["ok"])] + [["bad_json"]]
    keys = [(i, turn) for i, statuses in enumerate(expected) for turn in range(len(statuses))]
    assert list(scores.select("record_id", "turn").iter_rows()) == keys
    found = [group["status"].to_list() for _, group in scores.group_by("record_id", maintain_order=True)]
    assert found == expected
    assert Run(tmp_path / "run").manifest.status == Counter(chain.from_iterable(expected))
    measures = ("nll_conditioned", "nll_alone", "ppl_conditioned", "ppl_alone", "ifd", "ifd_loss", "response_tokens")
    for row in scores.iter_rows(named=True):
        assert all((row[name] is not None) == (row["status"] in ("ok", "truncated")) for name in measures), row
    # The same row scores the same beside any neighbour (to rounding: it is packed with others), and alone.
    same = scores.filter(pl.col("record_id").is_in(range(1, len(rows), 2)))
    command("score", write_jsonl([good]), "-o", tmp_path / "good", *options).done()
    alone = Run(tmp_path / "good").scores().row(0, named=True)
    for name in measures:
        assert same[name].to_list() == pytest.approx([alone[name]] * len(odd), rel=1e-5)


def test_the_manifest_says_what_was_done(
    command: Commands, options: list[str], write_jsonl: Write, tmp_path: Path, tiny: Callable[[str], ModelFiles]
) -> None:
    data, run = write_jsonl([*alpaca(30), {"instruction": "a", "output": ""}]), tmp_path / "run"
    command("score", data, "-o", run, *options).done()
    manifest = json.loads((run / "manifest.json").read_text())
    content = data.read_bytes()
    assert manifest["inputs"] == [
        {
            "path": str(data),
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "modified_ns": data.stat().st_mtime_ns,
        }
    ]
    config = manifest["identity"]["config"]
    assert (config["engine"], config["dtype"], config["device"]) == ("packed", "float32", "cpu")
    assert (config["max_length"], config["shard_rows"], config["protocol"]) == (1024, 20, "superfiltering")
    for free in RESUMABLE_FIELDS:  # the revision says which model it is, and batches change no score
        if free != "limit":
            del config[free]
    identity = json.dumps(manifest["identity"], sort_keys=True).encode()
    assert manifest["fingerprint"] == hashlib.sha256(identity).hexdigest()
    files = tiny("gpt2")
    assert manifest["model"]["revision"] == files.revision
    assert manifest["model"]["path"] == str(files.path)
    (environment,) = manifest["environments"]
    assert set(environment) == {"device", "python", "ifd-scorer", "torch", "transformers", "polars", "shards"}
    assert "threads" in environment["device"]
    assert environment["shards"] == 2
    assert manifest["shards"] == [[info.rows, info.sha256] for info in map(read_info, Run(run).shards())]
    assert manifest["status"] == {"ok": 30, "empty_response": 1}
    assert manifest["records"] == 31
    assert manifest["state"] == "complete"
    table = Run(run).scores().drop_nulls("ifd")
    # the alone view is the response: one token a byte, all but the first of them scored
    expected = sum(table["prompt_tokens"]) + sum(table["response_tokens"]) + sum(table["alone_tokens"] + 1)
    assert manifest["tokens"] == expected
    assert 0 < manifest["seconds"] < SECONDS
    assert sorted(path.name for path in (run / "scores").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]


def test_from_python(tiny: Callable[[str], ModelFiles], write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(alpaca(40))
    monkeypatch.chdir(data.parent)
    model = str(tiny("gpt2").path)
    run = scorer.score(data, model=model, device="cpu", dtype="float32")
    assert run.path.parent == Path("scorer-runs")
    assert run.path.name.startswith("data-")
    assert run.scores().height == 40
    assert scorer.score("data.jsonl", model=model, device="cpu", dtype="float32").path == run.path
    assert scorer.score(data, model=model, device="cpu", dtype="float32", limit=3).path != run.path
    selection = scorer.select(run, keep=0.1, max_ifd=None)
    best = run.scores().sort("ifd", descending=True).head(4)["record_id"]
    assert selection.kept["record_id"].to_list() == sorted(best)
    with pytest.raises(ScorerError, match="unknown option modle; the options are allow_pickle"):
        scorer.score(data, modle=model)  # type: ignore[call-arg]
    with pytest.raises(ScorerError, match="no data"):
        scorer.score([], model=model)


def _peak(data: str, output: str, model: str, answer: Any) -> None:
    scorer.score(data, output, model=model, device="cpu", dtype="float32", batch_tokens=16384)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(
        GPT2Config(**SIZES, n_embd=16, n_layer=1, n_head=1, n_positions=64)
    ).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    peaks: list[float] = []
    for rows in (2_000, 200_000):
        data = tmp_path / f"{rows}.jsonl"
        data.write_text("".join(f'{{"instruction": "{i % 97}", "output": "a{i % 1000}z"}}\n' for i in range(rows)))
        answer = FORKS.SimpleQueue()
        child = FORKS.Process(target=_peak, args=(str(data), str(tmp_path / f"run{rows}"), str(model), answer))
        child.start()
        child.join()
        assert child.exitcode == 0
        peaks.append(answer.get())
    assert Run(tmp_path / "run200000").manifest.status == {"ok": 200_000}
    assert peaks[1] - peaks[0] <= 300, f"MiB at the peak: {peaks}"


def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path) -> None:
    count = 300 * 50
    config = {"limit": None, "columns": None, "shard_rows": 50}
    manifest = Manifest(identity={"config": config, "inputs": []}, ranking={}, records=count)
    run = RunWriter(tmp_path / "run")
    with run.locked():
        run.write_manifest(manifest)
        for index in range(300):
            ids = range(index * 50, index * 50 + 50)
            run.write_shard(index, pl.DataFrame({"record_id": ids, "ifd": [i / count for i in ids], "other": ids}))
    shard = run.shards()[150]
    (place,) = [
        group["columns"][2]
        for group in pq.read_metadata(shard).to_dict()["row_groups"]
        if group["columns"][2]["path_in_schema"] == "other"
    ]
    begin = place["dictionary_page_offset"] or place["data_page_offset"]
    with run.snapshot() as table:
        content = bytearray(shard.read_bytes())
        content[begin : begin + place["total_compressed_size"]] = b"\xff" * place["total_compressed_size"]
        shard.write_bytes(content)
        assert table.scores(["record_id", "ifd"])["record_id"].to_list() == list(range(count))
        largest = table.collect(lambda rows: rows.select(pl.col("ifd").max()))
        assert largest.item() == (count - 1) / count
        with pytest.raises(ScorerError, match="can't be read"):
            table.scores()
    with pytest.raises(ScorerError, match=r"part-00150\.parquet is damaged"):
        run.scores()


def test_a_machine_without_a_gpu_can_send_a_run_to_gpus(tiny: Callable[[str], ModelFiles]) -> None:
    named = ScoreConfig(engine="packed", device="cuda", dtype="bfloat16")
    assert resolve_config(named, tiny("gpt2"), elsewhere=True).batch_tokens == BATCH_TOKENS["packed", "cuda"]
    if not torch.cuda.is_available():
        with pytest.raises(ScorerError, match="finds no CUDA device here"):
            resolve_config(named, tiny("gpt2"))
