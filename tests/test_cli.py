"""The command line: its help, its speed, and what a user is told who asks for what can't be."""

from __future__ import annotations

import gzip
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import polars as pl
import pytest

from scorer.commands import cli
from scorer.config import Cluster, ClusterConfig, ScoreConfig, Training
from scorer.models.find import ModelFiles
from scorer.options import describe
from scorer.selection.config import SelectConfig
from scorer.selection.flags import FLAGS
from tests.lib.command import CONSOLE_SCRIPT, Commands, alpaca

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def test_help_is_fast() -> None:
    """Less than three starts of Python with Click, in CPU time: torch alone takes twenty, Polars four."""

    def cpu_seconds(*command: object) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "--help" not in command or {"score", "select", "filter", "models"} <= set(
            re.findall(r"^  (\w+)", shown.stdout, re.MULTILINE)
        )
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    runs = [
        (cpu_seconds(CONSOLE_SCRIPT, "--help"), cpu_seconds(sys.executable, "-c", "import click")) for _ in range(7)
    ]
    ours, least = map(min, zip(*runs, strict=True))
    assert ours < 3 * least


@pytest.mark.parametrize(
    "statement", ["import scorer", "import scorer.commands", "from scorer import ScorerError, ScoreConfig"]
)
def test_heavy_libraries_wait_until_they_are_needed(statement: str) -> None:
    code = f"{statement}; import sys; print({{'torch', 'transformers', 'polars', 'vllm', 'rich'}} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def commands(group: click.Group, name: str) -> Iterator[tuple[str, click.Command]]:
    for key, command in group.commands.items():
        yield f"{name} {key}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {key}")


ALL = dict(commands(cli, "scorer"))


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_help_and_shows_its_default(name: str) -> None:
    command = ALL[name]
    assert command.help
    with click.Context(command, info_name=name, **cli.context_settings) as context:
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            record = option.get_help_record(context)
            assert record is not None
            assert option.help, record
            assert re.search(r"\[(default: \S+|.*required)", record[1]), record


