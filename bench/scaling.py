"""Simulates `scorer score --ray` with object storage: a billion samples on 1, 8 and 64 H100.

    readers --records--> workers (tokenise; pack, compute; write a shard) --"done"--> driver

Each reader reads a contiguous range of shards in order. A worker has one device, and holds a few shards. They pass
through three stages, each of which takes one shard after another: tokenising, the device, and the score table. The
device begins a shard as soon as it is tokenised and the one before is computed: batches are packed while others
compute, so packing limits the device only where its rate is lower. Each shard is written separately. The driver
handles finished shards one by one. A node that fails loses the shards in flight, which are done again. The costs of a
row come from bench.costs.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.costs import Costs, measure
from bench.engines import PACKED16, VLLM
from bench.lib.bound import flop
from bench.lib.report import RESULTS
from bench.lib.shapes import network, shape_config
from scorer.engines.packed import CUDA_THREADS
from scorer.runs.ray_driver import WORKERS_A_READER
from scorer.runs.ray_worker import SHARDS

MODELS = {"gpt2": "GPT-2", "llama-2-7b": "LLaMA-7B"}
DEVICES = (1, 8, 64)
ASSUMED = "ASSUMED"  # marks assumed figures in every table
EFFICIENCIES = (0.2, 0.4, 0.6)  # of the peak, where no rate was measured
READER, DRIVER, REQUESTS = "the readers", "the driver", "requests"
TOKENISING, PACKING, DEVICE, TABLES = "tokenising", "packing", "the devices", "score tables"
TOTALS = ("tokens", "bytes_in", "bytes_out", "shards", "table_bytes_in_memory")
RUNS, RAN = ("default", "tuned"), ("hours", "computing", "first to saturate")
COLUMNS = ("model", "H100s", "basis", "tokens/s of one", "device hours")


def given(value: float, unit: str, source: str) -> Any:
    """A field of `Given`: its value and its source."""
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, slots=True)
class Given:
    """The figures that this script does not measure."""

    shard_rows: int = given(1000, "rows", "the default of --shard-rows")
    peak: float = given(989e12, "FLOP/s", "NVIDIA's data sheet: H100 SXM, bfloat16, dense")
    cores_per_device: float = given(14, "cores", "NVIDIA's data sheet: DGX H100, 112 cores for 8 devices")
    devices_per_node: int = given(8, "devices", "the same")
    request_seconds: float = given(0.1, "s", "Amazon S3's guide to performance: small objects, 100 to 200 ms")
    stream_bytes: float = given(850e6, "B/s", "the same: 85 MB/s a request; s3fs copies an object by 10 at once")
    put_rate: float = given(3500, "requests/s", "the same: at least so many PUT a second and prefix")
    copies_before: int = given(1, "copies", "of each input, made by scorer.runs.run to count and check its rows")
    input_files: int = given(
        1, "files", "assumed, the worst case: each reader copies whole files and skips lines in one"
    )
    workers_a_reader: int = given(WORKERS_A_READER, "workers", "scorer.runs.ray_driver")
    worker_shards: int = given(
        SHARDS, "shards", "scorer.runs.ray_worker: one tokenised, two with the engine, one written"
    )
    concurrent_batches: int = given(
        CUDA_THREADS, "batches", "scorer.engines.packed: threads that pack a batch and wait for the device"
    )
    ray_seconds: float = given(0.009, "s a shard", "measured separately: 0.5 MB, Ray Data 2.60, 2 workers on 2 cores")
    start_seconds: float = given(60, "s", "assumed: start of a worker, also after a failure")
    straggler_share: float = given(0.01, "of shards", "assumed")
    straggler_times: float = given(3, "times as long", "assumed")
    node_failures: float = given(8 / 16384 * 419 / 1296, "per hour", "arXiv 2407.21783: 419 of 16,384 H100 in 54 days")


@dataclass(frozen=True, slots=True)
class Outcome:
    """`hours` include all before the first shard; `device_share` does not."""

    hours: float
    first: str  # the stage that saturates first
    device_share: float  # the share of the time that a device computes
    lost: int  # shards in flight


def _stage_seconds(size: float, rate: float, costs: Costs, g: Given) -> dict[str, float]:
    """Seconds of a worker's stages for a shard of `size` rows, in their order."""
    cores, device = g.cores_per_device, costs.tokens / rate
    alone = costs.encode_seconds * (1 - costs.encode_parallel * (1 - 1 / cores))
    shared = (costs.encode_seconds + costs.pack_seconds + costs.table_seconds) / cores  # by all stages
    pool = (costs.pack_seconds + device) / g.concurrent_batches  # each thread packs a batch, and waits for the device
    compute = {PACKING: pool} if pool > device else {DEVICE: device}
    stages = {TOKENISING: max(alone, shared)} | compute | {TABLES: costs.table_seconds}
    return {name: size * seconds for name, seconds in stages.items()}


