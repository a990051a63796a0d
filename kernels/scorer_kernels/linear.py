"""Launches the head's Triton kernels on CUDA tensors (on CPU tensors under TRITON_INTERPRET=1, for tests).

Triton is imported by the first call. Tile sizes come from table.py; there is no autotuning at run time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .head import Head
from .table import Config, config_for, plan_grid

# Rows of a program of finish_kernel, and the slice of the hidden size that it multiplies at once.
FINISH_ROWS, FINISH_BLOCK_K = 16, 128
MERGE_ROWS = 128


def linear_nll(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, *, config: Config | None = None
) -> torch.Tensor:
    """`nll_head` in Triton: logits stay in registers. The same input gives the same bits. `config` overrides the table.

    Extra memory is 8 bytes a row and split of the vocabulary; there are more than a few splits only where rows are few.
    (Online softmax: Milakov and Gimelshein, arXiv 1805.02867.)
    """
    return _launch(hidden, head, targets, config, partial=False)


def linear_nll_partials(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, *, config: Config | None = None
) -> torch.Tensor:
    """`nll_partials` in Triton: largest logit, sum of exp(logit - largest), target's logit or NaN; float32 [3, N]."""
    return _launch(hidden, head, targets, config, partial=True)


def merge_partials(partials: torch.Tensor) -> torch.Tensor:
    """`merge_nll_partials` in Triton, of contiguous partials."""
    from .linear_kernels import merge_kernel

    assert partials.shape[1:-1] == (3,), f"partials is [P, 3, N], not {tuple(partials.shape)}"
    assert partials.dtype == torch.float32, f"partials is float32, not {partials.dtype}"
    assert partials.is_contiguous(), "partials is contiguous"
    parts, _, rows = partials.shape
    out = torch.empty(rows, dtype=torch.float32, device=partials.device)
    if rows:
        with on_device(partials):
            merge_kernel[(-(-rows // MERGE_ROWS),)](partials, out, rows, parts, BLOCK=MERGE_ROWS, enable_fp_fusion=True)
    return out


def _launch(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, config: Config | None, *, partial: bool
) -> torch.Tensor:
    from .linear_kernels import INTERPRETED, finish_kernel, head_kernel

    head.check(hidden, targets)
    if not partial:
        head.check_whole(targets)
    rows, hidden_size = hidden.shape
    weight, bias, itemsize = head.weight, head.bias, hidden.element_size()
    out = torch.empty((3, rows) if partial else rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return out
    capability, processors = _chip(hidden.device)
    config = config or config_for(capability, itemsize, hidden_size)
    grid = plan_grid(rows, hidden_size, head.size, itemsize, config, processors)
    partials = torch.empty(grid.splits, 2, rows, dtype=torch.float32, device=hidden.device)
    # None is a constant to Triton, which then compiles the step out.
    transform = (None if head.scale == 1.0 else head.scale, head.softcap)
    shared = (bias, partials, rows, head.size, hidden.stride(0), weight.stride(0), *transform)
    options: dict[str, Any] = {"HIDDEN_SIZE": hidden_size, "enable_fp_fusion": True}
    assert hidden.stride(1) == 1 or hidden_size == 1, f"hidden rows are contiguous, not of stride {hidden.stride(1)}"
    assert weight.stride(1) == 1 or hidden_size == 1, f"weight rows are contiguous, not of stride {weight.stride(1)}"
    assert targets.is_contiguous(), "targets is contiguous"
    assert bias is None or bias.is_contiguous(), "bias is contiguous"
    tma = config.tma and _tma_reads(hidden) and _tma_reads(weight)
    with on_device(hidden):
        head_kernel[(grid.row_blocks * grid.splits,)](
            *(_descriptors(hidden, weight, config) if tma else (hidden, weight)),
            *shared,
            grid.group,
            grid.splits,
            grid.tiles_per_split,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            TMA=tma,
            WIDEN=INTERPRETED and hidden.dtype == torch.bfloat16,  # the interpreter would multiply their bits
            num_warps=config.warps,
            num_stages=config.stages,
            **options,
        )
        finish_kernel[(-(-rows // FINISH_ROWS),)](
            hidden,
            weight,
            *shared,
            targets,
            out,
            head.vocab_start,
            grid.splits,
            BLOCK=FINISH_ROWS,
            BLOCK_K=FINISH_BLOCK_K,
            PARTIALS=partial,
            **options,
        )
    return out


def _tma_reads(matrix: torch.Tensor) -> bool:
    """Whether TMA can read a matrix: its rows are contiguous and begin 16 bytes, or a multiple, apart."""
    step = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and step > 0 and step % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptors(hidden: torch.Tensor, weight: torch.Tensor, config: Config) -> tuple[Any, Any]:
    """Tensor descriptors of both, by the configuration's tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; the interpreter, which has neither, gets 4 to split the vocabulary."""
    if device.type != "cuda":
        return (0, 0), 4
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make a CUDA tensor's device the current one, where Triton launches. The interpreter takes CPU tensors too."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    from .linear_kernels import INTERPRETED

    if not (INTERPRETED and tensor.device.type == "cpu"):
        raise ValueError(f"Triton takes CUDA tensors, not {tensor.device}'s; nll_head takes both")
    return nullcontext()
