"""Tile sizes by device, dtype and shape, as data, and how a head is cut into programs. `python -m bench tune` measures.

Knows neither Triton nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """One way to compile the head: a program's rows, words and depth of a tile, its warps, and the loads in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Row:
    """`config` is for this compute capability, inputs of `itemsize` bytes, and D and V up to these."""

    capability: tuple[int, int]
    itemsize: int
    max_depth: int
    max_words: int
    config: Config


ANY = 1 << 31

# The first row that fits is taken. None of these is measured yet: they are what the chips' sizes ask for. A wgmma of
# 128 x 256 has the accumulators of 128 registers a thread and the least traffic a product; its tiles of 64 words depth
# are 48 KiB a stage, of 227 KiB of shared memory a multiprocessor (163 KiB on sm_80). Float32 has no tensor cores that
# round as float32 does, so its tiles are those of plain multiply-adds.
TABLE = (
    Row((8, 0), 2, ANY, ANY, Config(128, 256, 64, warps=8, stages=3)),
    Row((9, 0), 2, ANY, ANY, Config(128, 256, 64, warps=8, stages=4)),
    Row((10, 0), 2, ANY, ANY, Config(128, 256, 64, warps=8, stages=4)),
    Row((8, 0), 4, ANY, ANY, Config(64, 64, 32, warps=4, stages=3)),
    Row((9, 0), 4, ANY, ANY, Config(64, 64, 32, warps=4, stages=3)),
    Row((10, 0), 4, ANY, ANY, Config(64, 64, 32, warps=4, stages=3)),
)

# What `bench tune` tries for 16-bit inputs, beside the rows above. 128 x 128 with 4 warps fits a multiprocessor twice,
# so that one's exponentials hide behind the other's products.
CANDIDATES = (
    Config(128, 256, 64, warps=8, stages=3),
    Config(256, 128, 64, warps=8, stages=4),
    Config(128, 128, 64, warps=4, stages=3),
    Config(128, 128, 64, warps=8, stages=4),
    Config(64, 256, 64, warps=4, stages=3),
)

# For chips that the table does not name: within the 64 KiB of shared memory that all since sm_75 have.
FALLBACK = {2: Config(64, 128, 32, warps=4, stages=3), 4: Config(64, 64, 16, warps=4, stages=3)}

# The part of the L2 cache (50 MB on an H100, 40 on an A100) for the hidden states that programs at work read again for
# every tile of words.
L2_BYTES = 16 << 20


def config_for(capability: tuple[int, int], itemsize: int, depth: int, words: int) -> Config:
    """The table's configuration, or the one for unknown chips.

    Also where rows are not of a multiple of 16 numbers: their loads go by ones, and large tiles spill registers.
    """
    if depth % 16:
        return FALLBACK[itemsize]
    for row in TABLE:
        fits = depth <= row.max_depth and words <= row.max_words
        if fits and row.capability == capability and row.itemsize == itemsize:
            return row.config
    return FALLBACK[itemsize]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the grid covers rows x words: program i belongs to row block, then split, then group of row blocks.

    Programs that run at the same time are `group` row blocks of hidden states, which stay in L2, by the splits of the
    vocabulary, whose tiles they pass through in step.
    """

    row_blocks: int
    group: int
    splits: int
    tiles_per_split: int


def plan(rows: int, depth: int, words: int, itemsize: int, config: Config, slots: int) -> Plan:
    """The plan with the least time, in tiles of the longest chain of programs, on `slots` multiprocessors.

    A program costs about half a tile beside its tiles, to start, to fill its pipeline and to write.
    """
    row_blocks = -(-rows // config.block_m)
    tiles = -(-words // config.block_n)
    group = min(row_blocks, max(1, L2_BYTES // (config.block_m * depth * itemsize)))
    fewest = min(tiles, -(-slots // group) if row_blocks > group else 1)
    best = (float("inf"), 0)
    for splits in range(fewest, min(tiles, max(fewest, slots)) + 1):
        waves = -(-row_blocks * splits // slots)
        per_split = -(-tiles // splits)
        best = min(best, (waves * (per_split + 0.5), splits))
    per_split = -(-tiles // best[1])
    return Plan(row_blocks, group, -(-tiles // per_split), per_split)