CONFIGS: dict[str, tuple[tuple[type[Any], dict[str, Any]], ...]] = {  # and the defaults that the command replaces
    "scorer score": ((ScoreConfig, {}), (Cluster, {"address": None})),
    "scorer select": ((SelectConfig, {}),),
    "scorer filter": ((ScoreConfig, {}), (Cluster, {"address": None}), (SelectConfig, {})),
    "scorer lp": ((Training, {}),),
    "scorer cluster": ((ClusterConfig, {}),),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_one_option(name: str) -> None:
    defaults = ALL[name].make_context(name, ["data", "-o", "output"] if name != "scorer cluster" else ["run"]).params
    for config, replaced in CONFIGS[name]:
        for field, kind, info in describe(config):
            (found,) = (parameter for parameter in ALL[name].params if parameter.name == field.name)
            assert isinstance(found, click.Option)
            assert defaults[field.name] == replaced.get(field.name, field.default)
            if info.choices:
                assert isinstance(found.type, click.Choice)
                assert tuple(found.type.choices) == info.choices
            elif info.parse is None:
                assert found.type.name == {int: "integer", float: "float", bool: "boolean"}.get(kind, "text")
            assert re.fullmatch(r"(?!Of ).*[.\])]", info.help)
            assert found.help is not None
            assert found.help.startswith(info.help)


GROUPS_SHOWN = {
    "scorer score": ["Data", "Model", "Engine", "vLLM", "Ray", "Output", "Options"],
    "scorer select": ["Data", "Selection", "Output", "Options"],
    "scorer filter": ["Data", "Model", "Engine", "vLLM", "Ray", "Selection", "Output", "Options"],
    "scorer lp": ["Data", "Model", "Engine", "vLLM", "Training", "Output", "Options"],
    "scorer cluster": ["Model", "Engine", "Clusters", "Output", "Options"],
    "scorer compare": ["Selection", "Output", "Options"],
    "scorer report": ["Selection", "Evaluation", "Output", "Options"],
    "scorer serve": ["Model", "Engine", "vLLM", "Options"],
    "scorer validate": ["Data", "Model", "Engine", "Selection", "Training", "Evaluation", "Output", "Options"],
    "scorer models": ["Options", "Commands"],
    "scorer models fetch": ["Model", "Options"],
}


@pytest.mark.parametrize("name", ALL)
def test_help_has_the_options_by_group(command: Commands, name: str) -> None:
    shown = command(*name.split()[1:], "--help").shown()
    assert re.findall(r"^(\w+):$", shown, re.MULTILINE) == GROUPS_SHOWN[name]


def test_flags_are_named_in_the_help() -> None:
    (info,) = (info for field, _, info in describe(SelectConfig) if field.name == "drop_flagged")
    assert all(name in info.help for name in FLAGS)


WRONG_OPTIONS = {
    ("--engine", "fast"): ("auto, packed, reference, vllm",),
    ("--engine", "http://127.0.0.1:9"): ("http://127.0.0.1:9 does not answer",),
    ("--engine", "packed", "--quantization", "fp8"): ("quantization", "packed"),
    ("--gpu-memory-utilization", "1.5"): ("gpu_memory_utilization", "at most 1"),
    ("--tensor-parallel-size", "0"): ("tensor_parallel_size", "at least 1"),
    ("--max-length", "0"): ("max_length", "at least 1"),
    ("--max-length", "100000"): ("max_length", "1024"),
    ("--shard-rows", "-1"): ("shard_rows", "at least 1"),
    ("--batch-tokens", "0"): ("batch_tokens", "at least 1"),
    ("--limit", "0"): ("limit", "at least 1"),
    ("--columns", "prompt=a"): ("prompt=", "response="),
    ("--columns", "question=a,response=b"): ("prompt", "response", "messages"),
    ("--revision", "main"): ("--revision",),
    ("--model", "no-such-model"): ("no-such-model", "smollm2-135m", "gpt2"),
    ("--model", "."): ("config.json",),
}


WRONG_USAGE = {
    ("--vllm-arg", "block_size"): ("--vllm-arg", "KEY=VALUE"),
    ("--vllm-arg", "block_size=1", "--vllm-arg", "block_size=2"): ("block_size", "twice"),
    ("--protocol", "best"): ("superfiltering", "cherry", "small2large", "aligned", "chat"),
    ("--dtype", "int8"): ("bfloat16", "float16", "float32"),
    ("--device", "tpu"): ("cpu", "cuda"),
    ("--max-length", "many"): ("--max-length", "integer"),
    ("--columns", "prompt"): ("--columns", "KEY=VALUE"),
    ("--columns", "prompt=a, prompt=b,response=c"): ("--columns", "prompt", "twice"),
    ("--engin", "packed"): ("--engine",),
    ("--fsesh",): ("--fresh",),
    ("--workers", "2"): ("without --ray", "--workers"),
}


@pytest.mark.parametrize("option", [*WRONG_OPTIONS, *WRONG_USAGE])
def test_a_wrong_option_names_the_right_ones(
    command: Commands, tiny: Callable[[str], ModelFiles], tmp_path: Path, option: tuple[str, ...]
) -> None:
    (tmp_path / "d.json").write_text('[{"instruction": "a", "output": "some text"}]')
    given = ("score", "d.json", "-o", "run", "--model", tiny("gpt2").path, "--device", "cpu", *option)
    ended = command(*given)
    line = ended.usage_error() if option in WRONG_USAGE else ended.line()
    assert line.startswith("scorer: ")
    for word in (WRONG_OPTIONS | WRONG_USAGE)[option]:
        assert word in line
    assert not (tmp_path / "run").exists()


WRONG_FILES: dict[str, tuple[bytes | None, str]] = {
    "empty.jsonl": (b"", "no records"),
    "blank.jsonl": (b"\n\n \n", "no records"),
    "array.json": (b"[]", "no records"),
    "object.json": (b'{"data": []}', "no list of objects is in it"),
    "cut.json": (b'[{"instruction": "a"},', "line 1"),
    "unknown.jsonl": (b'{"ask": "a", "tell": "b"}\n' * 3, "--columns prompt=ask,response=tell"),
    "nothing.jsonl": (b"not json\nnor this\n", "known format"),
    "cut.jsonl.gz": (gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 9)[:-12], "truncated or damaged"),
    "plain.jsonl.gz": (b'{"instruction": "a", "output": "b"}\n', "truncated or damaged"),
    "plain.jsonl.zst": (b'{"instruction": "a", "output": "b"}\n', "truncated or damaged"),
    "broken.parquet": (b"PAR1 and so on", "Parquet"),
    "ragged.csv": (b"instruction,output\na,b\nc\n", "line 3: 1 cells, where the header has 2"),
    "table.xlsx": (b"PK\x03\x04", "save its sheet as CSV"),
    "utf16.jsonl": ('{"instruction": "a", "output": "b"}\n'.encode("utf-16"), "convert it to UTF-8"),
    "missing.json": (None, "no such file"),
    ".": (None, "folder"),
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("select", "run", "-o", "a.jsonl", "--max-ifd", 2, "--no-max-ifd"), "leave out --max-ifd"),
        (("cluster", "run", "--clusters", 3, "--min-mean-size", 9), "leave out --min-mean-size"),
        (("cluster", "run", "--far-below", 0.2), "leave out --far-below"),
        (("lp", "a", "b", "-o", "run", "--runs", "--epochs", 3, "--strict"), "leave out --epochs, --strict"),
    ],
)
def test_no_option_is_dropped(command: Commands, arguments: tuple[object, ...], words: str) -> None:
    assert words in command(*arguments).usage_error()


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_line(
    command: Commands, tiny: Callable[[str], ModelFiles], tmp_path: Path, name: str
) -> None:
    content, words = WRONG_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = command("score", name, "-o", "run", "--model", tiny("gpt2").path, "--device", "cpu").line()
    assert line.startswith(f"scorer: {name}")
    assert words in line


