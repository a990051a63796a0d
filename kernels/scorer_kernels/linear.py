"""Launches the head's Triton kernels on CUDA tensors (on CPU ones under TRITON_INTERPRET=1, for tests).

Triton is imported by the first call. The sizes of tiles come from table.py; nothing is searched for at run time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .checks import check_head, check_targets
from .table import Config, config_for, plan

# Rows of a program of the merging kernels, and words depth of a step of its targets' products.
MERGE_ROWS, MERGE_DEPTH = 16, 128


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """What `nll_head` says, by Triton: logits stay in registers, and no gradient flows. The same bits every time.

    The last dimensions of `hidden`, `weight`, `targets` and `bias` are contiguous. `config` overrides the table's.
    Extra memory is 8 bytes for a row and a split of the vocabulary, of which there are more than a few only where rows
    are few. (Online softmax: Milakov and Gimelshein, arXiv 1805.02867.)
    """
    return _launch(hidden, weight, targets, bias, scale, softcap, vocab_size, 0, config, False)


def linear_nll_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    config: Config | None = None,
) -> torch.Tensor:
    """One slice's share of `linear_nll`, for tensor parallel heads: float32 [3, N], for `merge_partials`.

    `weight` and `bias` are words `vocab_start` and on of the vocabulary, of which `vocab_size` counts (all unless
    given); `targets` are of the whole vocabulary. The three are the largest logit, the sum of exp(logit - largest), and
    the target's logit, or NaN where the target is not in this slice.
    """
    assert vocab_start >= 0, f"vocab_start is at least 0, not {vocab_start}"
    return _launch(hidden, weight, targets, bias, scale, softcap, vocab_size, vocab_start, config, True)


def merge_partials(partials: torch.Tensor) -> torch.Tensor:
    """`linear_nll`, float32 [N], of the stacked partials of the vocabulary's slices, float32 [P, 3, N], contiguous.

    A target that no slice has gives NaN.
    """
    from .linear_kernels import merge_kernel

    assert partials.ndim == 3, f"partials is [P, 3, N], not {tuple(partials.shape)}"
    assert partials.shape[1] == 3, f"partials is [P, 3, N], not {tuple(partials.shape)}"
    assert partials.dtype == torch.float32, f"partials is float32, not {partials.dtype}"
    assert partials.is_contiguous(), "partials is contiguous"
    parts, _, rows = partials.shape
    out = torch.empty(rows, dtype=torch.float32, device=partials.device)
    if rows:
        with on_device(partials):
            merge_kernel[(-(-rows // 128),)](partials, out, rows, parts, BLOCK=128, enable_fp_fusion=True)
    return out


def _launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    vocab_start: int,
    config: Config | None,
    partial: bool,
) -> torch.Tensor:
    from .linear_kernels import INTERPRETED, finish_kernel, head_kernel

    words = check_head(hidden, weight, targets, bias, softcap, vocab_size)
    if not partial:
        check_targets(targets, words)
    rows, depth = hidden.shape
    device = hidden.device
    out = torch.empty((3, rows) if partial else rows, dtype=torch.float32, device=device)
    if rows == 0:
        return out
    capability, slots = _chip(device)
    config = config or config_for(capability, hidden.element_size(), depth, words)
    cut = plan(rows, depth, words, hidden.element_size(), config, slots)
    partials = torch.empty(cut.splits, 2, rows, dtype=torch.float32, device=device)
    shared: dict[str, Any] = {
        "DEPTH": depth,
        "HAS_SCALE": scale != 1.0,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "enable_fp_fusion": True,
    }
    b = weight if bias is None else bias  # not read where there is none
    cap = 1.0 if softcap is None else softcap
    assert hidden.stride(1) == 1 or depth == 1, f"rows of hidden are contiguous, not of stride {hidden.stride(1)}"
    assert weight.stride(1) == 1 or depth == 1, f"rows of weight are contiguous, not of stride {weight.stride(1)}"
    assert targets.is_contiguous(), "targets is contiguous"
    assert bias is None or bias.is_contiguous(), "bias is contiguous"
    with on_device(hidden):
        head_kernel[(cut.row_blocks * cut.splits,)](
            hidden,
            weight,
            b,
            partials,
            rows,
            words,
            hidden.stride(0),
            weight.stride(0),
            cut.group,
            cut.splits,
            cut.tiles_per_split,
            scale,
            cap,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            WIDEN=INTERPRETED and hidden.dtype == torch.bfloat16,  # the interpreter would multiply their bits
            num_warps=config.warps,
            num_stages=config.stages,
            **shared,
        )
        finish_kernel[(-(-rows // MERGE_ROWS),)](
            hidden,
            weight,
            targets,
            b,
            partials,
            out,
            rows,
            words,
            vocab_start,
            hidden.stride(0),
            weight.stride(0),
            cut.splits,
            scale,
            cap,
            BLOCK=MERGE_ROWS,
            BLOCK_K=MERGE_DEPTH,
            PARTIALS=partial,
            **shared,
        )
    return out


def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; for the interpreter, which has neither, a few to split the vocabulary."""
    if device.type != "cuda":
        return (0, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes a CUDA tensor's device the current one, where Triton launches. The interpreter takes the CPU's too."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    from .linear_kernels import INTERPRETED

    if not (INTERPRETED and tensor.device.type == "cpu"):
        raise ValueError(f"Triton takes CUDA tensors, not {tensor.device}'s; nll_head takes both")
    return nullcontext()
