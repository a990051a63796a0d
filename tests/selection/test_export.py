"""From a finished run to the records themselves: how many, which, in what order and format, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import zstandard

import scorer
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.types import ScorerError
from tests.lib.command import Commands, alpaca, read_jsonl
from tests.lib.runs import edit_manifest

TEXTS = ["naïve 🙂", "תרגם לעברית", "a\tb\\n", "\u2028 line", "NUL \0 it", 'quote " it']
ROWS: list[Any] = [  # lines 50 to 54 are odd, and of 55 records 50 can be scored
    *(
        {**row, "instruction": row["instruction"] + TEXTS[row["n"] % len(TEXTS)], "tags": [1, None]}
        for row in alpaca(50)
    ),
    {"instruction": "a", "output": ""},
    {"instruction": "b", "output": 3},
    {"instruction": "c"},
    ["no object"],
]
BAD_LINE = '{"instruction": "d", "output": "never clo'


@pytest.fixture(scope="module")
def options(tiny: Callable[[str], ModelFiles]) -> list[str]:
    return ["--model", str(tiny("gpt2").path), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def scored(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.jsonl, and its finished run in `run`."""
    path = tmp_path_factory.mktemp("scored")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS) + BAD_LINE
    (path / "data.jsonl").write_text(lines, encoding="utf-8")
    Commands(path)("score", "data.jsonl", "-o", "run", *options).done()
    return path


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def ranking(run: Path, by: str = "ifd", lowest: bool = False) -> list[int]:
    """The ids of all scored records, the best first."""
    scores = Run(run).scores().drop_nulls(by)
    return scores.sort(by, "record_id", descending=[not lowest, False])["record_id"].to_list()


@pytest.mark.parametrize(("keep", "count"), [("10%", 6), ("9.9%", 5), ("0.5", 28), ("7", 7), ("1", 1), ("50", 50)])
def test_the_best_come_out_as_they_were(command: Commands, scored: Path, tmp_path: Path, keep: str, count: int) -> None:
    shown = command("select", scored / "run", "-o", "best.jsonl", "--keep", keep, "--no-max-ifd").done()
    chosen = sorted(ranking(scored / "run")[:count])
    lines = (scored / "data.jsonl").read_text(encoding="utf-8").split("\n")
    assert (tmp_path / "best.jsonl").read_text(encoding="utf-8").split("\n") == [*(lines[i] for i in chosen), ""]
    assert f"kept {count} of 55 records: best.jsonl" in shown
    assert "1 bad_json" in shown


def test_the_paper_keeps_ifd_below_one(command: Commands, scored: Path, tmp_path: Path) -> None:
    ifd = dict(Run(scored / "run").scores().select("record_id", "ifd").iter_rows())
    below = [i for i in ranking(scored / "run") if ifd[i] < 1]
    assert 5 < len(below) < 45
    shown = command("select", scored / "run", "-o", "best.jsonl", "--keep", 50).done()
    assert [row["n"] for row in read_jsonl(tmp_path / "best.jsonl")] == sorted(below)
    assert "50 were asked for" in shown
    assert f"{50 - len(below)} ifd_too_high" in shown
    command("select", scored / "run", "-o", "best.jsonl", "--keep", 3, "--max-ifd", 0.9, "--order", "rank").done()
    best = [i for i in below if ifd[i] < 0.9][:3]
    assert [row["n"] for row in read_jsonl(tmp_path / "best.jsonl")] == best


def test_by_lowest_and_rank(command: Commands, scored: Path, tmp_path: Path) -> None:
    arguments = ("--no-max-ifd", "--order", "rank", "--keep", 5)
    command("select", scored / "run", "-o", "a.jsonl", "--by", "ppl_alone", "--lowest", *arguments).done()
    assert [row["n"] for row in read_jsonl(tmp_path / "a.jsonl")] == ranking(scored / "run", "ppl_alone", True)[:5]
    command("select", scored / "run", "-o", "a.jsonl", "--by", "response_tokens", *arguments).done()
    assert [row["n"] for row in read_jsonl(tmp_path / "a.jsonl")] == ranking(scored / "run", "response_tokens")[:5]


def test_random_draws_from_all_records(command: Commands, scored: Path, tmp_path: Path) -> None:
    shown = command("select", scored / "run", "-o", "all.jsonl", "--random", "--keep", "100%").done()
    assert "drew 54 at random from 54 of 55 records: all.jsonl" in shown  # a broken line is no record
    assert "dropped: 1 bad_json" in shown
    assert read_jsonl(tmp_path / "all.jsonl") == ROWS
    shown = command("select", scored / "run", "-o", "a.jsonl", "--random", "--max-ifd", 1, "--keep", "1.0").done()
    below = Run(scored / "run").scores().filter(pl.col("ifd") < 1).height
    assert f"drew {below} at random from {below} of 55 records" in shown
    assert "55 were asked for; no more could be drawn" in shown
    line = command("select", scored / "run", "-o", "a.jsonl", "--random", "--by", "ifd").line()
    assert "leave out --by" in line