def simulate(rows: float, devices: int, rate: float, costs: Costs, g: Given) -> Outcome:
    """One run of `rows` rows on `devices` devices of `rate` tokens/s each."""
    shards = math.ceil(rows / g.shard_rows)
    size = rows / shards
    stages = _stage_seconds(size, rate, costs, g)
    arrivals = _arrivals(shards, size, math.ceil(devices / g.workers_a_reader), costs, g)
    done = _run_workers(arrivals, list(stages.values()), devices, g)
    seconds, busy = _driver_seconds(done.ends, g)

    shares = {name: done.turns * each / devices / seconds for name, each in stages.items()}
    shares |= {READER: arrivals[-1] / seconds, DRIVER: busy / seconds}
    in_flight = done.turns * sum(stages.values()) + shards * g.request_seconds  # without waiting for one another
    shares[REQUESTS] = in_flight / g.worker_shards / devices / seconds  # the largest only where requests dominate
    before = rows * (costs.count_seconds + g.copies_before * costs.bytes_in / g.stream_bytes) + g.start_seconds
    computing = rows * costs.tokens / rate / devices / seconds
    return Outcome((before + seconds) / 3600, max(shares, key=lambda name: shares[name]), computing, done.lost)


@dataclass(frozen=True, slots=True)
class WorkersOutcome:
    """ends: when each shard was written. turns: shards, a straggler counted as its slowness. lost: shards in flight."""

    ends: list[float]
    turns: float
    lost: int


def _run_workers(arrivals: list[float], stages: list[float], devices: int, g: Given) -> WorkersOutcome:
    """The event loop over the workers' free slots: each takes a shard, from its arrival to its write."""
    draw = random.Random(0)
    hourly = g.node_failures * min(devices, g.devices_per_node) / g.devices_per_node / 3600
    fails = [_next(draw, 0, hourly) for _ in range(math.ceil(devices / g.devices_per_node))]
    waiting, again, lost = iter(arrivals), 0, 0
    slots = [(0.0, slot, worker) for slot in range(g.worker_shards) for worker in range(devices)]
    free = [[0.0] * len(stages) for _ in range(devices)]  # when each stage of a worker is done with its last shard
    ends: list[float] = []
    turns = 0.0
    while len(ends) < len(arrivals):
        now, slot, worker = heapq.heappop(slots)
        node = worker // g.devices_per_node
        while fails[node] <= now:
            now, fails[node] = max(now, fails[node] + g.start_seconds), _next(draw, fails[node], hourly)
        if (arrived := now if again else next(waiting, None)) is None:
            continue
        again = max(again - 1, 0)
        slowness = g.straggler_times if draw.random() < g.straggler_share else 1.0
        done, clock = [], max(now, arrived)
        for seconds, since in zip(stages, free[worker], strict=True):
            clock = max(clock, since) + seconds * slowness
            done.append(clock)
        end = clock + g.request_seconds
        if end > fails[node]:
            end = fails[node] + g.start_seconds
            again, lost = again + 1, lost + 1
        else:
            free[worker] = done
            ends.append(end)
            turns += slowness
        heapq.heappush(slots, (end, slot, worker))
    return WorkersOutcome(ends, turns, lost)


def _driver_seconds(ends: list[float], g: Given) -> tuple[float, float]:
    """When the driver has handled the last shard, and for how long it was busy."""
    seconds = 0.0
    for end in sorted(ends):
        seconds = max(seconds, end) + g.ray_seconds
    return seconds, len(ends) * g.ray_seconds


def _arrivals(shards: int, size: float, readers: int, costs: Costs, g: Given) -> list[float]:
    """When the shards leave their readers, ascending. A file is copied whole, and then read."""
    length, file = math.ceil(shards / readers), shards * size / g.input_files
    fetch, read = file * costs.bytes_in / g.stream_bytes, size * costs.read_seconds
    times: list[float] = []
    for begin in range(0, shards, length):
        before = math.floor(begin * size / file + 1e-9)  # files that this reader does not open
        skip = (begin * size - before * file) * costs.count_seconds
        for shard in range(begin + 1, min(begin + length, shards) + 1):
            times.append(skip + (math.ceil(shard * size / file - 1e-9) - before) * fetch + (shard - begin) * read)
    return sorted(times)


def _next(draw: random.Random, after: float, rate: float) -> float:
    return after + draw.expovariate(rate) if rate else math.inf


