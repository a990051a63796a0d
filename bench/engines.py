"""The engines side by side on the same rows: agreement first, then rows/s, tokens/s, and how near the bound.

The bound is what the matrix products alone would take: the backbone's for every token and the head's for every scored
token, at the best rate that this machine reaches on large square products or on those of the model's own shapes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from bench.kernel import chunked
from bench.lib.bound import flop, product_rates
from bench.lib.rivals import ResponseOnly, WholePrompt, open_stock
from bench.lib.rows import RANDOM, Rows, encoded, longest, random_tokens, timed, title, warm_up
from bench.lib.shapes import fill, network, outline, shape_config
from scorer.config import DEFAULT_MODEL, ScoreConfig
from scorer.engines import Engine
from scorer.engines.choose import engine_versions, open_engine, resolve_config
from scorer.engines.vllm import check_vllm
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.runs.directory import Run
from scorer.runs.manifest import Manifest
from scorer.scores.shares import parse_keep
from scorer.selection.config import SelectConfig
from scorer.selection.ranking import select_records
from scorer.types import ScorerError

REFERENCE, PACKED32, PACKED16 = "reference float32", "packed float32", "packed bfloat16"
UNFUSED = "packed, cuBLAS head bfloat16"  # on CUDA: the same engine without the fused kernel
VLLM, STOCK, RESPONSE_ONLY = "vllm bfloat16", "vllm stock prompt_logprobs=0", "vllm stock response-only"
IN_PROCESS = {  # engine and dtype
    REFERENCE: ("reference", "float32"),
    PACKED32: ("packed", "float32"),
    PACKED16: ("packed", "bfloat16"),
    UNFUSED: ("packed", "bfloat16"),
}
OF_VLLM = (VLLM, STOCK, RESPONSE_ONLY)
NAMES = (*IN_PROCESS, *OF_VLLM)
AGREEMENT = 1e-4  # in float32, by `_relative`
ROUNDING = 0.02  # in bfloat16, by `_rounding`
VIEWS = (("nll_conditioned", "response_tokens"), ("nll_alone", "alone_tokens"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a run; `only` are NAMES, and all if empty."""

    data: str
    rows: int
    model: str  # with dummy_weights: of bench.lib.shapes
    repeats: int
    agreement_rows: int
    only: tuple[str, ...] = ()
    compiled: bool = False  # of vLLM: not eager
    gpu_memory_utilization: float = 0.3  # on CUDA, of each of the two vLLM that run beside the other engines
    dummy_weights: bool = False


def run(asked: Asked) -> dict[str, Any]:
    """Measure and print; returns what is to be reported."""
    console = Console(stderr=True)
    device = choose_device("auto")
    wanted = [name for name in NAMES if name in (asked.only or NAMES) and (name != UNFUSED or device == "cuda")]
    with ExitStack() as stack:
        files, sample = _model_and_rows(asked, device, stack, console)
        max_length = longest(files, room=1)
        engines, left_out = open_engines(asked, wanted, device, files, stack)
        for name, why in left_out.items():
            console.print(f"{name} is left out: {why}")
        if not engines:
            raise SystemExit("no engine is left to measure")
        larger = sample
        if asked.agreement_rows and not asked.dummy_weights:
            larger = encoded(asked.data, asked.agreement_rows, files, max_length)
        model = network(shape_config(str(files.path)))
        rates = {dtype: product_rates(model, dtype, device) for dtype in ("bfloat16", "float32")}
        seconds, tables, errors = rounds(engines, sample, asked.repeats, console)
        both: dict[str, Any] = {}
        if {PACKED32, PACKED16} <= engines.keys() and not asked.dummy_weights:
            pair = (timed(engines[name], larger)[0] for name in (PACKED16, PACKED32))
            both = {"bfloat16_against_float32": {"rows": larger.records, **_agreement(*pair)}}
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    work = flop(model, sample)
    oracle = next(iter(tables))
    measured: dict[str, dict[str, Any]] = {}
    for name, median in medians.items():
        dtype = "float32" if name.endswith("float32") else "bfloat16"
        measured[name] = {
            "seconds": [round(s, 3) for s in seconds[name]],
            "rows_per_second": sample.records / median,
            "tokens_per_second": sample.tokens / median,
            "times_reference": medians[REFERENCE] / median if REFERENCE in medians else None,
            "fraction_of_bound": work / max(rates[dtype].values()) / median,
        }
        if name != oracle:
            measured[name] |= {"compared_with": oracle, "error": errors[name]}
            if not asked.dummy_weights:
                measured[name] |= _agreement(tables[name], tables[oracle])
    result: dict[str, Any] = {
        "model": title(asked.model),
        "dummy_weights": asked.dummy_weights,
        "tokens_are": RANDOM if asked.dummy_weights else "the model's own",
        "data": Path(asked.data).name,
        "rows": asked.rows,
        "max_length": max_length,
        "tokens": sample.tokens,
        "scored_tokens": sample.scored_tokens,
        "flop": work,
        "flop_per_second": rates,
        "engines": measured,
        "largest_relative_error": errors.get(PACKED32) if oracle == REFERENCE else None,
        "overhead_fraction": _overhead(sample, tables[PACKED16]) / medians[PACKED16] if PACKED16 in medians else None,
        **both,
    }
    if any(name in OF_VLLM for name in wanted):
        result["vllm"] = {
            "versions": engine_versions("vllm"),
            "compiled": asked.compiled,
            "times_stock": {
                name: medians[name] / medians[VLLM]
                for name in (STOCK, RESPONSE_ONLY)
                if name in medians and VLLM in medians
            },
            "left_out": left_out,
        }
    _show(console, result)
    return result


