# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"
"""The head's Triton kernels. They know nothing of torch or of devices; their launcher is linear.py.

No atomics: every number has one writer and one order of summation, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As it was when the kernels below were made, which is when it counts.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def _tanh(x):
    """tanh, to two units in the last place of float32. (Triton's is a library call, which the interpreter lacks.)"""
    square = x * x
    series = ((0.0164587588 * square - 0.0526841435) * square + 0.1332094189) * square - 0.333329575
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def _shift_of(highest):
    """What to subtract before exp: the largest logit, or 0 where all were -inf."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _transform(x, bias, scale, softcap, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh((scale * x + bias) / softcap), with a `bias` that broadcasts."""
    if HAS_SCALE:
        x *= scale
    if HAS_BIAS:
        x += bias
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _add_tile(
    highest,
    total,
    hidden_tile,
    weight,
    bias,
    start,
    words,
    weight_stride,
    scale,
    softcap,
    DEPTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(max, sum of exp less max) with the words from `start` on added; in TAIL, they run past the end."""
    word = tl.arange(0, BLOCK_N)
    if TAIL:  # words past the end are read as the last one, and cut off below
        word = tl.minimum(word, words - 1 - start)
    depth = tl.arange(0, BLOCK_K)
    weight_tile = weight + tl.cast(start, tl.int64) * weight_stride + (word[None, :] * weight_stride + depth[:, None])
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            h = tl.load(hidden_tile + k)
            w = tl.load(weight_tile + k)
        else:
            h = tl.load(hidden_tile + k, mask=depth[None, :] < DEPTH - k, other=0.0)
            w = tl.load(weight_tile + k, mask=depth[:, None] < DEPTH - k, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision="ieee")
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + start + word).to(tl.float32)[None, :]
    x = _transform(x, b, scale, softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)
    if TAIL:
        x = tl.where((tl.arange(0, BLOCK_N) < words - start)[None, :], x, -float("inf"))
    higher = tl.maximum(highest, tl.max(x, 1))
    shift = _shift_of(higher)
    return higher, total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)


# Sizes that change from batch to batch are not specialised on, or every residue of N would compile a kernel.
@triton.jit(do_not_specialize=["rows", "words", "group", "splits", "tiles_per_split"])
def head_kernel(
    hidden,
    weight,
    bias,
    partials,
    rows,
    words,
    hidden_stride,
    weight_stride,
    group,
    splits,
    tiles_per_split,
    scale,
    softcap,
    DEPTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(max, sum of exp less max) of a block of rows over a split of the vocabulary: float32 [splits, 2, rows].

    Programs go by row block, then by split, then by group of `group` row blocks.
    """
    programs = group * splits
    first_block = tl.program_id(0) // programs * group
    blocks = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_block, group)
    split = tl.program_id(0) % programs // blocks
    row = (first_block + tl.program_id(0) % programs % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end are read as the last one, which costs no mask in the inner loop.
    near = tl.minimum(row, rows - 1).to(tl.int64)
    hidden_tile = hidden + near[:, None] * hidden_stride + tl.arange(0, BLOCK_K)[None, :]
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(words, BLOCK_N))
    # Flattened: the loads of the next tile of words are in flight while this one's exponentials are summed.
    for tile in tl.range(first, tl.minimum(last, words // BLOCK_N), flatten=True):
        highest, total = _add_tile(
            highest,
            total,
            hidden_tile,
            weight,
            bias,
            tile * BLOCK_N,
            words,
            weight_stride,
            scale,
            softcap,
            DEPTH,
            HAS_SCALE,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            WIDEN,
            TAIL=False,
        )
    if last * BLOCK_N > words:
        highest, total = _add_tile(
            highest,
            total,
            hidden_tile,
            weight,
            bias,
            (last - 1) * BLOCK_N,
            words,
            weight_stride,
            scale,
            softcap,
            DEPTH,
            HAS_SCALE,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            WIDEN,
            TAIL=True,
        )
    out = partials + split.to(tl.int64) * 2 * rows + row
    tl.store(out, highest, mask=row < rows)
    tl.store(out + rows, total, mask=row < rows)


@triton.jit
def _merge(partials, row, rows, parts, part_stride, BLOCK: tl.constexpr):
    """(max, sum of exp less max) of `parts` of them."""
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
    """Never below 0, where rounding would have it: the target's logit is summed in another order than the others."""
    nll = (highest - logit) + tl.log(total)
    return tl.where(nll < 0.0, 0.0, nll)


@triton.jit(do_not_specialize=["rows", "words", "vocab_start", "splits"])
def finish_kernel(
    hidden,
    weight,
    targets,
    bias,
    partials,
    out,
    rows,
    words,
    vocab_start,
    hidden_stride,
    weight_stride,
    splits,
    scale,
    softcap,
    DEPTH: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Merges the splits, and takes the targets' logits by products of their own: two reads of D for a row, of V * D.

    `out` is the NLLs, float32 [rows], or with PARTIALS (max, sum, target logit or NaN), float32 [3, rows].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1) - vocab_start
    known = (target >= 0) & (target < words)
    depth = tl.arange(0, BLOCK_K)
    h_tile = hidden + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    w_tile = weight + tl.where(known, target, 0)[:, None] * weight_stride + depth[None, :]
    products = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        mask = known[:, None] & (depth[None, :] < DEPTH - k)
        h = tl.load(h_tile + k, mask=mask, other=0.0).to(tl.float32)
        products += h * tl.load(w_tile + k, mask=mask, other=0.0).to(tl.float32)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    logit = _transform(tl.sum(products, 1), b, scale, softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)
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
