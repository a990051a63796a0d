"""The engines side by side on the same rows: agreement first, then rows/s, tokens/s, and how near the bound.

The bound is what the matrix products alone would take: the backbone's for every token and the head's for every scored
token, at the best rate that this machine reaches on large square products or on those of the model's own shapes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from bench.kernel import chunked
from scorer.config import PROTOCOLS, ScoreConfig
from scorer.encode import Encoder
from scorer.engines import Engine, open_engine
from scorer.models import ModelFiles, choose_device, find_model, load_tokenizer
from scorer.records import read_records
from scorer.run import choose
from scorer.rundir import Run
from scorer.scores import score_table
from scorer.selection import SelectConfig, parse_keep
from scorer.selection import choose as choose_records
from scorer.types import EncodedTurn, TokenSequence

PROTOCOL = PROTOCOLS["superfiltering"]
RIVALS = (("reference", "float32"), ("packed", "float32"), ("packed", "bfloat16"))
UNFUSED = "packed, cuBLAS head bfloat16"  # on CUDA: the same engine without the fused kernel
AGREEMENT = 1e-4  # relative, of NLL sums in float32


@dataclass(frozen=True, slots=True)
class Rows:
    """A dataset, encoded; `seconds` is what reading and tokenising it took."""

    records: int
    turns: list[EncodedTurn]
    sequences: list[TokenSequence]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def scored_tokens(self) -> int:
        return sum(t.end - t.start for s in self.sequences for t in s.targets)


def run(data: str, rows: int, model: str, repeats: int, agreement_rows: int) -> dict[str, Any]:
    """Measure and print; returns what is to be reported."""
    console = Console(stderr=True)
    files = find_model(model, report=console.print)
    device = choose_device("auto")
    encoder = Encoder(load_tokenizer(files), PROTOCOL, PROTOCOL.max_length, files.document_token_id)
    sample = _encoded(data, rows, encoder)
    engines = {f"{name} {dtype}": _open(name, dtype, device, files) for name, dtype in RIVALS}
    if device == "cuda":
        engines[UNFUSED] = unfused = _open("packed", "bfloat16", device, files)
        unfused.nll_head = lambda hidden, weight, targets, bias: chunked(hidden, weight, targets)  # type: ignore[attr-defined]
    packed = engines["packed bfloat16"].model  # type: ignore[attr-defined]
    rates = {dtype: _product_rates(packed, dtype, device) for dtype in ("bfloat16", "float32")}
    flop = _flop(packed, sample)

    tables: dict[str, pl.DataFrame] = {}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(repeats):
        for name, engine in engines.items():
            table, took = _timed(engine, sample)
            seconds[name].append(took)
            console.print(f"round {round_number + 1}: {name} {sample.tokens / took:,.0f} tokens/s")
            if name in tables and not table.equals(tables[name]):
                console.print(f"{name}: not the same bits in every round")
            tables[name] = table
        if round_number == 0:
            error = _largest_error(tables["packed float32"], tables["reference float32"])
            if error > AGREEMENT:
                raise SystemExit(f"packed and reference disagree: relative error {error:.2e}; nothing is measured")

    larger = _encoded(data, agreement_rows, encoder) if agreement_rows else sample
    exact, rough = (_timed(engines[name], larger)[0] for name in ("packed float32", "packed bfloat16"))
    baseline = statistics.median(seconds["reference float32"])
    shown = Table("engine", "rows/s", "tokens/s", "x reference", "of the bound")
    measured = {}
    for name in engines:
        median = statistics.median(seconds[name])
        rate = rates[name.split()[-1]]
        measured[name] = {
            "seconds": [round(s, 3) for s in seconds[name]],
            "rows_per_second": rows / median,
            "tokens_per_second": sample.tokens / median,
            "times_reference": baseline / median,
            "fraction_of_bound": flop / max(rate.values()) / median,
        }
        figures = measured[name]
        shown.add_row(
            name,
            f"{figures['rows_per_second']:.2f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['times_reference']:.2f}",
            f"{figures['fraction_of_bound']:.0%}",
        )
    overhead = _overhead(sample, tables["packed bfloat16"])
    result = {
        "model": model,
        "data": Path(data).name,
        "rows": rows,
        "tokens": sample.tokens,
        "scored_tokens": sample.scored_tokens,
        "flop": flop,
        "flop_per_second": rates,
        "engines": measured,
        "largest_relative_error": error,
        "overhead_fraction": overhead / statistics.median(seconds["packed bfloat16"]),
        "bfloat16_against_float32": {"rows": larger.records, **_agreement(rough, exact)},
    }
    console.print(shown)
    for dtype, rate in rates.items():
        square, shaped = rate["square"] / 1e9, rate["model_shapes"] / 1e9
        console.print(f"{dtype} products: {square:,.0f} GFLOP/s square, {shaped:,.0f} at the model's shapes")
    console.print(f"packed float32 against reference: largest relative error {error:.1e}")
    console.print(f"bfloat16 against float32: {result['bfloat16_against_float32']}")
    console.print(f"reading, tokenising and writing: {result['overhead_fraction']:.2%} of a run")
    return result


def _encoded(data: str, rows: int, encoder: Encoder) -> Rows:
    start = time.perf_counter()
    records = list(read_records([data], limit=rows))
    turns, sequences = encoder.encode(records)
    return Rows(len(records), turns, sequences, time.perf_counter() - start)


def _open(name: str, dtype: str, device: str, files: ModelFiles) -> Engine:
    return open_engine(choose(ScoreConfig(engine=name, dtype=dtype, device=device, model=files.name), files), files)


def _timed(engine: Engine, sample: Rows) -> tuple[pl.DataFrame, float]:
    start = time.perf_counter()
    spans = [span for batch in engine.score(sample.sequences) for span in batch]
    took = time.perf_counter() - start
    return score_table(sample.turns, spans, two_views=True), took


def _overhead(sample: Rows, table: pl.DataFrame) -> float:
    """Seconds of reading, tokenising and writing a run of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        run_directory = Run(Path(folder) / "run")
        with run_directory.locked():
            start = time.perf_counter()
            run_directory.write_shard(0, table)
            run_directory.write_manifest({})
            return sample.seconds + time.perf_counter() - start


