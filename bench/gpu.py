"""Everything that only a GPU can tell, in one go and in the order of worth; without a network, with random weights.

Each step is another benchmark of this folder, in a process of its own. What they found is one JSON file, written anew
after each step. A dry run takes the same steps with tiny shapes on a CPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.steps import OK, SKIPPED, StartProcess, Step, run_step
from scorer.models.load import choose_device
from scorer.storage.atomic import replacing

SECONDS = 480.0  # of all steps together
# The steps of a dry run are forked from a process that has imported these: a start takes no seconds.
PRELOADED = ["bench.engines", "bench.exact", "bench.families", "bench.score", "bench.scorers"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in ("gpt2", "mistral")]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What differs between a GPU's run and a dry one."""

    weak: str = "gpt2"
    small: str = "smollm2-135m"
    strong: str = "llama-2-7b"
    rows: int = 45_336
    engine_rows: int = 4096
    strong_rows: int = 2048
    vllm_rows: tuple[int, int] = (2048, 256)  # of the weak and the strong model
    tiny: tuple[str, ...] = ()
    families: tuple[str, ...] = ()  # all
    milliseconds: int = 200


PACKED16, VLLM, STOCK = "packed bfloat16", "vllm bfloat16", "vllm stock prompt_logprobs=0"  # names of `engines`
GPU = Sizes()
DRY = Sizes("tiny", "tiny", "tiny", 16, 4, 4, (4, 4), ("--tiny",), ("gpt2", "mistral"), 1)


def steps(sizes: Sizes, data: str, path: Path, vllm: bool) -> list[Step]:
    """The steps in order. path: the JSON Lines file that the first one makes of `data`, and others read.

    On an H200 the import of torch and transformers takes 8 s, and vLLM starts in 25.
    """
    rows = ("--data", str(path), "--rows")
    times = ("--milliseconds", str(sizes.milliseconds))
    families = [word for name in sizes.families for word in ("--family", name)]
    tiles = () if sizes.tiny else ("--shape", "GPT-2, 64k rows", "--shape", "SmolLM2-135M")
    engines, one = ("engines", "--dummy-weights", "--only", PACKED16, *rows), ("--repeats", "1")
    sides = ("--weak", sizes.weak, "--weak-engine", "packed", "--strong", sizes.strong, "--strong-engine", "packed")
    found = [
        Step("rows", ("rows", "--data", data, "--rows", str(sizes.rows), "--output", str(path)), 60),
        Step("kernels against float64", ("exact", *sizes.tiny), 80),
        Step("packed against reference", ("families", *rows, "4", *families), 80),
        Step("ceilings, and the head against its rivals", ("kernel", *times, *sizes.tiny), 80),
        Step("scorer score", ("score", *rows, str(sizes.rows), "--shape", sizes.weak), 80),
        Step("packed engine", (*engines, str(sizes.engine_rows), "--model", sizes.small), 60),
        Step("weak against strong", ("scorers", "--dummy-weights", *rows, str(sizes.strong_rows), *one, *sides), 100),
    ]
    for model, count in zip((sizes.weak, sizes.strong), sizes.vllm_rows, strict=True):
        for engine in (VLLM, STOCK):
            options = ("--only", engine, "--model", model, "--gpu-memory-utilization", "0.4", *one)
            step = Step(
                f"{model}: {engine}",
                (*engines, str(count), *options),
                80,
                {"VLLM_USE_FLASHINFER_SAMPLER": "0"},  # FlashInfer would compile its sampler for minutes
                None if vllm else "vLLM is not installed",
                parse=bool(sizes.tiny),  # vLLM starts for longer than all of a dry run takes
            )
            found.append(step)
    return [*found, Step("tiles", ("tune", *times, *tiles, *sizes.tiny), 80)]


def run(data: str, output: Path | None, dry: bool) -> None:
    """Take all steps, and write what they found to `output`. SystemExit where one failed, or without a GPU."""
    start: StartProcess = multiprocessing.get_context("spawn").Process
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(PRELOADED)
        start = forks.Process
    elif choose_device("auto") != "cuda":
        raise SystemExit("torch finds no CUDA device here: --dry tries the steps on a CPU")
    from scorer.engines.vllm import vllm_version

    with tempfile.TemporaryDirectory() as folder:
        if dry and output is None:
            output = Path(tempfile.mkdtemp()) / "gpu-dry.json"
        planned = steps(DRY if dry else GPU, data, Path(folder) / "rows.jsonl", vllm_version() is not None)
        found = take(planned, start, output)
    if failed := [step["name"] for step in found if step["status"] not in (OK, SKIPPED)]:
        raise SystemExit(f"not done: {'; '.join(failed)}")


def take(planned: Iterable[Step], start: StartProcess, output: Path | None) -> list[dict[str, Any]]:
    """Take the steps, whatever becomes of each; writes `output` after each and returns what it holds of them."""
    began, found = time.monotonic(), []
    for step in planned:
        found.append(run_step(step, start, SECONDS - (time.monotonic() - began)))
        machine: dict[str, Any] = next((step["result"]["machine"] for step in found if "result" in step), {})
        path = output or _default_path(machine)
        document = {"benchmark": "gpu", "machine": machine, "seconds": time.monotonic() - began, "steps": found}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        last = found[-1]
        print(f"{last['name']}: {last['status']}", last.get("why") or f"in {last['seconds']:.0f} s", file=sys.stderr)
    print(f"written to {path}", file=sys.stderr)
    return found


def _default_path(machine: dict[str, Any]) -> Path:
    from bench.lib.report import result_path

    return result_path("gpu", machine.get("gpu") or "unknown")
