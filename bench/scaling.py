"""Simulates `scorer score --ray` with object storage: a billion samples on 1, 8 and 64 H100.

    readers --records--> workers (tokenise; pack, compute; write a shard) --"done"--> driver (writes the manifest)

Each reader reads a contiguous range of shards in order. A worker holds three shards: one thread tokenises; the next
packs the first batches, has the shard computed when the device is free, and makes the table; each shard is written
separately. The driver handles finished shards one by one. A node that fails loses the shards in flight, which are done
again. The costs of a row come from bench.costs.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.costs import Costs, measure
from bench.engines import PACKED16, VLLM
from bench.lib.bound import flop
from bench.lib.report import RESULTS
from bench.lib.shapes import network, shape_config
from scorer.engines.choose import BATCH_TOKENS
from scorer.engines.packed import CUDA_THREADS
from scorer.runs.ray_driver import WORKERS_A_READER
from scorer.runs.ray_worker import SHARDS
from scorer.runs.run import MANIFEST_SECONDS

MODELS = {"gpt2": ("GPT-2", 12), "llama-2-7b": ("LLaMA-7B", 1)}  # title; workers per device in the tuned run
DEVICES = (1, 8, 64)
ASSUMED = "ASSUMED"  # marks assumed figures in every table
EFFICIENCIES = (0.2, 0.4, 0.6)  # of the peak, where no rate was measured
READER, DRIVER, REQUESTS = "the readers", "the driver", "requests"
TOKENISING, PACKING, DEVICE = "tokenising", "packing, tables", "the devices"
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
    workers_per_device: int = given(1, "workers", "the default of --gpus-per-worker")
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
        SHARDS, "shards", "scorer.runs.ray_worker: in flight, one tokenised, one scored, one written"
    )
    batch_tokens: int = given(BATCH_TOKENS["packed", "cuda"], "tokens", "scorer.runs.run: a batch on a GPU")
    concurrent_batches: int = given(CUDA_THREADS, "batches", "scorer.engines.packed: threads that pack batches")
    manifest_pause: float = given(MANIFEST_SECONDS, "s", "scorer.runs.run: between two writes of the manifest")
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


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of a worker for one shard. The device waits for `pack`; other batches are packed while it computes."""

    encode: float
    pack: float
    compute: float
    table: float


def _stage_seconds(size: float, rate: float, costs: Costs, g: Given) -> StageSeconds:
    cores = g.cores_per_device / g.workers_per_device  # of a worker; both of its threads share them
    alone = costs.encode_seconds * (1 - costs.encode_parallel + costs.encode_parallel / max(cores, 1))
    both = costs.encode_seconds + costs.pack_seconds + costs.table_seconds
    packing = size * costs.pack_seconds * max(1 / cores, 1)
    pack = packing * min(g.concurrent_batches * g.batch_tokens / max(size * costs.tokens, 1), 1)
    return StageSeconds(
        encode=size * max(alone, both / cores),
        pack=pack,
        compute=max(size * costs.tokens / rate, packing - pack),
        table=size * costs.table_seconds * max(1 / cores, 1),
    )


def simulate(rows: float, devices: int, rate: float, costs: Costs, g: Given) -> Outcome:
    """One run of `rows` rows on `devices` devices of `rate` tokens/s each."""
    shards = math.ceil(rows / g.shard_rows)
    size, workers = rows / shards, devices * g.workers_per_device
    stage = _stage_seconds(size, rate, costs, g)
    arrivals = _arrivals(shards, size, math.ceil(workers / g.workers_a_reader), costs, g)
    done = _run_workers(arrivals, stage, devices, g)
    seconds, busy = _driver_seconds(done.ends, g)

    turns = done.turns
    tokenising = turns * stage.encode / workers / seconds
    shares = {READER: arrivals[-1] / seconds, DRIVER: busy / seconds, TOKENISING: tokenising}
    used = {PACKING: turns * (stage.pack + stage.table), DEVICE: done.device_seconds}  # by one thread
    shares[max(used, key=lambda name: used[name])] = sum(used.values()) / workers / seconds
    in_flight = turns * stage.encode + sum(used.values()) + shards * g.request_seconds
    shares[REQUESTS] = in_flight / g.worker_shards / workers / seconds  # the largest only where requests dominate
    before = rows * (costs.count_seconds + g.copies_before * costs.bytes_in / g.stream_bytes) + g.start_seconds
    computing = rows * costs.tokens / rate / devices / seconds
    return Outcome((before + seconds) / 3600, max(shares, key=lambda name: shares[name]), computing, done.lost)


