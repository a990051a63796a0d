"""The simulation of large runs: cases by hand, one cost at a time; and its inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import costs as of_a_row
from bench.__main__ import EXAMPLES, bench
from bench.costs import Costs
from bench.engines import PACKED16, STOCK
from bench.scaling import DEVICE, DRIVER, PACKING, READER, REQUESTS, TABLES, TOKENISING, Given, rates, simulate
from scorer.models.find import ModelFiles

# Only the costs that a test sets take time.
FREE = Costs(*[0.0] * 13)
NO_COST = Given(
    ray_seconds=0,
    request_seconds=0,
    start_seconds=0,
    straggler_share=0,
    node_failures=0,
    cores_per_device=math.inf,
    worker_shards=4,
    concurrent_batches=2,
)
ROWS, TOKENS, RATE = 1_000_000, 100.0, 10_000.0  # 10,000 s of one device


def costs(**fields: float) -> Costs:
    return Costs(**dict.fromkeys(FREE.__slots__, 0.0) | {"tokens": TOKENS} | fields)


def given(**fields: Any) -> Given:
    return Given(**{name: getattr(NO_COST, name) for name in NO_COST.__slots__} | fields)


def test_one_worker_with_nothing_else_takes_the_tokens_over_the_rate() -> None:
    outcome = simulate(ROWS, 1, RATE, costs(), NO_COST)
    assert outcome.hours == pytest.approx(ROWS * TOKENS / RATE / 3600)
    assert (outcome.first, outcome.lost) == (DEVICE, 0)
    assert outcome.device_share == pytest.approx(1)


def test_twice_the_devices_take_half_the_time_until_the_readers_are_full() -> None:
    read = costs(read_seconds=0.001)  # 1,000 s, as 10 devices take
    hours = {n: simulate(ROWS, n, RATE, read, given(workers_a_reader=32)) for n in (1, 2, 4, 8, 16, 32)}
    assert [hours[n].first for n in hours] == [DEVICE] * 4 + [READER] * 2
    for n in (2, 4, 8):
        assert hours[n // 2].hours / hours[n].hours == pytest.approx(2, rel=0.01)
    # the last shard leaves the reader after 1,000 s, and takes a device 10 s
    assert [hours[n].hours * 3600 for n in (16, 32)] == pytest.approx([1010, 1010])
    assert hours[32].device_share == pytest.approx(10_000 / 32 / 1010)
    # two readers, of 16 workers each, take half of that
    assert simulate(ROWS, 32, RATE, read, given(workers_a_reader=16)).hours * 3600 == pytest.approx(510)


def test_a_reader_skips_the_rows_of_its_file_before_its_stretch_and_copies_the_file_whole() -> None:
    row = costs(tokens=0, read_seconds=0.001, count_seconds=0.0001, bytes_in=1000)
    slow = {"stream_bytes": 1e6, "workers_a_reader": 2}  # 1 ms of copying a row
    # before the run a copy (1,000 s) is counted (100 s); then each of two readers copies all of it (1,000 s), the
    # second skips 500,000 rows (50 s), and they read half each (500 s)
    one = simulate(ROWS, 4, RATE, row, given(**slow))
    assert one.hours * 3600 == pytest.approx(1100 + 1000 + 50 + 500)
    assert one.first == READER
    # of two files each reader opens its own
    assert simulate(ROWS, 4, RATE, row, given(**slow, input_files=2)).hours * 3600 == pytest.approx(1100 + 500 + 500)
    # of three the second is read by both; the second reader skips 166,667 rows of it
    three = simulate(ROWS, 4, RATE, row, given(**slow, input_files=3))
    assert three.hours * 3600 == pytest.approx(1100 + 2000 / 3 + 100 / 6 + 500)


def test_the_driver_takes_shards_one_by_one() -> None:
    outcome = simulate(ROWS, 64, RATE, costs(), given(ray_seconds=0.5))
    assert outcome.first == DRIVER
    assert outcome.hours * 3600 == pytest.approx(10 + 1000 * 0.5)  # the first shard, and then 1,000 times
    larger = simulate(ROWS, 64, RATE, costs(), given(ray_seconds=0.5, shard_rows=10_000))
    assert larger.hours * 3600 == pytest.approx(200 + 36 * 0.5)  # 100 of 100 s, of which 36 in the second round
    assert larger.first == DEVICE


def test_a_worker_tokenises_the_next_shard_while_its_device_computes() -> None:
    slow = costs(encode_seconds=0.01, encode_parallel=0.5)  # a row: 5 ms, and 5 ms that all its cores share
    alone = simulate(ROWS, 1, RATE, slow, given(cores_per_device=5))
    assert alone.hours * 3600 == pytest.approx(6 + 10_000)  # the first shard's 1,000 rows wait for their tokens
    assert alone.first == DEVICE
    faster = simulate(ROWS, 1, 10 * RATE, slow, given(cores_per_device=5))
    assert faster.hours * 3600 == pytest.approx(6000 + 1)  # the last one is still to be computed
    assert faster.first == TOKENISING


def test_packing_and_tables_count_only_where_they_are_slower_than_the_device() -> None:
    # a shard: 10 s of the device, 9 of packing, 9 of its table. The last table is made when all is computed.
    hidden = simulate(ROWS, 1, RATE, costs(pack_seconds=0.009, table_seconds=0.009), NO_COST)
    assert hidden.hours * 3600 == pytest.approx(10_000 + 9)
    assert hidden.first == DEVICE
    tables = simulate(ROWS, 1, RATE, costs(table_seconds=0.02), NO_COST)
    assert tables.hours * 3600 == pytest.approx(10 + 1000 * 20)
    assert tables.first == TABLES
    # each of two threads packs for 30 s and waits for the device for 10: two shards in 40 s
    packing = simulate(ROWS, 1, RATE, costs(pack_seconds=0.03), NO_COST)
    assert packing.hours * 3600 == pytest.approx(500 * 40)
    assert packing.first == PACKING
    assert packing.device_share == pytest.approx(0.5)
    # of one thread the device always waits
    one = simulate(ROWS, 1, RATE, costs(pack_seconds=0.004), given(concurrent_batches=1))
    assert one.hours * 3600 == pytest.approx(1000 * 14)


def test_a_worker_writes_a_shard_while_others_are_tokenised_and_scored() -> None:
    # a shard: 8 s of tokenising, 10 of the device, 9 of writing. The last one is written when all are scored.
    three = costs(encode_seconds=0.008, encode_parallel=0.0)
    outcome = simulate(ROWS, 1, RATE, three, given(request_seconds=9))
    assert outcome.hours * 3600 == pytest.approx(8 + 1000 * 10 + 9)
    assert outcome.first == DEVICE
    # with two shards at a time the next one but one is taken when a shard is written: two in 8 + 10 + 9 s
    two = simulate(ROWS, 1, RATE, three, given(request_seconds=9, worker_shards=2))
    assert two.hours * 3600 == pytest.approx(500 * (8 + 10 + 9) + 10, abs=1)
    # with a write of 42 s a shard is held for 8 + 10 + 42: four in 60 s
    slow = simulate(ROWS, 1, RATE, three, given(request_seconds=42))
    assert slow.hours * 3600 == pytest.approx(250 * 60, rel=0.002)
    assert slow.first == REQUESTS
    assert slow.device_share == pytest.approx(10 / 15, rel=0.002)


def test_the_stages_of_a_worker_share_its_cores() -> None:
    # a shard: 6 s of tokenising, 1 of the device, 4 of its table; the last one is computed after its tokenising
    row = costs(encode_seconds=0.006, table_seconds=0.004)
    seconds = {n: simulate(ROWS, 1, 10 * RATE, row, given(cores_per_device=n)).hours * 3600 for n in (1, 2)}
    assert seconds[1] == pytest.approx(1000 * (6 + 4) + 1 + 4)
    assert seconds[2] == pytest.approx(1000 * 6 + 1 + 4)
    # two cores can't do it in less than half, however much of the tokenising is parallel
    parallel = simulate(ROWS, 1, 10 * RATE, replace(row, encode_parallel=1.0), given(cores_per_device=2))
    assert parallel.hours * 3600 == pytest.approx(1000 * (6 + 4) / 2 + 1 + 4)
    assert parallel.first == TOKENISING


def test_requests_count_a_shard() -> None:
    # four shards at once, each the 0.01 s of its device after the one before: 250 times
    slow = {"request_seconds": 2.0}
    outcome = simulate(ROWS, 1, 1000 * RATE, costs(), given(**slow))
    assert outcome.first == REQUESTS
    assert outcome.hours * 3600 == pytest.approx(250 * (0.01 + 2.0) + 3 * 0.01)
    # ten large shards of 1 s: only the last request is waited for
    larger = simulate(ROWS, 1, 1000 * RATE, costs(), given(**slow, shard_rows=100_000))
    assert larger.first == DEVICE
    assert larger.hours * 3600 == pytest.approx(10 * 1 + 2)


def test_stragglers_take_their_share_longer() -> None:
    outcome = simulate(ROWS, 1, RATE, costs(), given(straggler_share=0.1, straggler_times=3))
    assert outcome.hours * 3600 == pytest.approx(10_000 * (0.9 + 0.1 * 3), rel=0.05)


def test_what_a_failing_node_loses_is_done_again() -> None:
    failing = given(node_failures=1.0, start_seconds=100)  # an hour, of 8 devices
    outcome = simulate(8 * ROWS, 8, RATE, costs(), failing)
    failures = outcome.lost / 32  # each of the 8 has a shard of 10 s on the device, and the next three
    assert 1 <= failures <= 10
    late = outcome.hours * 3600 - 100 - 10_000
    assert failures * 100 <= late <= failures * 110 + 10
    # one device, an eighth of a node, fails an eighth as often: in 22 hours three times, losing four shards each time
    few = simulate(8 * ROWS, 1, RATE, costs(), failing)
    assert 1 <= few.lost / 4 <= 10


def test_a_rate_is_measured_only_where_an_h100_was(tmp_path: Path) -> None:
    assumed = rates("gpt2", 1e9, 1e15, tmp_path)
    assert assumed == {f"ASSUMED, {n}% of peak": pytest.approx(n * 1e4) for n in (20, 40, 60)}
    engines = {PACKED16: {"tokens_per_second": 7.0}, STOCK: {"tokens_per_second": 9.0}}
    for gpu in (None, "NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        saved = {"machine": {"gpu": gpu}, "model": "gpt2", "engines": engines}
        (tmp_path / f"engines-{gpu}.json").write_text(json.dumps(saved))
    assert rates("gpt2", 1e9, 1e15, tmp_path) == {f"measured: {PACKED16}, NVIDIA H100 80GB HBM3": 7.0}  # not stock's
    assert list(rates("llama-2-7b", 1e9, 1e15, tmp_path)) == list(assumed)


def test_the_command_measures_prints_and_reports(
    tiny: Callable[[str], ModelFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_a_row, "TIMED_ROWS", 400)
    options = ["--scored", "40", "--model", str(tiny("gpt2").path), "--samples", "100000"]
    done = CliRunner().invoke(bench, ["scaling", *options], catch_exceptions=False)
    *tables, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    rows = json.loads(EXAMPLES.read_text())
    lines = [len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows]
    assert result["costs"]["bytes_in"] == pytest.approx(sum(lines) / len(rows))
    assert result["bytes_in"] == pytest.approx(100_000 * sum(lines) / len(rows))
    assert 12 < result["costs"]["bytes_out"] < 100  # of 76 in memory
    assert all(value > 0 for value in result["costs"].values())
    assert (len(result["cases"]), result["shards"]) == (18, 100)
    # GPT-2: 85 million weights for each token, and 38.6 million more for each that is scored
    assert 2 * 84_934_656 < result["cases"][0]["flop_per_token"] < 2 * (84_934_656 + 38_597_376)
    models = [line for line in tables if line.startswith(("| GPT-2 |", "| LLaMA-7B |"))]
    assert len(models) == 6
    assert all("ASSUMED, 20% of peak" in line for line in models)
