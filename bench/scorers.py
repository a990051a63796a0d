"""A weak and a strong scorer on the same rows: how much faster the weak one is, and how well their rankings agree.

The paper's pair is GPT-2 and LLaMA-2-7B (arXiv 2402.00530). With random weights speeds can be measured without a
download; the agreement would mean nothing then, and is left out.
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

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from bench.lib.rows import RANDOM, Rows, any_tokenizer, encoded, longest, random_tokens, timed, title, warm_up
from bench.lib.shapes import fill, network, outline, shape_config
from scorer.agreement.statistics import agree
from scorer.config import ScoreConfig
from scorer.engines.choose import choose_engine, engine_versions, open_engine, resolve_config
from scorer.models.find import ModelFiles, find_model
from scorer.requirements import require
from scorer.types import SCORED

SHARES = (Fraction(5, 100), Fraction(10, 100), Fraction(15, 100))
MEASURES = ("ppl_conditioned", "ifd")
RANDOM_TOLERANCE = 2.0  # nats between the mean NLL of a token under random weights and ln(vocab_size)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One side of the comparison."""

    model: str
    engine: str  # one of scorer.config.ENGINES
    vllm_args: Mapping[str, Any]  # for the engine vllm


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows that both sides score, and how often."""

    data: str
    rows: int
    repeats: int


def run(sample: Sample, weak: Scorer, strong: Scorer, dummy_weights: bool) -> dict[str, Any]:
    """Measure and print; returns the report."""
    console = Console(stderr=True)
    if not dummy_weights:
        require("compare")  # fails here rather than after an hour of scoring
    measured: dict[str, dict[str, Any]] = {}
    tables = []
    lengths: Rows | None = None
    with ExitStack() as stack:
        sides = {"weak": weak, "strong": strong}
        if dummy_weights:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = {side: outline(scorer.model, _made(folder / side)) for side, scorer in sides.items()}
            tokenizer = any_tokenizer(_made(folder / "tokenizer"))
            lengths = encoded(sample.data, sample.rows, tokenizer, min(longest(own) for own in files.values()))
        else:
            files = {side: find_model(scorer.model, report=console.print) for side, scorer in sides.items()}
        for side, scorer in sides.items():
            measured[side], table = _measure(scorer, files[side], sample, lengths, console)
            tables.append(table)
    result: dict[str, Any] = {
        "data": Path(sample.data).name,
        "rows": sample.rows,
        "dummy_weights": dummy_weights,
        "tokens_are": RANDOM + tokenizer.name if dummy_weights else "each model's own",
        **measured,
        "speed_up": {
            name: measured["weak"][name] / measured["strong"][name] for name in ("rows_per_second", "tokens_per_second")
        },
        "agreement": None if dummy_weights else agreement(*tables),
    }
    _show(console, result)
    return result


def agreement(weak: pl.DataFrame, strong: pl.DataFrame) -> dict[str, Any]:
    """Spearman's correlation of each measure, and the overlap of the top 5, 10 and 15 % by it."""
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
    scorer: Scorer, files: ModelFiles, sample: Sample, lengths: Rows | None, console: Console
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The figures of one side, and its score table. With `lengths`, weights and tokens are random."""
    config = ScoreConfig(model=scorer.model, engine=scorer.engine, max_length=longest(files))
    chosen, why = choose_engine(config, files)
    console.print(f"{scorer.model}: engine {chosen} ({why or 'requested'})")
    config = resolve_config(replace(config, engine=chosen), files)
    shape = shape_config(str(files.path))
    if config.engine == "vllm":
        config = replace(config, vllm_args={**scorer.vllm_args, **({"load_format": "dummy"} if lengths else {})})
    elif lengths:
        fill(files, config.device)
    rows = (
        random_tokens(lengths, shape.vocab_size)
        if lengths
        else encoded(sample.data, sample.rows, files, longest(files))
    )
    seconds = []
    with closing(open_engine(config, files)) as engine:
        warm_up(engine, rows)
        for _ in range(sample.repeats):
            table, took = timed(engine, rows)
            _check(scorer.model, table, rows, shape.vocab_size if lengths else None)
            seconds.append(took)
            console.print(f"{scorer.model}: {rows.tokens / took:,.0f} tokens/s")
    del engine
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()  # the strong scorer needs the weak one's memory
    median = statistics.median(seconds)
    return {
        "model": title(scorer.model),
        "parameters": network(shape).num_parameters(),
        "engine": config.engine,
        "versions": engine_versions(config.engine),
        "vllm_args": config.vllm_args,
        "dtype": config.dtype,
        "batch_tokens": config.batch_tokens,
        "max_length": config.max_length,
        "tokens": rows.tokens,
        "scored_tokens": rows.scored_tokens,
        "seconds": [round(s, 3) for s in seconds],
        "rows_per_second": rows.records / median,
        "tokens_per_second": rows.tokens / median,
    }, table


def _check(name: str, table: pl.DataFrame, rows: Rows, vocab_size: int | None) -> None:
    """Every scorable row has a score. With `vocab_size`, weights are random, and the mean NLL is near its logarithm."""
    expected = len(np.unique(rows.batch.rows))
    scored = table.filter(pl.col("status").is_in(SCORED))
    if scored.height != expected:
        raise SystemExit(f"{name}: {scored.height:,} of {expected:,} rows have scores; nothing is reported")
    if vocab_size is not None:
        mean = float(scored["nll_conditioned"].sum() / scored["response_tokens"].sum())  # type: ignore[operator]
        if not abs(mean - math.log(vocab_size)) < RANDOM_TOLERANCE:
            raise SystemExit(
                f"{name}: {mean:.2f} nats a token with random weights and a vocabulary of {vocab_size:,}; "
                "nothing is reported"
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
