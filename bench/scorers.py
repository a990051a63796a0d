"""A weak and a strong scorer on the same rows: how much faster the weak one is, and how far their choices agree.

The paper's headline is the pair GPT-2 and LLaMA-2-7B (arXiv 2402.00530). Without their weights the speeds can be
measured all the same, on random ones; what the two agree on then means nothing, and is left out.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.rows import RANDOM, Rows, encoded, longest, random_tokens, timed, title, warm_up
from bench.lib.shapes import fill, network, outline, shape_config
from scorer.agreement.statistics import agree
from scorer.config import DEFAULT_MODEL, ScoreConfig
from scorer.engines.choose import choose_engine, engine_versions, open_engine, resolve_config
from scorer.models.find import ModelFiles, find_model
from scorer.requirements import require
from scorer.types import SCORED

SHARES = (Fraction(5, 100), Fraction(10, 100), Fraction(15, 100))
MEASURES = ("ppl_conditioned", "ifd")
UNKNOWING = 2.0  # nats: how far the mean NLL of a token under random weights may be from ln(vocabulary)


@dataclass(frozen=True, slots=True)
class Scorer:
    """What is asked of one side."""

    model: str
    engine: str  # one of scorer.config.ENGINES
    vllm_args: Mapping[str, Any]  # where the engine is vllm


def run(data: str, rows: int, weak: Scorer, strong: Scorer, repeats: int, dummy_weights: bool) -> dict[str, Any]:
    """Measure and print; returns what is to be reported."""
    console = Console(stderr=True)
    if not dummy_weights:
        require("compare")  # before an hour of scoring
    measured: dict[str, dict[str, Any]] = {}
    tables = []
    lengths: Rows | None = None
    with ExitStack() as stack:
        sides = {"weak": weak, "strong": strong}
        if dummy_weights:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = {side: outline(asked.model, _made(folder / side)) for side, asked in sides.items()}
            tokenizer = find_model(DEFAULT_MODEL, report=console.print)
            lengths = encoded(data, rows, tokenizer, min(longest(own) for own in files.values()))
        else:
            files = {side: find_model(asked.model, report=console.print) for side, asked in sides.items()}
        for side, asked in sides.items():
            figures, table = _measure(asked, files[side], data, rows, repeats, lengths, console)
            measured[side] = figures
            tables.append(table)
    result: dict[str, Any] = {
        "data": Path(data).name,
        "rows": rows,
        "dummy_weights": dummy_weights,
        "tokens_are": RANDOM if dummy_weights else "each model's own",
        **measured,
        "speed_up": {
            name: measured["weak"][name] / measured["strong"][name] for name in ("rows_per_second", "tokens_per_second")
        },
        "agreement": None if dummy_weights else agreement(*tables),
    }
    _show(console, result)
    return result


def agreement(weak: pl.DataFrame, strong: pl.DataFrame) -> dict[str, Any]:
    """Of each measure: Spearman's correlation, and what the best 5, 10 and 15 % by it have in common."""
    both = weak.join(strong, on=("record_id", "turn"), suffix="_strong", maintain_order="left")
    found = {}
    for name in MEASURES:
        first, second = (both[column].fill_null(math.nan).to_numpy() for column in (name, f"{name}_strong"))
        result = agree(first, second, SHARES)
        found[name] = {
            "records": result.records,
            "spearman": asdict(result.spearman),
            "overlap": {f"{float(cut.share):.0%}": asdict(cut.overlap) for cut in result.whole},
        }
    return found


def _measure(
    asked: Scorer, files: ModelFiles, data: str, rows: int, repeats: int, lengths: Rows | None, console: Console
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The figures of one side, and its score table. `lengths`: the weights are to be random, and the tokens too."""
    config = ScoreConfig(model=asked.model, engine=asked.engine, max_length=longest(files))
    chosen, why = choose_engine(config, files)
    console.print(f"{asked.model}: engine {chosen}, {why or 'asked for'}")
    config = resolve_config(replace(config, engine=chosen), files)
    shape = shape_config(str(files.path))
    parameters = network(shape).num_parameters()
    if config.engine == "vllm":
        config = replace(config, vllm_args={**asked.vllm_args, **({"load_format": "dummy"} if lengths else {})})
    elif lengths:
        fill(files, config.device)
    sample = random_tokens(lengths, shape.vocab_size) if lengths else encoded(data, rows, files, longest(files))
    seconds = []
    with closing(open_engine(config, files)) as engine:
        warm_up(engine, sample)
        for _ in range(repeats):
            table, took = timed(engine, sample)
            _check(asked.model, table, sample, shape.vocab_size if lengths else None)
            seconds.append(took)
            console.print(f"{asked.model}: {sample.tokens / took:,.0f} tokens/s")
    del engine
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()  # or the strong scorer would not find the weak one's memory
    median = statistics.median(seconds)
    return {
        "model": title(asked.model),
        "parameters": parameters,
        "engine": config.engine,
        "versions": engine_versions(config.engine),
        "vllm_args": config.vllm_args,
        "dtype": config.dtype,
        "batch_tokens": config.batch_tokens,
        "max_length": config.max_length,
        "tokens": sample.tokens,
        "scored_tokens": sample.scored_tokens,
        "seconds": [round(s, 3) for s in seconds],
        "rows_per_second": sample.records / median,
        "tokens_per_second": sample.tokens / median,
    }, table


def _check(name: str, table: pl.DataFrame, sample: Rows, vocabulary: int | None) -> None:
    """Every row that was to be scored is; and random weights (then `vocabulary` is given) know nothing."""
    asked = sum(turn.status.scored for turn in sample.turns)
    scored = table.filter(pl.col("status").is_in(SCORED))
    if scored.height != asked:
        raise SystemExit(f"{name}: {scored.height:,} of {asked:,} rows have scores; nothing is reported")
    if vocabulary is not None:
        mean = float(scored["nll_conditioned"].sum() / scored["response_tokens"].sum())  # type: ignore[operator]
        if not abs(mean - math.log(vocabulary)) < UNKNOWING:
            raise SystemExit(
                f"{name}: {mean:.2f} nats a token of {vocabulary:,} words, by random weights; nothing is reported"
            )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _show(console: Console, result: dict[str, Any]) -> None:
    shown = Table("scorer", "engine", "parameters", "rows/s", "tokens/s")
    for side in ("weak", "strong"):
        figures = result[side]
        shown.add_row(
            f"{side}: {figures['model']}",
            figures["engine"],
            f"{figures['parameters']:,}",
            f"{figures['rows_per_second']:.2f}",
            f"{figures['tokens_per_second']:,.0f}",
        )
    console.print(shown)
    console.print(f"the weak scorer is {result['speed_up']['rows_per_second']:.2f} times as fast (rows/s)")
    for name, found in (result["agreement"] or {}).items():
        shares = ", ".join(f"{share} {figure['value']}" for share, figure in found["overlap"].items())
        console.print(f"{name}: Spearman {found['spearman']['value']}, overlap of the top {shares}")
