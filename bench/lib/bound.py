"""The cost of a network's matrix products alone: their operations, and the best rate of this machine on them.

Reads the shapes of weights only, so that the network may be on the meta device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bench.lib.rows import Rows


def linears(model: Any) -> list[torch.Size]:
    """[out, in] of every weight of the backbone that multiplies a token."""
    head = model.get_output_embeddings()
    shapes = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if module is head or weight is None or weight.ndim != 2 or isinstance(module, torch.nn.Embedding):
            continue
        shapes.append(weight.shape)
    return shapes


def flop(model: Any, rows: Rows) -> float:
    """FLOP of the products for `rows`: the backbone's for every token, the head's for every scored token."""
    backbone = sum(shape.numel() for shape in linears(model))
    head = model.get_output_embeddings().weight.numel()
    return 2.0 * float(backbone * rows.tokens + head * rows.scored_tokens)


def product_rates(model: Any, dtype: str, device: str) -> dict[str, float]:
    """FLOP/s of matrix products: large square ones, and the model's own with 1,024 (CUDA: 16,384) tokens.

    On CPU, the better of two ways to use the cores: all on one product, or one product on each.
    """
    kind = getattr(torch, dtype)
    tokens = 1024 if device == "cpu" else 16384
    side = 2048 if device == "cpu" else 8192
    products = [(tokens, shape[1], shape[0]) for shape in linears(model)]
    seconds = {shape: _product_seconds(shape, kind, device) for shape in {*products, (side, side, side)}}
    return {
        "square": 2.0 * side**3 / seconds[side, side, side],
        "model_shapes": sum(2.0 * m * k * n for m, k, n in products) / sum(seconds[shape] for shape in products),
    }


def _product_seconds(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    times = max(3, int(2e10 / (2 * m * k * n))) if device == "cpu" else 30
    together = _seconds_each(lambda: torch.nn.functional.linear(a, b), times, device)
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        return together
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def alone() -> float:
                torch.set_num_threads(1)
                return _seconds_each(lambda: torch.nn.functional.linear(a, b), times, device)

            apart = statistics.mean(pool.map(lambda _: alone(), range(threads))) / threads
    finally:
        torch.set_num_threads(threads)
    return min(together, apart)


def _seconds_each(work: Callable[[], object], times: int, device: str) -> float:
    """Median seconds of one call after a warm-up."""
    work()
    took = []
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took)
