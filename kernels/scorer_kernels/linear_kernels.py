# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"
"""The head's Triton kernels; linear.py launches them.

No atomics: every number has one writer and one order of summation, so the same input gives the same bits. An argument
`bias`, `scale` or `softcap` that is None is a constant to the compiler, and its step is left out.

With TMA, `hidden` and `weight` of head_kernel are tensor descriptors, whose loads give zeros past the ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton reads the setting when it makes the kernels below; later changes have no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret

# exp2(x * LOG2_E - shift) is two instructions; exp(x - shift) is six, three of them to keep results below 1e-38.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """tanh, to two units in the last place of float32. Triton's own is a library call, which the interpreter lacks."""
    square = x * x
    series = ((0.0164587588 * square - 0.0526841435) * square + 0.1332094189) * square - 0.333329575
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _shift_of(highest):
    """The number to subtract before exp or exp2: the largest, or 0 where all are -inf."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _transform(x, bias, scale, softcap):
    """softcap * tanh((scale * x + bias) / softcap), with a `bias` that broadcasts."""
    if scale is not None:
        x *= scale
    if bias is not None:
        x += bias
    if softcap is not None:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _add_tile(highest, total, start, operands, head, options: tl.constexpr, TAIL: tl.constexpr):
    """(max, sum of exp2(x - max)) with the token ids from `start` on added; in TAIL, the tile runs past the end.

    Both are of logits times log2(e), where those below -2e38 become -inf. `hidden` is a descriptor, or pointers to the
    rows of the block.
    """
    hidden, weight, bias, first_row = operands
    vocab_size, weight_stride, scale, softcap = head
    HIDDEN_SIZE, BLOCK_M, BLOCK_N, BLOCK_K, TMA, WIDEN = options
    offs_n = tl.arange(0, BLOCK_N)
    if TAIL:  # ids past the end read the last row, and are masked below
        offs_n = tl.minimum(offs_n, vocab_size - 1 - start)
    offs_k = tl.arange(0, BLOCK_K)
    if not TMA:
        weight += tl.cast(start, tl.int64) * weight_stride + (offs_n[None, :] * weight_stride + offs_k[:, None])
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, HIDDEN_SIZE, BLOCK_K):
        if TMA:
            h = hidden.load([first_row, k])
            w = weight.load([start, k]).T
        elif HIDDEN_SIZE % BLOCK_K == 0:
            h = tl.load(hidden + k)
            w = tl.load(weight + k)
        else:
            h = tl.load(hidden + k, mask=offs_k[None, :] < HIDDEN_SIZE - k, other=0.0)
            w = tl.load(weight + k, mask=offs_k[:, None] < HIDDEN_SIZE - k, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision="ieee")
    b = None
    if bias is not None:
        b = tl.load(bias + start + offs_n).to(tl.float32)[None, :]
    x = _transform(x, b, scale, softcap)
    if TAIL:
        x = tl.where((tl.arange(0, BLOCK_N) < vocab_size - start)[None, :], x, -float("inf"))
    higher = tl.maximum(highest, tl.max(x, 1) * LOG2_E)
    shift = _shift_of(higher)
    return higher, total * tl.exp2(highest - shift) + tl.sum(tl.exp2(x * LOG2_E - shift[:, None]), 1)


# Sizes that change from batch to batch are not specialised on, or every residue of N would compile a kernel.
@triton.jit(do_not_specialize=["rows", "vocab_size", "group", "splits", "tiles_per_split"])
def head_kernel(
    hidden,
    weight,
    bias,
    partials,
    rows,
    vocab_size,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    group,
    splits,
    tiles_per_split,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(max, sum of exp(x - max)) of a block of rows over a split of the vocabulary: float32 [splits, 2, rows].

    Programs are ordered by group of `group` row blocks, split, then row block.
    """
    programs = group * splits
    first_block = tl.program_id(0) // programs * group
    blocks = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_block, group)
    split = tl.program_id(0) % programs // blocks
    first_row = (first_block + tl.program_id(0) % programs % blocks) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    if not TMA:  # rows past the end read the last one: no mask in the inner loop
        near = tl.minimum(row, rows - 1).to(tl.int64)
        hidden += near[:, None] * hidden_stride + tl.arange(0, BLOCK_K)[None, :]
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab_size, BLOCK_N))
    operands = (hidden, weight, bias, first_row)
    head = (vocab_size, weight_stride, scale, softcap)
    options: tl.constexpr = (HIDDEN_SIZE, BLOCK_M, BLOCK_N, BLOCK_K, TMA, WIDEN)
    # Flattened: the loads of the next tile are in flight while this one's exponentials are summed.
    for tile in tl.range(first, tl.minimum(last, vocab_size // BLOCK_N), flatten=True):
        highest, total = _add_tile(highest, total, tile * BLOCK_N, operands, head, options, TAIL=False)
    if last * BLOCK_N > vocab_size:
        highest, total = _add_tile(highest, total, (last - 1) * BLOCK_N, operands, head, options, TAIL=True)
    out = partials + split.to(tl.int64) * 2 * rows + row
    tl.store(out, tl.div_rn(highest, LOG2_E), mask=row < rows)
    tl.store(out + rows, total, mask=row < rows)


@triton.jit
def _merge(partials, row, rows, parts, part_stride, BLOCK: tl.constexpr):
    """(max, sum of exp(x - max)) of `parts` such pairs."""
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        at = partials + part * part_stride + row
        here = tl.load(at, mask=row < rows, other=0.0)
        here_total = tl.load(at + rows, mask=row < rows, other=0.0)
        higher = tl.maximum(highest, here)
        shift = _shift_of(higher)
        total = total * tl.exp(highest - shift) + here_total * tl.exp(here - shift)
        highest = higher
    return highest, total


@triton.jit
def _nll(highest, total, logit):
    """The NLL, cut at 0: rounding may give less, since the target's logit is summed in another order than the rest.

    Where no token is possible, total is 0 and the NLL stays infinite or NaN.
    """
    nll = (highest - logit) + tl.log(total)
    return tl.where((nll < 0.0) & (total > 0.0), 0.0, nll)


@triton.jit(do_not_specialize=["rows", "vocab_size", "vocab_start", "splits"])
def finish_kernel(
    hidden,
    weight,
    bias,
    partials,
    rows,
    vocab_size,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    targets,
    out,
    vocab_start,
    splits,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Merges the splits, and computes the targets' logits by products of their own, which read 2 * D numbers a row.

    `out` is the NLLs, float32 [rows], or with PARTIALS (max, sum, target logit or NaN), float32 [3, rows].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1) - vocab_start
    known = (target >= 0) & (target < vocab_size)
    offs_k = tl.arange(0, BLOCK_K)
    h_tile = hidden + row.to(tl.int64)[:, None] * hidden_stride + offs_k[None, :]
    w_tile = weight + tl.where(known, target, 0)[:, None] * weight_stride + offs_k[None, :]
    products = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for k in range(0, HIDDEN_SIZE, BLOCK_K):
        mask = known[:, None] & (offs_k[None, :] < HIDDEN_SIZE - k)
        h = tl.load(h_tile + k, mask=mask, other=0.0).to(tl.float32)
        products += h * tl.load(w_tile + k, mask=mask, other=0.0).to(tl.float32)
    b = None
    if bias is not None:
        b = tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    logit = _transform(tl.sum(products, 1), b, scale, softcap)
    logit = tl.where(known, logit, float("nan"))
    wide = rows.to(tl.int64)
    highest, total = _merge(partials, row, wide, splits, 2 * wide, BLOCK)
    if PARTIALS:
        tl.store(out + row, highest, mask=inside)
        tl.store(out + wide + row, total, mask=inside)
        tl.store(out + 2 * wide + row, logit, mask=inside)
    else:
        tl.store(out + row, _nll(highest, total, logit), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(partials, out, rows, parts, BLOCK: tl.constexpr):
    """The NLLs, float32 [rows], of partials, float32 [parts, 3, rows]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wide = rows.to(tl.int64)
    highest, total = _merge(partials, row, wide, parts, 3 * wide, BLOCK)
    logit = tl.full([BLOCK], float("nan"), tl.float32)
    for part in range(parts):
        here = tl.load(partials + (part * 3 + 2) * wide + row, mask=inside, other=0.0)
        logit = tl.where(here == here, here, logit)
    tl.store(out + row, _nll(highest, total, logit), mask=inside)
