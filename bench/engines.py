"""The engines on the same rows: agreement first, then rows/s, tokens/s, and the fraction of an upper bound.

The bound counts matrix products only: the backbone's for every token and the head's for every scored token, at the best
rate that this machine reaches on large square products or on the model's own shapes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from bench.kernel import chunked
from bench.lib.bound import flop, product_rates
from bench.lib.profile import device_figures
from bench.lib.rivals import ResponseOnly, WholePrompt, open_stock
from bench.lib.rows import RANDOM, Rows, any_tokenizer, encoded, longest, random_tokens, timed, title, warm_up
from bench.lib.shapes import fill, network, outline, shape_config
from scorer.config import ScoreConfig
from scorer.engines import Engine
from scorer.engines.choose import engine_versions, open_engine, resolve_config
from scorer.engines.packed import PackedEngine
from scorer.engines.reference import ReferenceEngine
from scorer.engines.vllm import check_vllm
from scorer.models.find import ModelFiles, find_model
from scorer.models.load import choose_device
from scorer.runs.manifest import Manifest
from scorer.runs.writer import RunWriter
from scorer.scores.shares import parse_keep
from scorer.selection.config import SelectConfig
from scorer.selection.ranking import select_records
from scorer.types import ScorerError

REFERENCE, PACKED32, PACKED16 = "reference float32", "packed float32", "packed bfloat16"
UNFUSED = "packed, cuBLAS head bfloat16"  # CUDA only: the packed engine without the fused kernel
VLLM, STOCK, RESPONSE_ONLY = "vllm bfloat16", "vllm stock prompt_logprobs=0", "vllm stock response-only"
IN_PROCESS: dict[str, tuple[str, str, Callable[[ScoreConfig, ModelFiles], Engine]]] = {  # engine, dtype, constructor
    REFERENCE: ("reference", "float32", ReferenceEngine),
    PACKED32: ("packed", "float32", PackedEngine),
    PACKED16: ("packed", "bfloat16", PackedEngine),
    UNFUSED: ("packed", "bfloat16", partial(PackedEngine, head_function=chunked)),
}
VLLM_ENGINES = (VLLM, STOCK, RESPONSE_ONLY)
NAMES = (*IN_PROCESS, *VLLM_ENGINES)
FLOAT32_TOLERANCE = 1e-4  # for `relative_error`
BFLOAT16_TOLERANCE = 0.02  # for `rounding_error`
VIEWS = (("nll_conditioned", "response_tokens"), ("nll_alone", "alone_tokens"))


@dataclass(frozen=True, slots=True)
class EnginesConfig:
    """The options of a run. `only` are NAMES; empty means all."""

    data: str
    rows: int
    model: str  # with dummy_weights: a name in bench.lib.shapes
    repeats: int
    agreement_rows: int
    only: tuple[str, ...] = ()
    compiled: bool = False  # vLLM compiles the model
    gpu_memory_utilization: float = 0.3  # CUDA: of each of the two vLLM that share the device with other engines
    dummy_weights: bool = False


def run(config: EnginesConfig) -> dict[str, Any]:
    """Measure and print; returns the report."""
    console = Console(stderr=True)
    device = choose_device("auto")
    names = [name for name in NAMES if name in (config.only or NAMES) and (name != UNFUSED or device == "cuda")]
    with ExitStack() as stack:
        files, sample, tokens_are = _model_and_rows(config, device, stack, console)
        about = _about(config, files, sample) | {"tokens_are": tokens_are}
        engines, left_out = open_engines(config, names, device, files, stack)
        for name, why in left_out.items():
            console.print(f"{name} is left out: {why}")
        if not engines:
            raise SystemExit("no engine is left to measure")
        model = network(shape_config(str(files.path)))
        rates = {dtype: product_rates(model, dtype, device) for dtype in sorted({*map(_dtype, engines)})}
        seconds, tables, errors = rounds(engines, sample, config.repeats, console)
        profiles = {
            name: device_figures(partial(_seconds, engines[name], sample)) for name in IN_PROCESS if name in engines
        }
        dtypes: dict[str, Any] = {}
        if {PACKED32, PACKED16} <= engines.keys() and not config.dummy_weights:
            rows = config.agreement_rows
            larger = encoded(config.data, rows, files, longest(files, room=1)) if rows else sample
            pair = (timed(engines[name], larger)[0] for name in (PACKED16, PACKED32))
            dtypes = {"bfloat16_against_float32": {"rows": larger.records, **_agreement(*pair)}}
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    work = flop(model, sample)
    oracle = next(iter(tables))
    measured: dict[str, dict[str, Any]] = {}
    for name, median in medians.items():
        rate = max(rates[_dtype(name)].values())
        measured[name] = {
            "seconds": [round(s, 3) for s in seconds[name]],
            "rows_per_second": sample.records / median,
            "tokens_per_second": sample.tokens / median,
            "times_reference": medians[REFERENCE] / median if REFERENCE in medians else None,
            "fraction_of_bound": work / rate / median,
            **profiles.get(name, {}),
        }
        if name != oracle:
            measured[name] |= {"compared_with": oracle, "error": errors[name]}
            if not config.dummy_weights:
                measured[name] |= _agreement(tables[name], tables[oracle])
    result = about | {
        "flop": work,
        "flop_per_second": rates,
        "engines": measured,
        "largest_relative_error": errors.get(PACKED32) if oracle == REFERENCE else None,
        "overhead_fraction": _overhead(sample, tables[PACKED16]) / medians[PACKED16] if PACKED16 in medians else None,
        **dtypes,
    }
    if any(name in VLLM_ENGINES for name in names):
        result["vllm"] = {
            "versions": engine_versions("vllm"),
            "compiled": config.compiled,
            "times_stock": {n: medians[n] / medians[VLLM] for n in (STOCK, RESPONSE_ONLY) if {n, VLLM} <= set(medians)},
            "left_out": left_out,
        }
    _show(console, result)
    return result


def _about(config: EnginesConfig, files: ModelFiles, sample: Rows) -> dict[str, Any]:
    """The part of the report that says what was scored."""
    return {
        "model": title(config.model),
        "dummy_weights": config.dummy_weights,
        "data": Path(config.data).name,
        "rows": config.rows,
        "max_length": longest(files, room=1),
        "tokens": sample.tokens,
        "scored_tokens": sample.scored_tokens,
    }


def _model_and_rows(
    config: EnginesConfig, device: str, stack: ExitStack, console: Console
) -> tuple[ModelFiles, Rows, str]:
    """The model, the rows, and what the rows' tokens are."""
    if not config.dummy_weights:
        files = find_model(config.model, report=console.print)
        return files, encoded(config.data, config.rows, files, longest(files, room=1)), "the model's own"
    folder, other = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
    files = outline(config.model, folder)
    fill(files, device)  # all engines read these weights
    tokenizer = any_tokenizer(other)
    lengths = encoded(config.data, config.rows, tokenizer, longest(files, room=1))
    return files, random_tokens(lengths, shape_config(config.model).vocab_size), RANDOM + tokenizer.name


