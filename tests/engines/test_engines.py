"""The packed engine against the reference, and the reference against the loss that the model itself computes."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DogeConfig,
    FalconConfig,
    GPTJConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from bench.lib.families import CONFIGS, GPT2, LLAMA, byte_tokenizer
from scorer.config import ScoreConfig
from scorer.engines import Engine
from scorer.engines.architecture import Proof
from scorer.engines.attention import FLASH_ATTENTION_3, activate_flash_attention_3
from scorer.engines.choose import choose_compile, open_engine
from scorer.engines.packed import PackedEngine
from scorer.engines.packing import forward_tokens, plan_batches
from scorer.engines.reference import ReferenceEngine
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import load_causal_lm
from scorer.types import RowStatus, ScorerError
from tests.lib.tokens import Key, Span, SpanNLL, TokenSequence, View, in_order, scored, token_batch

Tiny = Callable[[str], ModelFiles]

ENGINES = ("packed", "reference")


def config(engine: str, batch_tokens: int = 512, dtype: str = "float32") -> ScoreConfig:
    return ScoreConfig(engine=engine, dtype=dtype, device="cpu", batch_tokens=batch_tokens, max_length=1024)


def samples(lengths: list[tuple[int, int]], seed: int = 0) -> list[TokenSequence]:
    """Both views of records of the given prompt and response lengths, with random tokens."""
    rng = random.Random(seed)
    sequences = []
    for record_id, (prompt, response) in enumerate(lengths):
        ids = [rng.randrange(257) for _ in range(prompt + response)]
        sequences.append(TokenSequence(record_id, View.CONDITIONED, ids, (Span(0, prompt, prompt + response),)))
        if response > 1:
            sequences.append(TokenSequence(record_id, View.ALONE, ids[prompt:], (Span(0, 1, response),)))
    return sequences


def assert_equal(ours: dict[Key, SpanNLL], oracle: dict[Key, SpanNLL], relative: float) -> None:
    assert ours.keys() == oracle.keys()
    for key, expected in oracle.items():
        assert ours[key].tokens == expected.tokens
        assert ours[key].nll_sum == pytest.approx(expected.nll_sum, rel=relative)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reference_gives_the_models_own_loss(tiny: Tiny, family: str) -> None:
    files = tiny(family)
    model = load_causal_lm(files, ScoreConfig(dtype="float32", device="cpu"), "eager")
    ids = torch.arange(40)[None] * 5 % 257
    labels = ids.clone()
    labels[0, :13] = -100
    expected = float(model(ids, labels=labels).loss)
    sequence = TokenSequence(7, View.CONDITIONED, ids[0].tolist(), (Span(0, 13, 40),))
    span = scored(open_engine(config("reference"), files), [sequence])[7, 0, View.CONDITIONED]
    assert span.tokens == 27
    assert span.nll_sum == pytest.approx(27 * expected, rel=1e-5)


def open_on_two_cores(batch_tokens: int, files: ModelFiles) -> Engine:
    """The packed engine, computing two batches at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return open_engine(config("packed", batch_tokens), files)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Restore torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ENGINES)
def test_the_nlls_of_the_tokens_add_up_to_their_spans_sum(tiny: Tiny, name: str) -> None:
    batch = token_batch(samples([(1, 2), (30, 60), (3, 200), (5, 1)]))
    with closing(open_engine(config(name), tiny("llama"))) as engine:
        sums, tokens = (in_order(engine, one) for one in (batch, batch.by_token()))
    lengths = batch.ends - batch.starts
    assert len(tokens) == lengths.sum()
    assert (tokens > 0).all()
    assert np.add.reduceat(tokens, np.cumsum(lengths) - lengths) == pytest.approx(sums, rel=1e-6)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_packed_equals_reference(tiny: Tiny, family: str) -> None:
    lengths = [(1, 1), (1, 2), (900, 100), (30, 60), (31, 58), (3, 200), (5, 1), (64, 64), (64, 64), (2, 400)]
    sequences = samples(lengths)
    oracle = scored(open_engine(config("reference"), tiny(family)), sequences)
    assert len(oracle) == 18
    for batch_tokens in (1, 100, 100_000):
        assert_equal(scored(open_on_two_cores(batch_tokens, tiny(family)), sequences), oracle, 1e-5)


@pytest.fixture(scope="module")
def engines(tiny: Tiny) -> tuple[Engine, Engine]:
    return open_on_two_cores(300, tiny("llama")), open_engine(config("reference"), tiny("llama"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=12), data=st.data())
