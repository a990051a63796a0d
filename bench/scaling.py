"""A billion samples on one H100, eight and 64: a simulation of `scorer score --ray` with object storage.

    reader --records--> workers (tokenise, score, write a shard) --"done"--> driver (writes the manifest)

The reader hands out shards in order, one after the other. A free worker takes the next, uses its cores, then its share
of the device, then writes. The driver takes what is done one by one. A node that fails takes the shards in flight with
it, which are done again. Knows seconds a row and a shard; what scorer does with a row is measured first, in `measure`.
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

from bench.bound import flop
from bench.costs import Costs, measure
from bench.engines import PACKED16, VLLM
from bench.report import RESULTS
from bench.shapes import network, shape_config

MODELS = {"gpt2": "GPT-2", "llama-2-7b": "LLaMA-7B"}
DEVICES = (1, 8, 64)
ASSUMED = "ASSUMED"  # how such a figure is marked, wherever it is shown
EFFICIENCIES = (0.2, 0.4, 0.6)  # of the peak, where no rate was measured
READER, DRIVER, CORES, DEVICE, REQUESTS = "the reader", "the driver", "the workers' cores", "the devices", "requests"
TOTALS = ("tokens", "bytes_in", "bytes_out", "shards", "table_bytes_in_memory")
RUNS, RAN = ("default", "tuned"), ("hours", "computing", "first to saturate")
COLUMNS = ("model", "H100s", "basis", "tokens/s of one", "device hours")


def given(value: float, unit: str, source: str) -> Any:
    """A field of `Given`: its value, and where that is from."""
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, slots=True)
class Given:
    """What is not measured by this script."""

    shard_rows: int = given(1000, "rows", "the default of --shard-rows")
    workers_per_device: int = given(1, "workers", "the default of --gpus-per-worker")
    peak: float = given(989e12, "FLOP/s", "NVIDIA's data sheet: H100 SXM, bfloat16, dense")
    cores_per_device: float = given(14, "cores", "NVIDIA's data sheet: DGX H100, 112 cores for 8 devices")
    devices_per_node: int = given(8, "devices", "the same")
    request_seconds: float = given(0.1, "s", "Amazon S3's guide to performance: small objects, 100 to 200 ms")
    stream_bytes: float = given(850e6, "B/s", "the same: 85 MB/s a request; s3fs copies an object by 10 at once")
    copies_before: int = given(3, "copies", "of each input that scorer.run makes, to count and to look at its rows")
    put_rate: float = given(3500, "requests/s", "the same: at least so many PUT a second and prefix")
    ray_seconds: float = given(
        0.009, "s a shard", "measured apart: 1,000 rows of 0.5 MB through Ray Data 2.60, 2 workers, the 2 cores here"
    )
    start_seconds: float = given(60, "s", "assumed: a worker's start, and its next start after a failure")
    straggler_share: float = given(0.01, "of shards", "assumed")
    straggler_times: float = given(3, "times as long", "assumed")
    node_failures: float = given(
        8 * 419 / (16384 * 54 * 24), "per hour", "arXiv 2407.21783: 419 in 54 days of 16,384 H100, here of 8 at once"
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """`hours` with all that comes before the first shard; the shares are of the time from there on."""

    hours: float
    first: str  # what saturates first
    device_share: float  # of the time in which a device computes
    lost: int  # shards in flight


def simulate(rows: float, devices: int, rate: float, costs: Costs, g: Given) -> Outcome:
    """One run of `rows` rows on `devices` devices of `rate` tokens/s each."""
    shards = math.ceil(rows / g.shard_rows)
    size = rows / shards
    fetch = costs.bytes_in / g.stream_bytes  # an input is copied, and then read
    read = size * (fetch + costs.read_seconds)
    threads = max(g.cores_per_device / g.workers_per_device, 1)
    encode = costs.encode_seconds * (1 - costs.encode_parallel + costs.encode_parallel / threads)
    cores = size * (encode + costs.pack_seconds + costs.table_seconds)
    cores *= max(g.workers_per_device / g.cores_per_device, 1)
    compute, tell = size * costs.tokens / rate, g.ray_seconds + g.request_seconds

    draw = random.Random(0)
    hourly = g.node_failures * min(devices, g.devices_per_node) / g.devices_per_node / 3600
    fails = [_next(draw, 0, hourly) for _ in range(math.ceil(devices / g.devices_per_node))]
    free = [(0.0, worker) for worker in range(devices * g.workers_per_device)]
    device_free = [0.0] * devices
    ends, shard_read, lost = [], 0.0, 0
    used = {CORES: 0.0, DEVICE: 0.0, REQUESTS: 0.0}  # seconds of workers, those of waiting for the device included
    for _ in range(shards):
        shard_read += read
        times = g.straggler_times if draw.random() < g.straggler_share else 1.0
        while True:
            begin, worker = heapq.heappop(free)
            begin, device = max(begin, shard_read), worker // g.workers_per_device
            node = device // g.devices_per_node
            loaded = begin + cores * times
            computed = max(loaded, device_free[device]) + compute * times
            end = computed + g.request_seconds
            while fails[node] + g.start_seconds <= begin:
                fails[node] = _next(draw, fails[node], hourly)
            if end <= fails[node]:
                break
            lost += begin < fails[node]
            heapq.heappush(free, (fails[node] + g.start_seconds, worker))
        device_free[device] = computed
        heapq.heappush(free, (end, worker))
        ends.append(end)
        used[CORES] += loaded - begin
        used[DEVICE] += computed - loaded
        used[REQUESTS] += g.request_seconds
    seconds = 0.0
    for end in sorted(ends):
        seconds = max(seconds, end) + tell

    shares = {READER: shards * read / seconds, DRIVER: shards * tell / seconds}
    shares[max(used, key=lambda name: used[name])] = sum(used.values()) / len(free) / seconds
    before = rows * (costs.count_seconds + g.copies_before * fetch) + g.start_seconds
    computing = rows * costs.tokens / rate / devices / seconds
    return Outcome((before + seconds) / 3600, max(shares, key=lambda name: shares[name]), computing, lost)


def _next(draw: random.Random, after: float, rate: float) -> float:
    return after + draw.expovariate(rate) if rate else math.inf


def rates(model: str, flop_per_token: float, peak: float, results: Path = RESULTS) -> dict[str, float]:
    """Tokens/s of one H100, by where the figure is from: of a saved `python -m bench engines`, else assumed."""
    for path in sorted(results.glob("engines-*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        speeds = {n: saved["engines"][n]["tokens_per_second"] for n in (PACKED16, VLLM) if n in saved["engines"]}
        if "H100" in (saved["machine"]["gpu"] or "") and saved["model"] == model and speeds:
            engine = max(speeds, key=lambda name: speeds[name])
            return {f"measured: {engine}, {saved['machine']['gpu']}": speeds[engine]}
    return {f"{ASSUMED}, {share:.0%} of peak": share * peak / flop_per_token for share in EFFICIENCIES}


def run(data: str, scored: int, model: str, rows: float, results: Path = RESULTS) -> dict[str, Any]:
    """Measure, simulate and print the tables in Markdown; returns what is to be reported."""
    costs, sample = measure(data, scored, model)
    g = Given()
    cases: list[dict[str, Any]] = []
    for name, title in MODELS.items():
        needed = flop(network(shape_config(name)), sample) / sample.tokens
        # What a user can do: larger shards, where cores are short an engine a core, and a run of its own a device.
        tuned = replace(g, shard_rows=20 * g.shard_rows, workers_per_device=12 if name == "gpt2" else 1)
        for devices in DEVICES:
            for basis, rate in rates(name, needed, g.peak, results).items():
                # an engine's measured rate has the packing in it
                own = costs if basis.startswith(ASSUMED) else replace(costs, pack_seconds=0.0)
                case = {"model": title, "devices": devices, "basis": basis, "tokens_per_second": rate}
                case |= {"flop_per_token": needed, "device_hours": rows * costs.tokens / rate / 3600}
                case["default"] = asdict(simulate(rows, devices, rate, own, g))
                case["tuned"] = asdict(simulate(rows / devices, 1, rate, own, tuned))
                cases.append(case)
    shards = math.ceil(rows / g.shard_rows)
    totals = {
        "tokens": rows * costs.tokens,
        "bytes_in": rows * costs.bytes_in,
        "bytes_out": rows * costs.bytes_out + shards * costs.shard_bytes,
        "shards": shards,
        "table_bytes_in_memory": rows * costs.memory_bytes,
    }
    stages = _stages(costs, g)
    result = {"data": Path(data).name, "tokenizer": model, "samples": rows, **totals, "costs": asdict(costs)}
    result |= {"given": asdict(g), "rows_per_second": stages, "cases": cases}
    _show(result, g)
    return result


def _stages(costs: Costs, g: Given) -> dict[str, float]:
    """The most rows/s of each stage by itself."""
    core = 1 / (costs.encode_seconds + costs.pack_seconds + costs.table_seconds)
    told = 1 / (g.ray_seconds + g.request_seconds)
    return {
        "the reader, JSON Lines": 1 / (costs.read_seconds + costs.bytes_in / g.stream_bytes),
        "the reader, Parquet": 1 / (costs.parquet_read_seconds + costs.parquet_bytes_in / g.stream_bytes),
        f"the driver, shards of {g.shard_rows:,}": told * g.shard_rows,
        f"the driver, shards of {20 * g.shard_rows:,}": told * g.shard_rows * 20,
        f"the store's PUT, shards of {g.shard_rows:,}": g.put_rate / 2 * g.shard_rows,  # the shard, and the manifest
        "a worker's tokens and tables, 1 core": core,
        f"the same, {g.cores_per_device} cores": core * g.cores_per_device,
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

    count = f"{result['samples']:,.0f} samples as those of {result['data']}, tokens of {result['tokenizer']}"
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
    table(("a row, measured", "one core"), *((name.replace("_", " "), value) for name, value in costs.items()))
    notes = [(f.name.replace("_", " "), f"{getattr(g, f.name):.4g}", f.metadata) for f in fields(g)]
    table(("not measured", "", "from"), *((n, f"{v} {m['unit']}", m["source"]) for n, v, m in notes))