def test_parquet_with_other_columns(command: Commands, tiny: Callable[[str], ModelFiles], tmp_path: Path) -> None:
    pl.DataFrame({"frage": ["Wie geht es?"], "antwort": ["Gut geht es."]}).write_parquet(tmp_path / "d.parquet")
    given = ("score", "d.parquet", "-o", "run", "--model", tiny("gpt2").path, "--device", "cpu")
    line = command(*given).line()
    assert "frage, antwort" in line
    assert "--columns" in line
    assert "fräge" in command(*given, "--columns", "prompt=fräge,response=antwort").line()
    shown = command(*given, "--columns", "prompt=frage,response=antwort").done()
    assert "status: 1 ok" in shown


def test_standard_output_that_ends_early_or_is_full() -> None:
    shell = f"{CONSOLE_SCRIPT} models 2>&1 | head -c 1"
    assert subprocess.run(shell, shell=True, capture_output=True, text=True).stdout == " "
    command = [str(CONSOLE_SCRIPT), "models"]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (1, "")
    shut = subprocess.run(f"{CONSOLE_SCRIPT} models >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (shut.returncode, shut.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in shut.stderr
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "scorer: standard output: can't be written (No space left on device)\n"


@pytest.mark.parametrize("way", [["-m", "scorer"], [str(ROOT / "cli.py")]])
def test_other_ways_to_start_it(way: list[str]) -> None:
    shown = subprocess.run([sys.executable, *way, "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Usage: scorer [OPTIONS] COMMAND")


def test_without_arguments_and_unknown_commands(command: Commands) -> None:
    ended = command()
    assert ended.code == 0
    assert "Usage: scorer" in ended.out
    assert "'store'" in command("store").usage_error()
    assert "DATA" in command("score").usage_error()
    assert "--output" in command("score", "d.json").usage_error()
    assert command("select").err == ("Usage: scorer select [OPTIONS] RUN\nscorer: Missing argument 'RUN'.\n")
    assert command("--version").out.startswith("scorer, version ")


def test_the_summary_of_a_run(command: Commands, tiny: Callable[[str], ModelFiles], tmp_path: Path) -> None:
    rows = [*alpaca(30), {"instruction": "a", "output": ""}]
    pl.DataFrame(rows).write_ndjson(tmp_path / "d.jsonl")
    given = ("score", "d.jsonl", "--model", tiny("gpt2").path, "--device", "cpu", "--dtype", "float32")
    name = "a[red]b:smile:[/]"  # not markup
    ended = command(*given, "-o", name)
    shown = ended.done()
    assert ended.out == ""  # standard output stays free
    assert f"{name}: 31 records, 31 rows" in shown
    assert "status: 30 ok, 1 empty_response" in shown
    assert re.search(r"Spearman of ifd with response length: [+-]0\.\d{3}", shown)
    assert re.search(r"[\d,]+ tokens in [\d.]+ s: [\d,]+ tokens/s", shown)
    for measure in ("ifd", "ifd_loss", "ppl_conditioned", "ppl_alone", "prompt_tokens", "response_tokens"):
        assert len(re.findall(rf"{measure} +│(?: +[\d.,e+]+ │){{5}}", shown)) == 1
    assert (
        f"kept 2 of 31 records: {name}/best.jsonl"
        in command("select", name, "-o", f"{name}/best.jsonl", "--keep", 2, "--no-max-ifd").done()
    )


def test_models_are_listed(command: Commands) -> None:
    ended = command("models")
    assert ended.done() == "Any other Hugging Face name or local folder works too.\n"
    lines = ended.out.splitlines()
    for name in ("smollm2-135m", "all-minilm-l6-v2", "gpt2"):
        assert [line for line in lines if re.match(rf" {name}  ", line)]
    assert "│" not in ended.out
    assert len([line for line in lines if " meta-llama/Llama-2-7b-hf " in line and "gated" in line]) == 1  # not wrapped
    assert "no-such-model" in command("models", "fetch", "no-such-model").line()