def _model_and_rows(asked: Asked, device: str, stack: ExitStack, console: Console) -> tuple[ModelFiles, Rows]:
    if not asked.dummy_weights:
        files = find_model(asked.model, report=console.print)
        return files, encoded(asked.data, asked.rows, files, longest(files, room=1))
    files = outline(asked.model, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    fill(files, device)  # every engine reads the same ones
    tokenizer = find_model(DEFAULT_MODEL, report=console.print)
    lengths = encoded(asked.data, asked.rows, tokenizer, longest(files, room=1))
    return files, random_tokens(lengths, shape_config(asked.model).vocab_size)


def open_engines(
    asked: Asked, wanted: Sequence[str], device: str, files: ModelFiles, stack: ExitStack
) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by name, and of those that can't be had here, why."""
    engines: dict[str, Engine] = {}

    def chosen(engine: str, dtype: str, **options: Any) -> ScoreConfig:
        options = {"model": files.name, "device": device, "max_length": longest(files, room=1), **options}
        return resolve_config(ScoreConfig(engine=engine, dtype=dtype, **options), files)

    for name in wanted:
        if name in IN_PROCESS:
            engines[name] = stack.enter_context(closing(open_engine(chosen(*IN_PROCESS[name]), files)))
    if UNFUSED in engines:
        engines[UNFUSED].nll_head = lambda h, weight, targets, bias: chunked(h, weight, targets)  # type: ignore[attr-defined]
    of_vllm = [name for name in wanted if name in OF_VLLM]
    if not of_vllm:
        return engines, {}
    try:
        check_vllm()
    except ScorerError as error:
        return engines, dict.fromkeys(of_vllm, str(error))
    share = asked.gpu_memory_utilization if device == "cuda" else None
    config = chosen("vllm", "bfloat16", gpu_memory_utilization=share, vllm_args={"enforce_eager": not asked.compiled})
    if VLLM in of_vllm:
        engines[VLLM] = stack.enter_context(closing(open_engine(config, files)))
    if of_vllm == [VLLM]:
        return engines, {}
    whole = stack.enter_context(closing(WholePrompt(open_stock(config, files))))
    if STOCK in of_vllm:
        engines[STOCK] = whole
    if RESPONSE_ONLY in of_vllm:
        try:
            engines[RESPONSE_ONLY] = ResponseOnly(whole.llm)
        except ScorerError as error:
            return engines, {RESPONSE_ONLY: str(error)}
    return engines, {}


def rounds(
    engines: dict[str, Engine], sample: Rows, repeats: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, pl.DataFrame], dict[str, float]]:
    """Every engine once a round: its seconds, its table, and its error against the first of them."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    tables: dict[str, pl.DataFrame] = {}
    errors: dict[str, float] = {}
    oracle = next(iter(engines))
    for engine in engines.values():
        warm_up(engine, sample)
    for round_number in range(repeats):
        for name, engine in engines.items():
            table, took = timed(engine, sample)
            if name != oracle:
                errors[name] = max(errors.get(name, 0.0), checked_error(name, table, oracle, tables[oracle]))
            seconds[name].append(took)
            console.print(f"round {round_number + 1}: {name} {sample.tokens / took:,.0f} tokens/s")
            if name in IN_PROCESS and name in tables and not table.equals(tables[name]):
                console.print(f"{name}: not the same bits in every round")
            tables[name] = table
    return seconds, tables, errors


def checked_error(name: str, table: pl.DataFrame, oracle: str, exact: pl.DataFrame) -> float:
    """The largest error of an engine's sums in float32, else the mean. Raises SystemExit where it is no rounding."""
    if not table["status"].equals(exact["status"]):
        raise SystemExit(f"{name} and {oracle} don't score the same rows; nothing is reported")
    both_exact = name.endswith("float32") and oracle.endswith("float32")
    measure, allowed = (_relative, AGREEMENT) if both_exact else (_rounding, ROUNDING)
    error = measure(table, exact)
    if not error <= allowed:
        raise SystemExit(f"{name} and {oracle} disagree: error {error:.2e}, above {allowed}; nothing is reported")
    return error