@dataclass(frozen=True, slots=True)
class WorkersOutcome:
    """ends: when each shard was written. turns: shards, a straggler counted as its slowness. lost: shards in flight."""

    ends: list[float]
    turns: float
    device_seconds: float  # with the wait for the device
    lost: int


def _run_workers(arrivals: list[float], stage: StageSeconds, devices: int, g: Given) -> WorkersOutcome:
    """The event loop over the workers' shards, from their arrival to their write."""
    draw = random.Random(0)
    workers = devices * g.workers_per_device
    hourly = g.node_failures * min(devices, g.devices_per_node) / g.devices_per_node / 3600
    fails = [_next(draw, 0, hourly) for _ in range(math.ceil(devices / g.devices_per_node))]
    waiting, again, lost = iter(arrivals), 0, 0
    # Time, slot and worker; of a packed shard also its slowness and its node's next failure.
    events = [(0.0, slot, worker, 0.0, 0.0) for slot in range(g.worker_shards) for worker in range(workers)]
    held: list[deque[tuple[float, float, float]]] = [deque() for _ in range(workers)]  # being tokenised, or done
    encoded, scored, scoring, device_free = [0.0] * workers, [0.0] * workers, [False] * workers, [0.0] * devices
    ends: list[float] = []
    turns = device_seconds = 0.0
    while len(ends) < len(arrivals):
        now, slot, worker, slowness, failure = heapq.heappop(events)
        device = worker // g.workers_per_device
        if not slowness:  # a free slot
            node = device // g.devices_per_node
            while fails[node] <= now:
                now, fails[node] = max(now, fails[node] + g.start_seconds), _next(draw, fails[node], hourly)
            if (arrived := now if again else next(waiting, None)) is None:
                continue
            again = max(again - 1, 0)
            slowness = g.straggler_times if draw.random() < g.straggler_share else 1.0
            encoded[worker] = max(now, arrived, encoded[worker]) + stage.encode * slowness
            held[worker].append((encoded[worker], slowness, fails[node]))
        else:  # a packed shard
            computed = max(now, device_free[device]) + stage.compute * slowness
            scored[worker], scoring[worker] = computed + stage.table * slowness, False
            end = scored[worker] + g.request_seconds
            if end > failure:
                scored[worker] = end = failure + g.start_seconds
                again, lost = again + 1, lost + 1
            else:
                device_free[device] = computed
                ends.append(end)
                turns, device_seconds = turns + slowness, device_seconds + computed - now
            heapq.heappush(events, (end, slot, worker, 0.0, 0.0))
        if held[worker] and not scoring[worker]:
            ready, slowness, failure = held[worker].popleft()
            scoring[worker] = True
            start = max(ready, scored[worker]) + stage.pack * slowness
            heapq.heappush(events, (start, slot, worker, slowness, failure))
    return WorkersOutcome(ends, turns, device_seconds, lost)


def _driver_seconds(ends: list[float], g: Given) -> tuple[float, float]:
    """When the driver has handled the last shard, and for how long it was busy."""
    seconds = written = busy = 0.0
    for end in sorted(ends):
        seconds, busy = max(seconds, end) + g.ray_seconds, busy + g.ray_seconds
        if seconds - written >= g.manifest_pause:
            written = seconds = seconds + g.request_seconds
            busy += g.request_seconds
    return seconds, busy


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
    for name, (title, engines) in MODELS.items():
        # Options of a user: larger shards, many files, and with a small model an engine on each core.
        tuned = replace(g, shard_rows=20 * g.shard_rows, input_files=1000, workers_per_device=engines)
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
        f"the driver, shards of {rows:,}": rows / g.ray_seconds / (1 + g.request_seconds / g.manifest_pause),
        f"the store's PUT, shards of {rows:,}": g.put_rate * rows,
        f"a worker's tokenising, {cores} cores": 1 / c.encode_seconds / (1 - c.encode_parallel * (1 - 1 / cores)),
        "a worker's packing": 1 / c.pack_seconds,
        "a worker's tables": 1 / c.table_seconds,
        f"a worker's writes, shards of {rows:,}": g.worker_shards * rows / g.request_seconds,
        f"{cores} workers of 1 core": cores / (c.encode_seconds + c.pack_seconds + c.table_seconds),
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