def _largest_error(ours: pl.DataFrame, oracle: pl.DataFrame) -> float:
    columns = ("nll_conditioned", "nll_alone")
    errors = [float(e) for name in columns for e in (ours[name] / oracle[name] - 1).drop_nulls()]
    return max(map(abs, errors))


def _agreement(ours: pl.DataFrame, oracle: pl.DataFrame) -> dict[str, float]:
    both = ours.select("record_id", ours="ifd").join(oracle.select("record_id", oracle="ifd"), on="record_id")
    spearman = both.drop_nulls().select(pl.corr("ours", "oracle", method="spearman")).item()
    tenth = SelectConfig(parse_keep("10%"))
    ids = [set(choose_records(table, tenth).kept["record_id"]) for table in (ours, oracle)]
    return {"spearman_ifd": spearman, "top_10_percent_overlap": len(ids[0] & ids[1]) / len(ids[1])}


def _linears(model: Any) -> list[torch.Size]:
    """[out, in] of every weight that a token of the backbone is multiplied with."""
    head = model.get_output_embeddings()
    shapes = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if module is head or weight is None or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        shapes.append(weight.shape)
    return shapes


def _flop(model: Any, sample: Rows) -> float:
    backbone = sum(shape.numel() for shape in _linears(model))
    head = model.get_output_embeddings().weight.numel()
    return 2.0 * float(backbone * sample.tokens + head * sample.scored_tokens)


def _product_rates(model: Any, dtype: str, device: str) -> dict[str, float]:
    """FLOP/s of matrix products alone: large square ones, and those of the model, 1,024 (CUDA: 16,384) tokens each.

    On CPU the best of both ways to use the cores: all on one product, and a product on each.
    """
    kind = getattr(torch, dtype)
    tokens = 1024 if device == "cpu" else 16384
    side = 4096 if device == "cpu" else 8192
    shapes = {(tokens, shape[1], shape[0]) for shape in _linears(model)}
    counts = [(tokens, shape[1], shape[0]) for shape in _linears(model)]
    best = {s: _product_seconds(s, kind, device) for s in (*shapes, (side, side, side))}
    work = sum(2.0 * m * k * n for m, k, n in counts)
    return {
        "square": 2.0 * side**3 / best[side, side, side],
        "model_shapes": work / sum(best[s] for s in counts),
    }


def _product_seconds(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    times = max(3, int(2e10 / (2 * m * k * n))) if device == "cpu" else 30
    together = _seconds_each(lambda: torch.nn.functional.linear(a, b), times, device)
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        return together
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def alone() -> float:
                torch.set_num_threads(1)
                return _seconds_each(lambda: torch.nn.functional.linear(a, b), times, device)

            apart = statistics.mean(pool.map(lambda _: alone(), range(threads))) / threads
    finally:
        torch.set_num_threads(threads)
    return min(together, apart)


def _seconds_each(work: Callable[[], object], times: int, device: str) -> float:
    """Median seconds of one call after a warm-up."""
    work()
    took = []
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took)