def _relative(ours: pl.DataFrame, oracle: pl.DataFrame) -> float:
    """Of sums that are equal but for the order of additions: relative to the sum."""
    errors = [float(e) for name, _ in VIEWS for e in (ours[name] / oracle[name] - 1).drop_nulls()]
    return max(map(abs, errors))


def _rounding(ours: pl.DataFrame, oracle: pl.DataFrame) -> float:
    """Of sums of rounded logits: relative to the sum and one nat a token, since a likely token's own sum is near 0.

    The mean: a span of one token may be a fifth off by rounding alone.
    """
    errors = [
        float(e)
        for name, tokens in VIEWS
        for e in ((ours[name] - oracle[name]).abs() / (oracle[name] + oracle[tokens])).drop_nulls()
    ]
    return statistics.fmean(errors)


def _overhead(sample: Rows, table: pl.DataFrame) -> float:
    """Seconds of reading, tokenising and writing a run of these rows."""
    with tempfile.TemporaryDirectory() as folder:
        run_directory = Run(Path(folder) / "run")
        with run_directory.locked():
            start = time.perf_counter()
            run_directory.write_shard(0, table)
            run_directory.write_manifest(
                Manifest(identity={"config": {"shard_rows": len(table)}}, ranking={}, records=0)
            )
            return sample.seconds + time.perf_counter() - start


def _agreement(ours: pl.DataFrame, oracle: pl.DataFrame) -> dict[str, float]:
    both = ours.select("record_id", ours="ifd").join(oracle.select("record_id", oracle="ifd"), on="record_id")
    spearman = both.drop_nulls().select(pl.corr("ours", "oracle", method="spearman")).item()
    tenth = SelectConfig(parse_keep("10%"))
    ids = [set(select_records(table, tenth).kept["record_id"]) for table in (ours, oracle)]
    return {"spearman_ifd": spearman, "top_10_percent_overlap": len(ids[0] & ids[1]) / len(ids[1])}


def _show(console: Console, result: dict[str, Any]) -> None:
    shown = Table("engine", "rows/s", "tokens/s", "x reference", "of the bound", "error")
    for name, figures in result["engines"].items():
        times = figures["times_reference"]
        shown.add_row(
            name,
            f"{figures['rows_per_second']:.2f}",
            f"{figures['tokens_per_second']:,.0f}",
            "-" if times is None else f"{times:.2f}",
            f"{figures['fraction_of_bound']:.0%}",
            f"{figures['error']:.1e}" if "error" in figures else "-",
        )
    console.print(shown)
    for dtype, rate in result["flop_per_second"].items():
        square, shaped = rate["square"] / 1e9, rate["model_shapes"] / 1e9
        console.print(f"{dtype} products: {square:,.0f} GFLOP/s square, {shaped:,.0f} at the model's shapes")
    if "bfloat16_against_float32" in result:
        console.print(f"bfloat16 against float32: {result['bfloat16_against_float32']}")
    for name, ratio in result.get("vllm", {}).get("times_stock", {}).items():
        console.print(f"{VLLM}: {ratio:.2f} times {name}")
    if result["overhead_fraction"] is not None:
        console.print(f"reading, tokenising and writing: {result['overhead_fraction']:.2%} of a run")
