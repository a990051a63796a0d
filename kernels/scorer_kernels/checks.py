"""What every entry point asks of its tensors, said once: shapes, dtypes, devices, targets.

Looks at metadata only, but in debug mode, where it also reads the targets (which waits for the device).
"""

from __future__ import annotations

import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def debugging() -> bool:
    """Whether SCORER_KERNELS_DEBUG is set to anything but 0: targets are then read and checked before a launch."""
    return os.environ.get("SCORER_KERNELS_DEBUG", "0") not in ("", "0")


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    vocab_size: int | None,
) -> int:
    """Assert what `nll_head` documents, and return how many rows of `weight` are vocabulary."""
    assert hidden.ndim == 2, f"hidden is [N, D], not {tuple(hidden.shape)}"
    assert weight.ndim == 2, f"weight is [V, D], not {tuple(weight.shape)}"
    assert weight.shape[1] == hidden.shape[1], f"weight is [V, {hidden.shape[1]}], not {tuple(weight.shape)}"
    assert targets.shape == hidden.shape[:1], f"targets is [{hidden.shape[0]}], not {tuple(targets.shape)}"
    assert hidden.dtype in DTYPES, f"hidden is float32, bfloat16 or float16, not {hidden.dtype}"
    assert weight.dtype == hidden.dtype, f"weight is {hidden.dtype} as hidden is, not {weight.dtype}"
    assert targets.dtype == torch.int64, f"targets is int64, not {targets.dtype}"
    assert weight.device == targets.device == hidden.device, (
        f"hidden, weight and targets on one device, not {hidden.device}, {weight.device}, {targets.device}"
    )
    if bias is not None:
        assert bias.shape == weight.shape[:1], f"bias is [{weight.shape[0]}], not {tuple(bias.shape)}"
        assert bias.dtype in DTYPES, f"bias is float32, bfloat16 or float16, not {bias.dtype}"
        assert bias.device == hidden.device, f"bias is on {hidden.device}, not {bias.device}"
    assert softcap is None or softcap > 0, f"softcap is above 0, or None, not {softcap}"
    words = weight.shape[0] if vocab_size is None else vocab_size
    assert 1 <= words <= weight.shape[0], f"vocab_size is 1 to {weight.shape[0]}, not {words}"
    return words


def check_targets(targets: torch.Tensor, words: int) -> None:
    """In debug mode, raise IndexError unless all targets are in 0 ... `words` - 1."""
    if debugging() and targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= words:
            raise IndexError(f"targets reach from {low} to {high}, outside the vocabulary's 0 to {words - 1}")