def test_random_is_of_the_seed(command: Commands, scored: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("select", scored / "run", "-o", f"{name}.jsonl", "--random", "--seed", seed, "--keep", 10).done()
    a, b, c = (read_jsonl(tmp_path / f"{name}.jsonl") for name in "abc")
    assert a == b
    assert len(a) == len(c) == 10
    assert a != c


@pytest.mark.parametrize("name", ["best.json", "best.jsonl.gz", "best.jsonl.zst", "best.json.gz", "best.parquet"])
def test_the_suffix_is_the_format(command: Commands, scored: Path, tmp_path: Path, name: str) -> None:
    command("select", scored / "run", "-o", name, "--keep", 4, "--no-max-ifd").done()
    content = (tmp_path / name).read_bytes()
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    if name.endswith(".zst"):
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    if name.endswith(".parquet"):
        rows = pl.read_parquet(content).to_dicts()
    elif ".jsonl" in name:
        rows = [json.loads(line) for line in content.decode().split("\n") if line]
    else:
        rows = json.loads(content)
    assert rows == [ROWS[i] for i in sorted(ranking(scored / "run")[:4])]


def test_rejected_and_scores(command: Commands, scored: Path, tmp_path: Path) -> None:
    arguments = ("--rejected", "rest.jsonl", "--with-scores", "--keep", 5)
    command("select", scored / "run", "-o", "best.jsonl", *arguments).done()
    kept, rest = read_jsonl(tmp_path / "best.jsonl"), read_jsonl(tmp_path / "rest.jsonl")
    scores = {row["record_id"]: row for row in Run(scored / "run").scores().iter_rows(named=True)}
    for row in kept:
        note = row.pop("scorer")
        assert row == ROWS[row["n"]]
        assert note["record_id"] == row["n"]
        assert 1 <= note["rank"] <= 5
        for name in ("ifd", "ifd_loss", "nll_conditioned", "ppl_alone", "response_tokens"):
            assert note[name] == scores[row["n"]][name]
    ids = [row["scorer"]["record_id"] for row in rest]
    assert ids == [i for i in range(55) if i not in [row["n"] for row in kept]]
    for row in rest[:-5]:
        note = row.pop("scorer")
        assert note["reason"] == ("ifd_too_high" if scores[row["n"]]["ifd"] >= 1 else "below_cut")
        assert note["ifd"] == scores[row["n"]]["ifd"]
        assert row == ROWS[row["n"]]
    command("select", scored / "run", "-o", "best.jsonl", "--rejected", "rest.jsonl", "--keep", 5).done()
    assert read_jsonl(tmp_path / "best.jsonl") == kept
    rest = read_jsonl(tmp_path / "rest.jsonl")
    assert {*rest[0]["scorer"]} == {"record_id", "reason"}
    assert rest[-5:] == [
        {**ROWS[50], "scorer": {"record_id": 50, "reason": "empty_response"}},
        {**ROWS[51], "scorer": {"record_id": 51, "reason": "not_text"}},
        {**ROWS[52], "scorer": {"record_id": 52, "reason": "missing_field"}},
        {"record": ["no object"], "scorer": {"record_id": 53, "reason": "unknown_format"}},
        {"record": BAD_LINE, "scorer": {"record_id": 54, "reason": "bad_json"}},
    ]


def test_what_is_refused_leaves_every_file_as_it_was(command: Commands, scored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(scored, folder)
    data, run = folder / "data.jsonl", folder / "run"
    edit_manifest(run, inputs=(replace(Run(run).manifest.inputs[0], path=str(data)),))
    before = data.read_bytes()
    refusals = {
        ("-o", data): "would be overwritten",
        ("-o", "a.jsonl", "--rejected", data): "would be overwritten",
        ("-o", "a.jsonl", "--rejected", "a.jsonl"): "would be overwritten",
        ("-o", "a.txt"): ".jsonl",
        ("-o", data / "a.jsonl"): "is a file, not a folder",
        ("-o", "a.jsonl", "--keep", "110%"): "keep",
        ("-o", "a.jsonl", "--keep", "0"): "keep",
        ("-o", "a.jsonl", "--by", "beauty"): "ifd_loss",
        ("-o", "a.jsonl", "--max-ifd", "-1"): "max_ifd",
        ("-o", "a.jsonl", "--seed", "-1"): "seed",
        ("-o", "/proc/a.jsonl"): "can't be written",
    }
    for arguments, words in refusals.items():
        assert words in command("select", run, *arguments).line()
    data.write_bytes(before + b"\n{}")
    assert "changed since it was scored" in command("select", run, "-o", "a.jsonl").line()
    data.unlink()
    assert "no such file" in command("select", run, "-o", "a.jsonl").line()
    data.write_bytes(before)
    command("select", run, "-o", "a.jsonl").done()
    (tmp_path / "a.jsonl").unlink()
    edit_manifest(run, state="running")
    assert "unfinished" in command("select", run, "-o", "a.jsonl").line()
    (run / "manifest.json").write_text('{"name": "another program\'s"}')
    assert "not the manifest of a run" in command("select", run, "-o", "a.jsonl").line()
    assert "not a run directory" in command("select", folder, "-o", "a.jsonl").line()
    assert not list(tmp_path.glob("*.jsonl")) + list(tmp_path.rglob("*.tmp"))


def test_what_fits_no_table_leaves_the_other_file_too(command: Commands, options: list[str], tmp_path: Path) -> None:
    rows = [row | {"n": row["n"] if row["n"] % 2 else "even"} for row in alpaca(10)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "no.jsonl").write_text("of an earlier selection")
    chosen = ("--keep", 8, "--no-max-ifd", "-o", "a.parquet", "--rejected", "no.jsonl")
    ended = command("filter", "d.json", *chosen, "--run", "run", *options)
    assert ended.code == 2
    assert "a.parquet: these records do not fit" in ended.err
    assert not (tmp_path / "a.parquet").exists()
    assert (tmp_path / "no.jsonl").read_text() == "of an earlier selection"


def test_a_field_of_the_same_name_is_not_overwritten(command: Commands, options: list[str], tmp_path: Path) -> None:
    rows = [{"instruction": "a b", "output": "long enough", "scorer": "Ronaldo"}]
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[0]))
    command("filter", "d.jsonl", "-o", "a.jsonl", "--keep", 1, "--no-max-ifd", *options).done()
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    (tmp_path / "a.jsonl").unlink()
    assert (
        "field 'scorer'"
        in command("select", "a.jsonl.run", "-o", "b.jsonl", "--no-max-ifd", "--keep", 1, "--with-scores").line()
    )
    assert not list(tmp_path.glob("*.jsonl*tmp")) + list(tmp_path.glob("b.jsonl"))


