"""The Triton kernels against float64, on ragged shapes: 16-bit types and float32, every option, tiles by both ways.

A kernel's error may be half as much again as eager torch's in the same dtype. Memory is NaN before a kernel runs. With
`tiny` the kernels are interpreted on a CPU, which TRITON_INTERPRET=1 asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from scorer_kernels import Head, linear_nll, linear_nll_partials, merge_partials, sample_ifd, segment_nll
from scorer_kernels.reference import reference_ifd, reference_nll, reference_segment_nll
from scorer_kernels.table import Config, config_for

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.125},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.125, "softcap": 3.0},
}
SMALL = Config(16, 32, 16, warps=4, stages=2)
PADDING = 5  # rows of NaN after the vocabulary


@dataclass(frozen=True, slots=True)
class Case:
    """A head to compute: its sizes, dtype and configuration, and a key of OPTIONS."""

    rows: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    config: Config
    options: str = "plain"

    def __str__(self) -> str:
        sizes = f"[{self.rows}, {self.hidden_size}, {self.vocab_size}]"
        loads = "TMA" if self.config.tma else "pointers"
        return f"{str(self.dtype).removeprefix('torch.')} {sizes} {self.options}, {loads}"


def cases(tiny: bool) -> Iterator[Case]:
    """Each hidden size, dtype, configuration and set of options is a compilation of some seconds on a GPU."""
    if tiny:
        for config in (SMALL, replace(SMALL, tma=True)):
            yield from (Case(19, 24, 70, dtype, config, "all") for dtype in (FLOAT16, BFLOAT16, FLOAT32))
        return
    for dtype, hidden_size, options in (
        (BFLOAT16, 768, tuple(OPTIONS)),
        (FLOAT16, 768, ("plain", "all")),
        (FLOAT32, 768, ("plain", "all")),
        (BFLOAT16, 576, ("plain",)),
        (BFLOAT16, 100, ("plain",)),  # rows that TMA can't read
        (FLOAT32, 100, ("plain",)),
    ):
        usual = config_for(torch.cuda.get_device_capability(), dtype.itemsize, hidden_size)
        for config in dict.fromkeys((usual, replace(usual, tma=False))):
            for name in options:
                yield Case(1000, hidden_size, 50257, dtype, config, name)
            yield Case(1, hidden_size, 50257, dtype, config)
            yield Case(37, hidden_size, 1003, dtype, config)


def run(tiny: bool) -> dict[str, Any]:
    """Check and print; returns the report."""
    from triton.errors import TritonError

    console, found = Console(stderr=True), {}
    device = "cpu" if tiny else "cuda"
    checks: dict[str, Callable[[], dict[str, Any]]] = {"sums of spans": partial(check_sums, device)}
    checks |= {str(case): partial(check, case, device) for case in cases(tiny)}
    for name, work in checks.items():
        try:
            found[name] = work()
        except (RuntimeError, TritonError) as error:  # it does not compile or run; the others are worth knowing
            found[name] = {"right": False, "message": str(error)[:2000]}
        console.print(f"{name}: {'right' if found[name]['right'] else found[name]}")
    return {"device": device, "kernels": found, "wrong": [name for name, own in found.items() if not own["right"]]}


def check(case: Case, device: str) -> dict[str, Any]:
    """The largest error of the whole head and of two slices of it that are merged, and whether bits repeat."""
    generator = torch.Generator(device).manual_seed(case.rows + case.hidden_size)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, generator=generator)

    hidden = (drawn(case.rows, case.hidden_size) * 2 / case.hidden_size**0.5).to(case.dtype)
    weight = drawn(case.vocab_size + PADDING, case.hidden_size).to(case.dtype)
    weight[case.vocab_size :] = torch.nan
    options = dict(OPTIONS[case.options])
    if options.pop("bias", False):
        options["bias"] = drawn(len(weight)).to(case.dtype)
    head = Head(weight, vocab_size=case.vocab_size, **options)
    targets = torch.randint(case.vocab_size, (case.rows,), device=device, generator=generator)
    exact = reference_nll(hidden, head, targets)
    allowed = 1.5 * float((reference_nll(hidden, head, targets, case.dtype) - exact).abs().max()) + 1e-6
    with_nan = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        ours, again = (linear_nll(hidden, head, targets, config=case.config) for _ in range(2))
        parts = [linear_nll_partials(hidden, part, targets, config=case.config) for part in _halves(head)]
    finally:
        torch.use_deterministic_algorithms(with_nan)
    merged = merge_partials(torch.stack(parts))
    errors = {name: float((nll - exact).abs().max()) for name, nll in (("error", ours), ("error_of_parts", merged))}
    same = ours.equal(again)
    right = same and all(error <= allowed for error in errors.values())
    return {"right": right, **errors, "allowed": allowed, "same_bits_again": same}


def _halves(head: Head) -> Iterator[Head]:
    """The two slices of a head's vocabulary; TMA reads both, since each begins at a whole row."""
    middle = head.size // 2
    for start, end in ((0, middle), (middle, head.size)):
        bias = None if head.bias is None else head.bias[start:end]
        yield replace(head, weight=head.weight[start:end], bias=bias, vocab_size=None, vocab_start=start)


def check_sums(device: str) -> dict[str, Any]:
    """Sums of spans and samples' IFD; an empty span among them."""
    nll = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 7, 7, 135, 136, 600, 1000])
    spans = torch.stack((offsets[:-1], offsets[1:]), 1)
    conditioned, alone = spans, spans.flip(0)
    sums, counts = (x.cpu() for x in segment_nll(nll.to(device), offsets.to(device)))
    ifd = sample_ifd(nll.to(device), conditioned.to(device), alone.contiguous().to(device)).ifd.cpu().double()
    exact, lengths = reference_segment_nll(nll, offsets)
    relative = float(((sums - exact).abs() / exact.clamp(min=1)).max())
    near = ifd.allclose(reference_ifd(nll, conditioned, alone), rtol=1e-5, atol=0, equal_nan=True)
    right = relative < 1e-12 and counts.equal(lengths) and near
    return {"right": right, "error": relative}