def _dtype(name: str) -> str:
    return "float32" if name.endswith("float32") else "bfloat16"


def _seconds(engine: Engine, sample: Rows) -> float:
    return timed(engine, sample)[1]


def open_engines(
    config: EnginesConfig, names: Sequence[str], device: str, files: ModelFiles, stack: ExitStack
) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines by name, and for each that is not available, the reason."""

    def resolved(engine: str, dtype: str, **options: Any) -> ScoreConfig:
        options = {"model": files.name, "device": device, "max_length": longest(files, room=1), **options}
        return resolve_config(ScoreConfig(engine=engine, dtype=dtype, **options), files)

    engines: dict[str, Engine] = {}
    for name in names:
        if name in IN_PROCESS:
            engine, dtype, constructor = IN_PROCESS[name]
            engines[name] = stack.enter_context(closing(constructor(resolved(engine, dtype), files)))
    wanted = [name for name in names if name in VLLM_ENGINES]
    if not wanted:
        return engines, {}
    try:
        check_vllm()
    except ScorerError as error:
        return engines, dict.fromkeys(wanted, str(error))
    share = config.gpu_memory_utilization if device == "cuda" else None
    options = {"gpu_memory_utilization": share, "vllm_args": {"enforce_eager": not config.compiled}}
    return engines, _open_vllm(resolved("vllm", "bfloat16", **options), wanted, files, stack, engines)


def _open_vllm(
    config: ScoreConfig, names: Sequence[str], files: ModelFiles, stack: ExitStack, engines: dict[str, Engine]
) -> dict[str, str]:
    """Add the VLLM_ENGINES of `names` to `engines`; returns the reason for each that is not available."""
    if VLLM in names:
        engines[VLLM] = stack.enter_context(closing(open_engine(config, files)))
    if list(names) == [VLLM]:
        return {}
    whole = stack.enter_context(closing(WholePrompt(open_stock(config, files))))
    if STOCK in names:
        engines[STOCK] = whole
    if RESPONSE_ONLY in names:
        try:
            engines[RESPONSE_ONLY] = ResponseOnly(whole.llm)
        except ScorerError as error:
            return {RESPONSE_ONLY: str(error)}
    return {}


def rounds(
    engines: dict[str, Engine], sample: Rows, repeats: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, pl.DataFrame], dict[str, float]]:
    """Run every engine once a round: its seconds, its score table, and its error against the first engine."""
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
                console.print(f"{name}: the results differ from round to round")
            tables[name] = table
    return seconds, tables, errors


def checked_error(name: str, table: pl.DataFrame, oracle: str, expected: pl.DataFrame) -> float:
    """The largest relative error of the sums where both are float32, else the mean rounding error.

    Raises SystemExit where it is above the tolerance.
    """
    if not table["status"].equals(expected["status"]):
        raise SystemExit(f"{name} and {oracle} don't score the same rows; nothing is reported")
    float32 = name.endswith("float32") and oracle.endswith("float32")
    measure, tolerance = (relative_error, FLOAT32_TOLERANCE) if float32 else (rounding_error, BFLOAT16_TOLERANCE)
    error = measure(table, expected)
    if not error <= tolerance:
        raise SystemExit(f"{name} and {oracle} disagree: error {error:.2e}, above {tolerance}; nothing is reported")
    return error


def relative_error(table: pl.DataFrame, expected: pl.DataFrame) -> float:
    """The largest error relative to the sum: only the order of additions differs."""
    errors = [float(e) for name, _ in VIEWS for e in (table[name] / expected[name] - 1).drop_nulls()]
    return max(map(abs, errors))


def rounding_error(table: pl.DataFrame, expected: pl.DataFrame) -> float:
    """The mean error relative to the sum plus one nat a token, since the sum of likely tokens is near 0.

    The mean, not the largest: rounding alone may change a span of one token by a fifth.
    """
    errors = [
        float(e)
        for name, tokens in VIEWS
        for e in ((table[name] - expected[name]).abs() / (expected[name] + expected[tokens])).drop_nulls()
    ]
    return statistics.fmean(errors)


def _overhead(sample: Rows, table: pl.DataFrame) -> float:
    """Seconds to read, tokenise and write these rows."""
    with tempfile.TemporaryDirectory() as folder:
        run_directory = RunWriter(Path(folder) / "run")
        with run_directory.locked():
            start = time.perf_counter()
            records = table["record_id"].n_unique()
            run_directory.write_manifest(
                Manifest(identity={"config": {"shard_rows": records}}, ranking={}, records=records)
            )
            run_directory.write_shard(0, table)
            return sample.seconds + time.perf_counter() - start


def _agreement(table: pl.DataFrame, expected: pl.DataFrame) -> dict[str, float]:
    both = table.select("record_id", "ifd").join(expected.select("record_id", expected="ifd"), on="record_id")
    spearman = both.drop_nulls().select(pl.corr("ifd", "expected", method="spearman")).item()
    tenth = SelectConfig(parse_keep("10%"))
    ids = [set(select_records(scores, tenth).kept["record_id"]) for scores in (table, expected)]
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
        if "device_computes" in figures:
            console.print(f"{name}: the device computes for {figures['device_computes']:.0%} of the time")
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
