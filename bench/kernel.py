"""The fused head against eager torch, chunked products, torch.compile and two published kernels.

Every rival is checked against float64 before it is timed. Without a GPU the CPU path is measured, on fewer rows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scorer_kernels import Head, HeadFunction, linear_nll, nll_head
from scorer_kernels.reference import reference_nll
from scorer_kernels.table import CANDIDATES, Config, config_for

CHUNK_ROWS = 4096
CHECKED_ROWS = 256
CPU_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one head's product."""

    name: str
    rows: int
    hidden_size: int
    vocab_size: int

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.hidden_size * self.vocab_size


SHAPES = (
    Shape("GPT-2, 16k rows", 16384, 768, 50257),
    Shape("GPT-2, 64k rows", 65536, 768, 50257),
    Shape("SmolLM2-135M", 16384, 576, 49152),
    Shape("OPT-350M", 16384, 512, 50272),
    Shape("Qwen2.5-0.5B", 16384, 896, 151936),
    Shape("LLaMA-7B", 16384, 4096, 32000),
)
TINY = Shape("tiny", 32, 48, 100)


def eager(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once: product, log_softmax, gather."""
    return -(hidden @ head.weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def unblocked(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """One product, and the log-sum-exp of its float32 copy."""
    logits = (hidden @ head.weight.T).float()
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]


def chunked(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, function: HeadFunction = unblocked
) -> torch.Tensor:
    """`function` over CHUNK_ROWS rows at a time, which bounds the memory of the logits."""
    chunks = zip(torch.split(hidden, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True)
    return torch.cat([function(h, head, t) for h, t in chunks])


def liger(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Liger's kernel: chunks of logits."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    loss: torch.Tensor = fused_linear_cross_entropy_forward(
        hidden, head.weight, targets, reduction="none", compute_gradients=False
    )[0]
    return loss


def cut(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Apple's kernel, which fuses as ours does."""
    from cut_cross_entropy import linear_cross_entropy

    loss: torch.Tensor = linear_cross_entropy(hidden, head.weight, targets, reduction="none")
    return loss


PUBLISHED: dict[str, tuple[str, HeadFunction]] = {  # for GPUs: the module that it needs, of the extra `bench`
    "Liger": ("liger_kernel", liger),
    "cut-cross-entropy": ("cut_cross_entropy", cut),
}


def rivals(device: str) -> dict[str, HeadFunction]:
    """The rivals that this device has, and that are installed."""
    if device == "cpu":
        return {"scorer": nll_head, "eager": eager, "unblocked": unblocked}
    return {
        "scorer": nll_head,
        "eager": eager,
        "chunked cuBLAS": chunked,
        "chunked, compiled": partial(chunked, function=torch.compile(unblocked)),
        **{name: function for name, (module, function) in PUBLISHED.items() if find_spec(module)},
    }


def run(milliseconds: int, tiny: bool = False) -> dict[str, Any]:
    """Measure every shape and rival, and print; returns the report. tiny: only try it, on TINY."""
    console = Console(stderr=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes: tuple[Shape, ...] = SHAPES
    if tiny:
        shapes = (TINY,)
    elif device == "cpu":
        console.print(f"no GPU: the CPU path is measured, on {CPU_ROWS:,} rows a shape")
        shapes = tuple(replace(shape, rows=CPU_ROWS) for shape in SHAPES if shape.rows == SHAPES[0].rows)
    functions = rivals(device)
    left_out = {name: "not installed" for name in PUBLISHED if device == "cuda" and name not in functions}
    ceiling, copy = _ceiling(device, milliseconds, tiny), _copy_rate(device, milliseconds, tiny)
    console.print(f"bfloat16 matrix ceiling: {ceiling / 1e12:,.2f} TFLOP/s; copy: {copy / 1e9:,.0f} GB/s")
    for name, why in left_out.items():
        console.print(f"{name} is left out: {why}")
    measured = []
    for shape in shapes:
        figures = _measure(shape, functions, device, milliseconds)
        for own in figures.values():
            if "flop_per_second" in own:
                own["fraction_of_ceiling"] = own["flop_per_second"] / ceiling
        _show(console, shape, figures)
        product = _product_seconds(shape, device, milliseconds) * 1e3  # without softmax
        measured.append({**asdict(shape), "product_milliseconds": product, "rivals": figures})
    return {
        "device": device,
        "dtype": "bfloat16",
        "ceiling_flop_per_second": ceiling,
        "copy_bytes_per_second": copy,  # read and written
        "left_out": left_out,
        "shapes": measured,
    }


def _measure(
    shape: Shape, functions: dict[str, HeadFunction], device: str, milliseconds: int
) -> dict[str, dict[str, Any]]:
    """The figures of each rival; a wrong one has its error only."""
    hidden, head, targets = inputs(shape, device)
    checked = (hidden[:CHECKED_ROWS], head, targets[:CHECKED_ROWS])
    oracle = reference_nll(*checked)
    allowed = 1.5 * float((eager(*checked) - oracle).abs().max()) + 1e-6
    figures: dict[str, dict[str, Any]] = {}
    for name, function in functions.items():
        work = partial(function, hidden, head, targets)
        try:
            with torch.inference_mode():
                error = float((work()[:CHECKED_ROWS] - oracle).abs().max())
                if not error <= allowed:
                    figures[name] = {"wrong_by": error, "allowed": allowed}
                    continue
                extra = _extra_memory(work, device)
                seconds = median_seconds(work, device, milliseconds)
        except torch.OutOfMemoryError:
            figures[name] = {"out_of_memory": True}
            continue
        figures[name] = {
            "milliseconds": seconds * 1e3,
            "flop_per_second": shape.flop / seconds,
            "largest_error": error,
            "extra_bytes": extra,
            "logits_bytes": 2 * shape.rows * shape.vocab_size,
        }
    return figures


def _show(console: Console, shape: Shape, rivals: dict[str, dict[str, Any]]) -> None:
    sizes = f"[{shape.rows}, {shape.hidden_size}, {shape.vocab_size}]"
    table = Table(f"{shape.name} {sizes}", "ms", "TFLOP/s", "of ceiling", "MiB")
    for name, figures in rivals.items():
        if "milliseconds" not in figures:
            wrong = figures.get("wrong_by")
            table.add_row(name, "out of memory" if wrong is None else f"wrong by {wrong:.1e}")
            continue
        extra = figures["extra_bytes"]
        table.add_row(
            name,
            f"{figures['milliseconds']:,.2f}",
            f"{figures['flop_per_second'] / 1e12:,.2f}",
            f"{figures['fraction_of_ceiling']:.0%}",
            "" if extra is None else f"{extra / 2**20:,.1f}",
        )
    console.print(table)


def inputs(shape: Shape, device: str) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Random hidden states, head and targets, whose logits spread like a trained model's."""
    generator = torch.Generator(device).manual_seed(shape.rows + shape.hidden_size)
    hidden = torch.randn(shape.rows, shape.hidden_size, device=device, generator=generator)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device=device, generator=generator)
    weight *= 2.0 * shape.hidden_size**-0.5
    targets = torch.randint(shape.vocab_size, (shape.rows,), device=device, generator=generator)
    return hidden.bfloat16(), Head(weight.bfloat16()), targets


def median_seconds(work: Callable[[], object], device: str, milliseconds: int) -> float:
    """Median seconds of one call, from about `milliseconds` of calls after a warm-up."""
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


def _extra_memory(work: Callable[[], object], device: str) -> int | None:
    """Peak bytes beyond the inputs; None on CPU, where torch has no count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _ceiling(device: str, milliseconds: int, tiny: bool) -> float:
    side = 128 if tiny else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2.0 * side**3 / median_seconds(lambda: a @ b, device, milliseconds)


def _copy_rate(device: str, milliseconds: int, tiny: bool) -> float:
    size = 1 << (20 if tiny else 30)  # beyond any cache
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / median_seconds(lambda: target.copy_(source), device, milliseconds)


def _product_seconds(shape: Shape, device: str, milliseconds: int) -> float:
    hidden, head, _ = inputs(shape, device)
    return median_seconds(lambda: hidden @ head.weight.T, device, milliseconds)


def tune(milliseconds: int, names: Sequence[str] = (), tiny: bool = False) -> dict[str, Any]:
    """Check and time every configuration on every shape; scorer_kernels/table.py should hold the fastest.

    names: of the shapes; all of SHAPES if empty. tiny: only try it, on TINY and with kernels that are interpreted.
    """
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    console = Console(stderr=True)
    capability = (0, 0) if tiny else torch.cuda.get_device_capability()
    candidates = [config for config in CANDIDATES if capability >= (9, 0) or not config.tma]
    device, shapes = "cuda", [shape for shape in SHAPES if not names or shape.name in names]
    if tiny:
        device, shapes, candidates = "cpu", [TINY], [Config(16, 32, 16, warps=4, stages=2)]
    measured = []
    for shape in shapes:
        current = config_for(capability, 2, shape.hidden_size)
        configs = {str(config): config for config in (current, *candidates)}
        launches: dict[str, HeadFunction] = {
            name: partial(linear_nll, config=config) for name, config in configs.items()
        }
        figures = _measure(shape, launches, device, milliseconds)
        for name, own in sorted(figures.items(), key=lambda item: item[1].get("milliseconds", math.inf)):
            mark = "*" if configs[name] == current else " "
            found = str(own)  # why there is no time
            if "milliseconds" in own:
                found = f"{own['milliseconds']:8.3f} ms {own['flop_per_second'] / 1e12:6.1f} TFLOP/s"
            console.print(f"{mark} {shape.name}: {found} {name}")
        measured.append({**asdict(shape), "configs": [asdict(configs[name]) | own for name, own in figures.items()]})
    return {"capability": list(capability), "shapes": measured}
