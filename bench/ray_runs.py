"""A run on Ray against the same run without it, after a check that the tables agree; and a long run, monitored.

The rate is that of the shards after the first, by the times at which their files were written. The time to the first
shard (start of Ray, workers and model) is reported separately, since it does not grow with the rows.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2Config, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from scorer.config import Cluster
from scorer.runs.directory import Run
from scorer.runs.run import score

SHARD_ROWS = 50
TOLERANCE = {"bfloat16": 1e-3, "float32": 1e-5}  # relative, of an NLL sum
SUMS = ("nll_conditioned", "nll_alone")
MEGABYTE = 1e6


def run(data: str, rows: int, model: str, repeats: int, pair_rows: int) -> dict[str, Any]:
    """Measure and print; returns the report."""
    console = Console(stderr=True)
    sides: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            tables = {}
            for side, cluster in (("local", None), ("ray", Cluster(workers=1))):
                directory = Path(folder) / f"{side}-{turn}"
                sides[side].append(_timed(data, directory, cluster, limit=rows, model=model, shard_rows=SHARD_ROWS))
                tables[side] = Run(directory)
                console.print(side, sides[side][-1])
            dtype = tables["local"].manifest.config["dtype"]
            error = _agree(tables["local"], tables["ray"], TOLERANCE[dtype])
        pairs = {}
        for name, tolerance in TOLERANCE.items() if pair_rows else ():
            options: dict[str, Any] = {"limit": pair_rows, "model": model, "shard_rows": SHARD_ROWS // 2, "dtype": name}
            # As many threads as a worker on half of the CPUs: with others, a bfloat16 sum of 5 tokens changed by 2%.
            threads = torch.get_num_threads()
            torch.set_num_threads(max(math.ceil((os.cpu_count() or 1) / 2), 1))
            alone = score(data, Path(folder) / f"alone-{name}", **options)
            torch.set_num_threads(threads)
            pair = score(data, Path(folder) / f"pair-{name}", cluster=Cluster(workers=2), **options)
            pairs[name] = {
                "largest_relative_error": _agree(alone, pair, tolerance),
                "workers_that_wrote": len(pair.manifest.shards_by),
            }
    rate = {side: statistics.median(one["rows_per_second"] for one in timed) for side, timed in sides.items()}
    result = {
        "model": model,
        "dtype": dtype,
        "data": Path(data).name,
        "rows": rows,
        "shard_rows": SHARD_ROWS,
        "sides": sides,
        "ray_over_local": rate["ray"] / rate["local"],
        "largest_relative_error": error,
        "two_workers": {"rows": pair_rows, **pairs},
    }
    console.print(f"one worker over Ray: {result['ray_over_local']:.3f} of the local rows/s")
    return result


def _timed(data: str, directory: Path, cluster: Cluster | None, **options: Any) -> dict[str, float]:
    began = time.time()
    run = score(data, directory, cluster=cluster, **options)
    whole = time.time() - began
    written = sorted(path.stat().st_mtime for path in (directory / "scores").glob("part-*.parquet"))
    rows = run.manifest.records - options["shard_rows"]
    return {
        "rows_per_second": rows / (written[-1] - written[0]),
        "seconds_to_the_first_shard": written[0] - began,
        "seconds": whole,
    }


def _agree(first: Run, second: Run, tolerance: float) -> float:
    """The largest relative difference of two tables' sums. Raises SystemExit where rows or sums disagree."""
    tables = [run.scores() for run in (first, second)]
    if not tables[0].select("record_id", "turn", "status").equals(tables[1].select("record_id", "turn", "status")):
        raise SystemExit("the two tables have different rows; nothing is reported")
    largest = max(
        float((tables[0][name] / tables[1][name] - 1).abs().max() or 0.0)  # type: ignore[arg-type]
        for name in SUMS
    )
    if not largest <= tolerance:
        raise SystemExit(f"the two tables disagree by {largest:.2g}; nothing is reported")
    return largest