def test_lines_come_out_as_they_went_in(command: Commands, options: list[str], tmp_path: Path) -> None:
    lines = [
        '{"instruction":"a b", "output":"long enough", "weight": 1e999}',
        ' {"instruction": "c d", "output": "long enough", "n": 0.10000000000000000001, "n": "\\u00e9" } ',
    ]
    (tmp_path / "d.jsonl").write_text("\r\n".join(lines))
    command("score", "d.jsonl", "-o", "run", *options).done()
    every = ("--keep", "100%", "--no-max-ifd")
    command("select", "run", "-o", "a.jsonl", *every).done()
    assert (tmp_path / "a.jsonl").read_text() == "\n".join([*lines, ""])
    command("select", "run", "-o", "b.json", *every).done()
    assert (tmp_path / "b.json").read_text() == "[\n" + ",\n".join(lines) + "\n]\n"
    command("select", "run", "-o", "b.jsonl", "--with-scores", *every).done()
    for line, scored in zip(lines, (tmp_path / "b.jsonl").read_text().splitlines(), strict=True):
        assert scored.startswith(line.strip()[:-1].rstrip() + ', "scorer": {"record_id": ')
        assert json.loads(scored)["scorer"]["response_tokens"] == 11


def test_numbers_and_keys_of_an_array_come_out_as_they_went_in(
    command: Commands, options: list[str], tmp_path: Path
) -> None:
    numbers = ["0.12345678901234567890123", "1E5", "12345678901234567890", "1e999", "-0.0"]
    rows = [f'{{"instruction": "a b",\n  "output": "long\\nenough", "n": {n}, "n": [ {n} ]}}' for n in numbers]
    (tmp_path / "d.json").write_text("[" + ",\r\n ".join(rows) + "]")
    with gzip.open(tmp_path / "d2.jsonl.gz", "wt") as file:  # found to be an array by its content
        file.write("\ufeff[\n" + ",\n".join(rows) + "\n]\n")
    command("score", "d.json", "d2.jsonl.gz", "-o", "run", *options).done()
    lines = [row.replace("\n  ", " ") for row in rows] * 2
    every = ("--keep", "1.0", "--no-max-ifd")
    command("select", "run", "-o", "a.jsonl", *every).done()
    assert (tmp_path / "a.jsonl").read_text().splitlines() == lines
    command("select", "run", "-o", "a.json", *every, "--order", "rank").done()
    text = (tmp_path / "a.json").read_text()
    assert sorted(text[2:-3].split(",\n")) == sorted(lines)