def test_order_and_neighbours_do_not_matter(
    engines: tuple[Engine, Engine], lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    packed, reference = engines
    sequences = samples(lengths, seed=len(lengths))
    some = data.draw(st.permutations(sequences))[: data.draw(st.integers(1, len(sequences)))]
    oracle = {key: span for sequence in some for key, span in scored(reference, [sequence]).items()}
    assert_equal(scored(packed, some), oracle, 1e-5)


def test_all_turns_of_a_conversation_come_from_one_sequence(tiny: Tiny) -> None:
    ids = [i * 7 % 257 for i in range(300)]
    targets = (Span(0, 20, 50), Span(2, 80, 81), Span(3, 200, 300))
    whole = [TokenSequence(0, View.CONDITIONED, ids, targets)]
    apart = [TokenSequence(0, View.CONDITIONED, ids[: t.end], (t,)) for t in targets]
    engine = open_engine(config("packed"), tiny("gpt2"))
    oracle = {key: span for sequence in apart for key, span in scored(engine, [sequence]).items()}
    assert_equal(scored(engine, whole), oracle, 1e-5)


def test_bfloat16_stays_near_float32(tiny: Tiny) -> None:
    sequences = samples([(20, 80)] * 6 + [(200, 500)])
    oracle = scored(open_engine(config("reference"), tiny("llama")), sequences)
    ours = scored(open_engine(config("packed", dtype="bfloat16"), tiny("llama")), sequences)
    assert_equal(ours, oracle, 0.03)


def test_batches_keep_records_whole_and_budgets() -> None:
    batch = token_batch(samples([(10, 20), (300, 200), (5, 6), (40, 2), (50, 60)]))
    batches = plan_batches(batch, 250)
    assert [sorted({*batch.record_ids[part].tolist()}) for part in batches] == [[1], [0, 4], [2, 3]]
    assert [forward_tokens(batch)[part].sum() for part in batches][1:] == [109 + 59 + 29 + 19, 10 + 5 + 41 + 1]
    assert sorted(sequence for part in batches for sequence in part.tolist()) == list(range(len(batch)))


def test_the_last_batches_are_small_so_that_workers_end_together() -> None:
    batch = token_batch(samples([(1, 50)] * 100))  # 99 packed tokens a record
    sizes = [int(forward_tokens(batch)[part].sum()) for part in plan_batches(batch, 1000, workers=2)]
    assert sizes[:5] == [990] * 5
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes[-2:]) <= 250
    assert sum(sizes) == 9900


def test_infinite_and_undefined_sums_are_a_status(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny("gpt2").path, folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ENGINES:
        spans = scored(open_engine(config(name), find_model(str(folder))), samples([(3, 9)]))
        assert {(s.status, s.nll_sum) for s in spans.values()} == {(RowStatus.NON_FINITE, None)}


@pytest.mark.parametrize("length", [40, 400])
def test_an_undefined_sum_is_no_neighbours(tiny: Tiny, tmp_path: Path, length: int) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny("llama").path, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][200] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sequences = []
    for record_id in range(3):  # each shorter than the one before, and beside it in a batch
        ids = [(7 * record_id + place) % 200 for place in range(length - record_id)]
        sequences.append(TokenSequence(record_id, View.CONDITIONED, ids, (Span(0, 5, len(ids)),)))
    sequences[2].token_ids[0] = 200
    packed, oracle = (scored(open_engine(config(n, 2048), find_model(str(folder))), sequences) for n in ENGINES)
    for spans in (packed, oracle):
        assert spans.pop((2, 0, View.CONDITIONED)).status == RowStatus.NON_FINITE
    assert_equal(packed, oracle, 1e-5)


