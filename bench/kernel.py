"""The head against what else computes it: eager torch, chunked products, torch.compile, and two published kernels.

Every rival is checked against float64 before it is timed. On a machine without a GPU the CPU's path is measured, on
fewer rows, and the result says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scorer_kernels import linear_nll, nll_head
from scorer_kernels.reference import reference_nll
from scorer_kernels.table import CANDIDATES, Config, config_for

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CHUNK = 4096  # rows of a chunked product
CHECKED_ROWS = 256
CPU_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows, hidden width and vocabulary of one product."""

    name: str
    rows: int
    width: int
    words: int

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.width * self.words


SHAPES = (
    Shape("GPT-2, 16k rows", 16384, 768, 50257),
    Shape("GPT-2, 64k rows", 65536, 768, 50257),
    Shape("SmolLM2-135M", 16384, 576, 49152),
    Shape("OPT-350M", 16384, 512, 50272),
    Shape("Qwen2.5-0.5B", 16384, 896, 151936),
    Shape("LLaMA-7B", 16384, 4096, 32000),
)


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once: product, log_softmax, gather."""
    return -(hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunk(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One product, and the log-sum-exp of its float32 copy."""
    logits = (hidden @ weight.T).float()
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`chunk` on so many rows at a time that the logits stay small."""
    parts = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    return torch.cat([chunk(h, weight, t) for h, t in parts])


def rivals(device: str) -> dict[str, Head]:
    """Every rival that is installed here; the two kernels from PyPI need the extra `bench` and a GPU."""
    if device == "cpu":
        return {"scorer": nll_head, "eager": eager, "unblocked": chunk}
    from cut_cross_entropy import linear_cross_entropy
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    compiled = torch.compile(chunk)

    def chunked_compiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        parts = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
        return torch.cat([compiled(h, weight, t) for h, t in parts])

    def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = fused_linear_cross_entropy_forward(
            hidden, weight, targets, reduction="none", compute_gradients=False
        )[0]
        return loss

    def cut(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none")
        return loss

    return {
        "scorer": nll_head,
        "eager": eager,
        "chunked cuBLAS": chunked,
        "chunked, compiled": chunked_compiled,
        "Liger": liger,
        "cut-cross-entropy": cut,
    }


def run(milliseconds: int) -> dict[str, Any]:
    """Measure every shape and rival; returns what is to be reported."""
    console = Console(stderr=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        console.print(f"no GPU here: the CPU's path is measured, on {CPU_ROWS:,} rows a shape")
    heads = rivals(device)
    ceiling = _ceiling(device, milliseconds)
    console.print(f"bfloat16 matrix ceiling: {ceiling / 1e12:,.2f} TFLOP/s")
    names = {shape.width * shape.words: shape for shape in SHAPES} if device == "cpu" else dict(enumerate(SHAPES))
    measured = []
    for shape in names.values():
        shape = Shape(shape.name, CPU_ROWS, shape.width, shape.words) if device == "cpu" else shape
        measured.append({**asdict(shape), "rivals": _measure(shape, heads, device, ceiling, milliseconds, console)})
    return {"device": device, "dtype": "bfloat16", "ceiling_flop_per_second": ceiling, "shapes": measured}


def _measure(
    shape: Shape, heads: dict[str, Head], device: str, ceiling: float, milliseconds: int, console: Console
) -> dict[str, Any]:
    hidden, weight, targets = inputs(shape, device)
    oracle = reference_nll(hidden[:CHECKED_ROWS], weight, targets[:CHECKED_ROWS])
    allowed = 1.5 * float((eager(hidden[:CHECKED_ROWS], weight, targets[:CHECKED_ROWS]) - oracle).abs().max()) + 1e-6
    shown = Table(f"{shape.name} [{shape.rows}, {shape.width}, {shape.words}]", "ms", "TFLOP/s", "of ceiling", "MiB")
    figures: dict[str, Any] = {}
    for name, head in heads.items():
        try:
            with torch.inference_mode():
                error = float((head(hidden, weight, targets)[:CHECKED_ROWS] - oracle).abs().max())
                if not error <= allowed:
                    figures[name] = {"wrong_by": error, "allowed": allowed}
                    shown.add_row(name, f"wrong by {error:.1e}", "", "", "")
                    continue
                extra = _extra_memory(head, hidden, weight, targets, device)
                seconds = median_seconds(partial(head, hidden, weight, targets), device, milliseconds)
        except torch.OutOfMemoryError:
            figures[name] = {"out_of_memory": True}
            shown.add_row(name, "out of memory", "", "", "")
            continue
        rate = shape.flop / seconds
        figures[name] = {
            "milliseconds": seconds * 1e3,
            "flop_per_second": rate,
            "fraction_of_ceiling": rate / ceiling,
            "largest_error": error,
            "extra_bytes": extra,
            "logits_bytes": 2 * shape.rows * shape.words,
        }
        memory = "" if extra is None else f"{extra / 2**20:,.1f}"
        shown.add_row(name, f"{seconds * 1e3:,.2f}", f"{rate / 1e12:,.2f}", f"{rate / ceiling:.0%}", memory)
    console.print(shown)
    return figures


def inputs(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states, weights and targets whose logits spread as a trained model's do."""
    generator = torch.Generator(device).manual_seed(shape.rows + shape.width)
    hidden = torch.randn(shape.rows, shape.width, device=device, generator=generator)
    weight = torch.randn(shape.words, shape.width, device=device, generator=generator) * 2.0 * shape.width**-0.5
    targets = torch.randint(shape.words, (shape.rows,), device=device, generator=generator)
    return hidden.bfloat16(), weight.bfloat16(), targets


def median_seconds(work: Callable[[], object], device: str, milliseconds: int) -> float:
    """Median seconds of one call, over about so many milliseconds after a warm-up."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")) / 1e3
    work()
    took: list[float] = []
    while len(took) < 5 or sum(took) < milliseconds / 1e3:
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _extra_memory(
    head: Head, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, device: str
) -> int | None:
    """Bytes at the peak beyond the inputs; None on CPU, where torch keeps no count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(hidden, weight, targets)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _ceiling(device: str, milliseconds: int) -> float:
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2.0 * side**3 / median_seconds(lambda: a @ b, device, milliseconds)


def tune(milliseconds: int) -> dict[str, Any]:
    """Time every configuration on every shape; the fastest belong into scorer_kernels/table.py."""
    if not torch.cuda.is_available():
        raise SystemExit("tuning times Triton's kernels, and needs a CUDA device")
    console = Console(stderr=True)
    capability = torch.cuda.get_device_capability()
    measured = []
    for shape in SHAPES:
        hidden, weight, targets = inputs(shape, "cuda")
        current = config_for(capability, 2, shape.width, shape.words)
        configs: list[Config] = list(dict.fromkeys((current, *CANDIDATES)))
        head = partial(linear_nll, hidden, weight, targets)
        seconds = {c: median_seconds(partial(head, config=c), "cuda", milliseconds) for c in configs}
        for config, took in sorted(seconds.items(), key=lambda item: item[1]):
            mark = "*" if config == current else " "
            console.print(f"{mark} {shape.name}: {took * 1e3:8.3f} ms {shape.flop / took / 1e12:6.1f} TFLOP/s {config}")
        measured.append({**asdict(shape), "configs": [asdict(c) | {"seconds": s} for c, s in seconds.items()]})
    return {"capability": list(capability), "shapes": measured}