def test_json_has_no_nan_in_an_array(command: Commands, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"instruction": "NaN", "output": "long enough", "n": NaN}\n')
    command("score", "d.jsonl", "-o", "run", *options).done()
    line = command("select", "run", "-o", "b.json", "--keep", 1, "--no-max-ifd").line()
    assert "d.jsonl:1 " in line
    assert "infinite or NaN" in line
    assert not list(tmp_path.glob("b.json*"))


def test_filter_starts_over_if_asked_to(command: Commands, options: list[str], tmp_path: Path) -> None:
    for count in (4, 5):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca(count)))
        given = ("filter", "d.jsonl", "-o", "a.jsonl", "--keep", "100%", "--no-max-ifd", *options)
        if count == 5:
            assert "--fresh" in command(*given).line()
        command(*given, "--fresh").done()
        assert len(read_jsonl(tmp_path / "a.jsonl")) == count


def test_conversations_are_kept_whole(command: Commands, options: list[str], tmp_path: Path) -> None:
    def talk(*pairs: tuple[str, str]) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": r, "content": c} for p in pairs for r, c in zip(roles, p, strict=True)]}

    rows = [talk(*((f"q{i}.{turn}", "so " * (i + turn + 1)) for turn in range(3))) for i in range(6)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    command("score", "d.json", "-o", "run", *options).done()
    scores = Run(tmp_path / "run").scores()
    assert scores.height == 18
    for how in ("mean", "min", "max", "last"):
        command("select", "run", "-o", "a.jsonl", "--aggregate", how, "--keep", 2, "--no-max-ifd").done()
        values = {i: scores.filter(record_id=i)["ifd"].to_list() for i in range(6)}
        aggregates: dict[str, Callable[[list[float]], float]]
        aggregates = {"mean": lambda v: sum(v) / 3, "min": min, "max": max, "last": lambda v: v[-1]}
        best = sorted(sorted(values, key=lambda i: -aggregates[how](values[i]))[:2])
        assert read_jsonl(tmp_path / "a.jsonl") == [rows[i] for i in best]


def test_filter_is_score_and_select(command: Commands, options: list[str], scored: Path, tmp_path: Path) -> None:
    command("select", scored / "run", "-o", "a.jsonl", "--keep", "20%", "--rejected", "ra.jsonl").done()
    data = scored / "data.jsonl"
    command("filter", data, "-o", "b.jsonl", "--keep", "20%", "--rejected", "rb.jsonl", *options).done()
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "ra.jsonl").read_bytes() == (tmp_path / "rb.jsonl").read_bytes()
    assert Run(tmp_path / "b.jsonl.run").scores().equals(Run(scored / "run").scores())
    # what select would refuse is refused before an hour of scoring
    for arguments, words in (
        (("-o", "c.txt"), ".jsonl"),
        (("-o", data), "overwritten"),
        (("-o", "c.jsonl", "--keep", "many"), "keep"),
        (("-o", "c.jsonl", "--by", "x"), "by"),
    ):
        assert words in command("filter", data, *arguments, "--run", "other", *options).line()
    assert not (tmp_path / "other").exists()


def test_each_protocol_ranks_by_its_own_measure(command: Commands, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca(30, words=12)))
    for protocol, by in (("cherry", "ifd_loss"), ("small2large", "ppl_conditioned"), ("aligned", "ifd")):
        command("score", "d.jsonl", "-o", protocol, "--protocol", protocol, *options).done()
        command("select", protocol, "-o", "a.jsonl", "--keep", 4, "--no-max-ifd", "--order", "rank").done()
        assert [row["n"] for row in read_jsonl(tmp_path / "a.jsonl")] == ranking(tmp_path / protocol, by)[:4]
    one_view = Run(tmp_path / "small2large").scores()
    assert one_view["ifd"].null_count() == one_view["nll_alone"].null_count() == 30


def test_limit_holds_for_the_selection_too(command: Commands, options: list[str], scored: Path, tmp_path: Path) -> None:
    command("score", scored / "data.jsonl", "-o", "run", "--limit", 10, *options).done()
    command("select", "run", "-o", "a.jsonl", "--keep", "100%", "--no-max-ifd", "--rejected", "r.jsonl").done()
    assert read_jsonl(tmp_path / "a.jsonl") == ROWS[:10]
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_from_python(scored: Path, tmp_path: Path) -> None:
    selection = scorer.select(scored / "run", tmp_path / "a.jsonl", keep=0.1, max_ifd=None)
    assert selection.requested == selection.kept.height == 6
    assert [row["n"] for row in read_jsonl(tmp_path / "a.jsonl")] == selection.kept["record_id"].to_list()
    assert scorer.select(Run(scored / "run"), keep=0.1, max_ifd=None).kept.equals(selection.kept)
    with pytest.raises(ScorerError, match="keep"):
        scorer.select(scored / "run", keep=1.5)