def test_compiled_blocks_equal_eager_ones_in_batches_of_any_size(tiny: Tiny) -> None:
    """One graph serves all layers and all batches: compiling takes seconds."""
    sequences = samples([(900, 100), (30, 60), (31, 58), (3, 200), (5, 1), (64, 64), (2, 400)])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = replace(config("packed"), compile=True)
    with closing(open_engine(compiled, tiny("llama"))) as engine:
        assert isinstance(engine, PackedEngine)
        for batch_tokens in (1, 100, 700, 100_000):
            engine.batch_tokens = batch_tokens
            oracle = scored(open_engine(config("packed", batch_tokens), tiny("llama")), sequences)
            assert_equal(scored(engine, sequences), oracle, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_blocks_stay_eager_where_compiling_fails(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch can't write what it compiles: one line says so, and the run goes on."""
    sequences = samples([(30, 60), (3, 200)])
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.devnull)
    with closing(open_engine(replace(config("packed"), compile=True), tiny("llama"))) as engine:
        (line,) = (record.getMessage() for record in caplog.records if record.name == "scorer.engines.packed")
        assert "llama0 runs without compiled blocks: FileExistsError" in line
        assert scored(engine, sequences) == scored(open_engine(config("packed"), tiny("llama")), sequences)


def test_a_flash_attention_3_that_does_not_load_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A package of its name without its kernels."""
    (tmp_path / f"{FLASH_ATTENTION_3}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not activate_flash_attention_3()
    monkeypatch.delitem(sys.modules, FLASH_ATTENTION_3)
    (line,) = caplog.messages
    assert line.startswith("FlashAttention 3 is installed and not used: RuntimeError: ")
    assert torch.nn.attention.current_flash_attention_impl() is None


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "code of its own": (lambda: GPTJConfig(**GPT2, rotary_dim=16), "gptj, whose attention can't be replaced"),
    "ALiBi": (lambda: FalconConfig(**LLAMA, alibi=True), "its attention is biased by position"),
    "an encoder": (lambda: BertConfig(**LLAMA), "its attention is not causal"),
    "a state": (
        lambda: Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        "its layers are conv",
    ),
    "a mask": (lambda: DogeConfig(**LLAMA), "its attention has a mask of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_packing_would_score_wrongly_is_refused(tmp_path: Path, kind: str) -> None:
    make, reason = REFUSED[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ScorerError, match=f"can't run .*{reason}.*; use --engine vllm, or --engine reference"):
            open_engine(config("packed", dtype=dtype), find_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [("float32", "differ from the reference engine's by"), ("bfloat16", "change by .* with what else is in a batch")],
)
def test_a_model_is_refused_where_its_sequences_see_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, reason: str
) -> None:
    """A configuration that does not tell. In 16 bits rounding may make more than the 0.1 nats of this state."""
    monkeypatch.setattr("scorer.engines.architecture.LAYER_TYPES", ("linear_attention", "full_attention"))
    torch.manual_seed(0)
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 32, "layer_types": ["mamba", "attention"]}
    AutoModelForCausalLM.from_config(GraniteMoeHybridConfig(**LLAMA, **sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ScorerError, match=f"the packed engine can't run .*: its scores .*{reason}"):
        open_engine(config("packed", dtype=dtype), find_model(str(tmp_path)))


def test_the_proof_reaches_beyond_the_attention_window(tiny: Tiny) -> None:
    with closing(open_engine(config("reference"), tiny("gemma3"))) as engine:
        assert isinstance(engine, ReferenceEngine)
        assert Proof(engine.model, 1024).batch.lengths.tolist() == [66, 9, 5, 2]
        assert Proof(engine.model, 40).batch.lengths.tolist() == [16, 9, 5, 2]  # no sequence is that long


LIMITED = """
import resource, sys
from pathlib import Path
from scorer.config import ScoreConfig
from scorer.engines.choose import choose_compile, open_engine
from scorer.models.find import find_model
from tests.engines.test_engines import config, samples
from tests.lib.tokens import scored

engine = open_engine(config("packed", 1 << 30), find_model(sys.argv[1]))
usual = scored(engine, samples([(10, 10)] * 8))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20),) * 2)
spans = scored(engine, samples([(1000, 1000)] * 10 + [(50_000, 1000), (10, 10)]))
for (record_id, _, view), span in spans.items():
    print(record_id, view, span.status, span.nll_sum)
"""


@pytest.mark.slow
def test_out_of_memory_splits_the_batch_down_to_the_row_that_does_not_fit(tmp_path: Path) -> None:
    """A process with 250 MiB to spare, one batch of 10 records that need twice that, and one that never fits."""
    folder = tmp_path / "wide"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 768, "num_hidden_layers": 1})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    done = subprocess.run([sys.executable, "-c", LIMITED, folder], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 24
    assert {(record, view) for record, view, status, _ in lines if status != "ok"} == {("10", "conditioned")}
    oracle = scored(open_engine(config("packed", 2000), find_model(str(folder))), samples([(1000, 1000)] * 3))
    for record, view, _, nll in lines:
        if int(record) < 3:
            assert float(nll) == pytest.approx(oracle[int(record), 0, View(view)].nll_sum, rel=1e-5)


@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_a_tokenizer_of_another_model_is_refused(tiny: Tiny, engine: str) -> None:
    sequence = TokenSequence(0, View.CONDITIONED, [1, 257, 3], (Span(0, 1, 3),))
    with pytest.raises(ScorerError, match="token id 257, but the model's vocabulary has 257 tokens"):
        scored(open_engine(config(engine), tiny("gpt2")), [sequence])


def test_long_runs_compile_where_it_helps_and_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(records: int, **options: Any) -> tuple[bool, str]:
        return choose_compile(
            ScoreConfig(**{"engine": "packed", "device": "cpu", "dtype": "bfloat16"} | options), records
        )

    assert chosen(10_000) == (True, "compiled")
    assert chosen(9_999) == chosen(10_000, compile=False) == chosen(10_000, dtype="float32") == (False, "")
    assert chosen(10_000, device="cuda") == (False, "")
    assert chosen(100_000, device="cuda", dtype="float32") == chosen(1, compile=True) == (True, "compiled")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert chosen(10_000) == (False, "not compiled: there is no compiler (g++ or clang++)")
    with pytest.raises(ScorerError, match="compile: there is no compiler"):
        chosen(1, compile=True)
    with pytest.raises(ScorerError, match="compile: for the packed engine, and not for reference"):
        chosen(1, engine="reference", compile=True)
