"""The head of a language model as one value, and the contract that every function over it shares.

Checks read metadata only; in debug mode (SCORER_KERNELS_DEBUG=1) also the targets, which waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_range(name: str, values: torch.Tensor, end: int, where: str) -> None:
    """In debug mode, raise IndexError unless all `values` are in `where`, 0 to `end` (exclusive)."""
    if os.environ.get("SCORER_KERNELS_DEBUG", "0") not in ("", "0") and values.numel():
        low, high = (int(bound) for bound in torch.aminmax(values))
        if low < 0 or high >= end:
            raise IndexError(f"{name} reach from {low} to {high}, outside {where}")


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The projection from hidden states to logits: x = softcap * tanh((scale * hidden @ weight.T + bias) / softcap).

    A function of this package takes `hidden` [N, D], a head and `targets` [N], and returns -log softmax(x)[target] in
    nats, float32 [N], summed in float32 or better. No gradient flows.

    weight: [V, D], float32, bfloat16 or float16; `hidden` has the same dtype.
    bias: [V] in any of these dtypes, or None.
    softcap: above 0; None leaves the tanh out.
    vocab_size: rows of `weight` and `bias` that are vocabulary, the first ones; the rest is padding. None: all V.
    vocab_start: the token id of the first row. Above 0, the head is a slice of a vocabulary and gives partials only.

    `targets` is int64 and holds ids of the whole vocabulary. A target outside gives NaN, or in debug mode IndexError.
    All tensors are on one device, with a contiguous last dimension on CUDA. Any other shape, dtype, device or layout
    raises AssertionError.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    vocab_start: int = 0

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        assert weight.ndim == 2, f"weight is [V, D], not {tuple(weight.shape)}"
        assert weight.dtype in DTYPES, f"weight is float32, bfloat16 or float16, not {weight.dtype}"
        if bias is not None:
            assert bias.shape == weight.shape[:1], f"bias is [{len(weight)}], not {tuple(bias.shape)}"
            assert bias.dtype in DTYPES, f"bias is float32, bfloat16 or float16, not {bias.dtype}"
            assert bias.device == weight.device, f"bias is on {weight.device}, not {bias.device}"
        assert self.softcap is None or self.softcap > 0, f"softcap is above 0, or None, not {self.softcap}"
        assert 1 <= self.size <= len(weight), f"vocab_size is 1 to {len(weight)}, not {self.size}"
        assert self.vocab_start >= 0, f"vocab_start is at least 0, not {self.vocab_start}"

    @property
    def size(self) -> int:
        """Rows of `weight` that are vocabulary."""
        return len(self.weight) if self.vocab_size is None else self.vocab_size

    def check(self, hidden: torch.Tensor, targets: torch.Tensor) -> None:
        """Assert that `hidden` and `targets` are as documented."""
        weight = self.weight
        assert hidden.ndim == 2, f"hidden is [N, D], not {tuple(hidden.shape)}"
        assert hidden.shape[1] == weight.shape[1], f"hidden is [N, {weight.shape[1]}], not {tuple(hidden.shape)}"
        assert hidden.dtype == weight.dtype, f"hidden is {weight.dtype} as weight is, not {hidden.dtype}"
        assert targets.shape == hidden.shape[:1], f"targets is [{len(hidden)}], not {tuple(targets.shape)}"
        assert targets.dtype == torch.int64, f"targets is int64, not {targets.dtype}"
        assert hidden.device == targets.device == weight.device, (
            f"hidden, weight and targets on one device, not {hidden.device}, {weight.device}, {targets.device}"
        )

    def check_whole(self, targets: torch.Tensor) -> None:
        """Assert that this is no slice; in debug mode, raise IndexError for a target outside the vocabulary."""
        assert self.vocab_start == 0, f"vocab_start is 0, not {self.vocab_start}: a slice gives partials only"
        check_range("targets", targets, self.size, f"the vocabulary's 0 to {self.size - 1}")


# Computes NLLs, float32 [N], from hidden states [N, D], a head and targets [N].
HeadFunction = Callable[[torch.Tensor, Head, torch.Tensor], torch.Tensor]