def rates(model: str, flop_per_token: float, peak: float, results: Path = RESULTS) -> dict[str, float]:
    """Tokens/s of one H100 by source: a saved result of `python -m bench engines`, else assumed."""
    for path in sorted(results.glob("engines-*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        speeds = {n: saved["engines"][n]["tokens_per_second"] for n in (PACKED16, VLLM) if n in saved["engines"]}
        if "H100" in (saved["machine"]["gpu"] or "") and saved["model"] == model and speeds:
            engine = max(speeds, key=lambda name: speeds[name])
            return {f"measured: {engine}, {saved['machine']['gpu']}": speeds[engine]}
    return {f"{ASSUMED}, {share:.0%} of peak": share * peak / flop_per_token for share in EFFICIENCIES}


def run(data: str, scored: int, model: str, rows: float, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, simulate and print the tables in Markdown; returns the report."""
    costs, sample = measure(data, scored, model)
    flops = {name: flop(network(shape_config(name)), sample) / sample.tokens for name in MODELS}
    return reckon({"data": Path(data).name, "tokenizer": model, "samples": rows}, costs, flops, results)


def reckon(about: dict[str, Any], costs: Costs, flops: dict[str, float], results: Path = RESULTS) -> dict[str, Any]:
    """`run` with known costs and operations a token of each model; `about` is added to the report."""
    g, rows = Given(), about["samples"]
    cases: list[dict[str, Any]] = []
    tuned = replace(g, shard_rows=20 * g.shard_rows, input_files=1000)  # what a user can do
    for name, title in MODELS.items():
        for devices in DEVICES:
            for basis, rate in rates(name, flops[name], g.peak, results).items():
                # an engine's measured rate includes packing
                own = costs if basis.startswith(ASSUMED) else replace(costs, pack_seconds=0.0)
                case = {"model": title, "devices": devices, "basis": basis, "tokens_per_second": rate}
                case |= {"flop_per_token": flops[name], "device_hours": rows * costs.tokens / rate / 3600}
                case["default"] = asdict(simulate(rows, devices, rate, own, g))
                case["tuned"] = asdict(simulate(rows, devices, rate, own, tuned))
                cases.append(case)
    shards = math.ceil(rows / g.shard_rows)
    written = rows * costs.bytes_out + shards * costs.shard_bytes
    totals = (rows * costs.tokens, rows * costs.bytes_in, written, shards, rows * costs.memory_bytes)
    result = about | dict(zip(TOTALS, totals, strict=True))
    result |= {"costs": asdict(costs), "given": asdict(g), "rows_per_second": _stages(costs, g), "cases": cases}
    _show(result, g)
    return result


def _stages(c: Costs, g: Given) -> dict[str, float]:
    """The largest rows/s of each stage by itself."""
    cores, rows = g.cores_per_device, g.shard_rows
    return {
        "a reader, JSON Lines": 1 / (c.read_seconds + c.bytes_in / g.stream_bytes),
        "a reader, Parquet": 1 / (c.parquet_read_seconds + c.parquet_bytes_in / g.stream_bytes),
        f"the driver, shards of {rows:,}": rows / g.ray_seconds,
        f"the store's PUT, shards of {rows:,}": g.put_rate * rows,
        f"a worker's tokenising, {cores} cores": 1 / c.encode_seconds / (1 - c.encode_parallel * (1 - 1 / cores)),
        f"a worker's packing, {g.concurrent_batches} threads": g.concurrent_batches / c.pack_seconds,
        "a worker's tables": 1 / c.table_seconds,
        f"a worker's writes, shards of {rows:,}": g.worker_shards * rows / g.request_seconds,
        "a worker on 1 core": 1 / (c.encode_seconds + c.pack_seconds + c.table_seconds),
    }


def _show(result: dict[str, Any], g: Given) -> None:
    """The tables, in Markdown."""

    def table(*rows: tuple[object, ...]) -> None:
        for number, row in enumerate(rows):
            print(f"| {' | '.join(map(str, row))} |" + ("" if number else "\n|" + " --- |" * len(row)))
        print()

    def joined(group: list[dict[str, Any]], form: str) -> str:
        cells = [form.format(**case) for case in group]
        return cells[0] if len(set(cells)) == 1 else " / ".join(cells)

    count = f"{result['samples']:,.0f} samples like those of {result['data']}, tokens of {result['tokenizer']}"
    table((count, ""), *((k.replace("_", " "), f"{result[k]:,.0f}") for k in TOTALS))
    groups = [list(of) for _, of in groupby(result["cases"], key=lambda case: (case["model"], case["devices"]))]
    ran = "{0[hours]:,.1f}", "{0[device_share]:.0%}", "{0[first]}"
    forms = ["{model}", "{devices}", "{basis}", "{tokens_per_second:,.0f}", "{device_hours:,.0f}"]
    forms += [form.replace("0[", f"{how}[") for how in RUNS for form in ran]
    columns = (*COLUMNS, *(f"{how}: {what}" for how in RUNS for what in RAN))
    table(columns, *(tuple(joined(group, form) for form in forms) for group in groups))
    middle = {group[0]["model"]: group[len(group) // 2] for group in groups}
    fed = [f"H100s that this feeds, {model} ({case['basis']})" for model, case in middle.items()]
    needs = [case["tokens_per_second"] / result["costs"]["tokens"] for case in middle.values()]
    stages = result["rows_per_second"].items()
    table(("stage", "rows/s", *fed), *((s, f"{v:,.0f}", *(f"{v / each:,.1f}" for each in needs)) for s, v in stages))
    costs = {name: (f"{v * 1e6:,.4g} µs" if "seconds" in name else f"{v:,.4g}") for name, v in result["costs"].items()}
    table(
        ("a row (shard bytes: a shard), measured", "one core"),
        *((name.replace("_", " "), value) for name, value in costs.items()),
    )
    notes = [(f.name.replace("_", " "), f"{getattr(g, f.name):.4g}", f.metadata) for f in fields(g)]
    table(("not measured", "", "from"), *((n, f"{v} {m['unit']}", m["source"]) for n, v, m in notes))