def long_run(rows: int, shard_rows: int, workers: int) -> dict[str, Any]:
    """Score short rows with a tiny model over Ray, and monitor every process; returns the report."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        _tiny(directory / "model")
        with (directory / "data.jsonl").open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"instruction": f"Say {i}.", "output": f"{i} it is"}) + "\n")
        with Watch(console, rows) as watch:
            began = time.monotonic()
            run = score(
                directory / "data.jsonl",
                directory / "run",
                cluster=Cluster(workers=workers),
                progress=watch,
                model=str(directory / "model"),
                shard_rows=shard_rows,
                batch_tokens=4096,
            )
            seconds = time.monotonic() - began
        table = run.scores()
        whole = table["record_id"].equals(pl.Series("record_id", range(rows), dtype=table["record_id"].dtype))
        if not whole or set(table["status"]) != {"ok"}:
            raise SystemExit("the table does not have every row once with status ok; nothing is reported")
    left = [p.name() for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]
    result = {
        "rows": rows,
        "shard_rows": shard_rows,
        "workers": workers,
        "seconds": round(seconds, 1),
        "rows_per_second": rows / seconds,
        "reported_records": watch.done,
        "processes": watch.summary(),
        "processes_left": left,
    }
    console.print(result)
    return result


class Watch:
    """Progress of a run; samples the memory and open files of this process and its descendants every second."""

    def __init__(self, console: Console, rows: int):
        self.console, self.rows, self.done = console, rows, 0
        self.samples: dict[str, list[tuple[int, float, int, int]]] = defaultdict(list)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def say(self, message: str) -> None:
        self.console.print(message)

    def begin(self, records: int, done: int) -> None:
        self.done = done

    def advance(self, records: int, tokens: int) -> None:
        before, self.done = self.done, self.done + records
        if before * 20 // self.rows != self.done * 20 // self.rows:
            self.console.print(f"{self.done:,} of {self.rows:,}")

    def _look(self) -> None:
        this = psutil.Process()
        while not self._end.wait(1):
            now: dict[str, list[tuple[float, int]]] = defaultdict(list)
            for process in (this, *this.children(recursive=True)):
                try:
                    kind = "driver" if process == this else _kind(process.cmdline())
                    now[kind].append((process.memory_info().rss / MEGABYTE, process.num_fds()))
                except psutil.Error:  # the process has ended
                    continue
            for kind, found in now.items():
                self.samples[kind].append((self.done, max(f[0] for f in found), max(f[1] for f in found), len(found)))

    def summary(self) -> dict[str, dict[str, float]]:
        """The peak memory and open files of one process, by kind of process, in the first and last fifth of the run."""
        result = {}
        for kind, samples in sorted(self.samples.items()):
            early = [s for s in samples if 0 < s[0] <= self.rows / 5] or samples
            late = [s for s in samples if s[0] >= self.rows * 4 / 5] or samples
            result[kind] = {
                "peak_rss_mb": round(max(s[1] for s in samples), 1),
                "rss_mb_early": round(max(s[1] for s in early), 1),
                "rss_mb_late": round(max(s[1] for s in late), 1),
                "open_files_early": max(s[2] for s in early),
                "open_files_late": max(s[2] for s in late),
                "processes_early": max(s[3] for s in early),
                "processes_late": max(s[3] for s in late),
            }
        return result


def _kind(command: list[str]) -> str:
    """The kind of a process, from its command line."""
    if not command:
        return "other"
    if command[0].startswith("ray::"):
        return "ray::" + re.split(r"\W", command[0].replace("MapWorker(", "").replace("MapBatches(", "")[5:])[0]
    scripts = [Path(word).name for word in command[:3] if "ray" in word]
    return scripts[-1] if scripts else Path(command[0]).name


def _tiny(folder: Path) -> None:
    """A random model of one layer, and a tokenizer with a token for each byte."""
    torch.manual_seed(0)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)} | {"<|end|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(
        folder
    )
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=1, bos_token_id=256, eos_token_id=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
