"""Tile sizes by device, dtype and shape, as data, and how the grid covers a head. `python -m bench tune` measures.

Knows neither Triton nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """Compile-time parameters of head_kernel: the tile's rows, vocabulary and hidden size, warps, pipeline stages.

    tma: load tiles by tensor descriptors (from sm_90 on) where the tensors' layouts allow, else by pointers.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """`config` is for this compute capability, inputs of `itemsize` bytes, and hidden sizes up to this."""

    capability: tuple[int, int]
    itemsize: int
    config: Config
    max_hidden_size: int = 1 << 31


# The first row that fits is taken. Measured on an H200, 2026-11-27, with a prototype of this kernel: both rows of sm_90
# for 16 bits, the first at 576 x 49,152 (SmolLM2-135M), where it was the fastest of those tried, and the second at
# 768 x 50,257 (GPT-2), 65,536 rows. The rows of sm_80 and sm_100, and those of float32, are not measured: they are what
# the chips' sizes ask for. A wgmma of 128 x 256 has accumulators of 128 registers a thread and the least traffic a
# product; its tiles of 64 hidden units are 48 KiB a stage, of 227 KiB of shared memory a multiprocessor (163 KiB on
# sm_80). Float32 has no tensor cores that round as float32 does, so its tiles are those of plain multiply-adds.
TABLE = (
    Row((8, 0), 2, Config(128, 256, 64, warps=8, stages=3)),
    Row((9, 0), 2, Config(256, 128, 64, warps=8, stages=3, tma=True), max_hidden_size=576),
    Row((9, 0), 2, Config(128, 256, 64, warps=8, stages=3, tma=True)),
    Row((10, 0), 2, Config(128, 256, 64, warps=8, stages=4, tma=True)),
    Row((8, 0), 4, Config(64, 64, 32, warps=4, stages=3)),
    Row((9, 0), 4, Config(64, 64, 32, warps=4, stages=3)),
    Row((10, 0), 4, Config(64, 64, 32, warps=4, stages=3)),
)

# `bench tune` tries these for 16-bit inputs, beside the rows above. Two programs of 128 x 128 or 64 x 256 fit
# a multiprocessor, so that the exponentials of one overlap with the products of the other.
CANDIDATES = (
    Config(128, 256, 64, warps=8, stages=3, tma=True),
    Config(128, 256, 64, warps=8, stages=4, tma=True),
    Config(256, 128, 64, warps=8, stages=3, tma=True),
    Config(256, 128, 64, warps=8, stages=4, tma=True),
    Config(128, 256, 128, warps=8, stages=2, tma=True),
    Config(128, 128, 64, warps=4, stages=3, tma=True),
    Config(128, 128, 64, warps=8, stages=3, tma=True),
    Config(64, 256, 64, warps=4, stages=2, tma=True),
    Config(128, 256, 64, warps=8, stages=3),
    Config(128, 256, 64, warps=8, stages=4),
)

# For chips that the table does not name: within the 64 KiB of shared memory that all since sm_75 have.
FALLBACK = {2: Config(64, 128, 32, warps=4, stages=3), 4: Config(64, 64, 16, warps=4, stages=3)}

# The share of the L2 cache (50 MB on an H100, 40 on an A100) for the hidden states that concurrent programs read again
# for every tile of the vocabulary.
L2_BYTES = 16 << 20


def config_for(capability: tuple[int, int], itemsize: int, hidden_size: int) -> Config:
    """The table's configuration, or the fallback for unknown chips and for hidden sizes that 16 does not divide.

    The loads of such rows are not vectorised, and large tiles would spill registers.
    """
    if hidden_size % 16:
        return FALLBACK[itemsize]
    for row in TABLE:
        if (row.capability, row.itemsize) == (capability, itemsize) and hidden_size <= row.max_hidden_size:
            return row.config
    return FALLBACK[itemsize]


@dataclass(frozen=True, slots=True)
class GridPlan:
    """How the grid covers rows x vocabulary: programs are ordered by group of row blocks, split, then row block.

    Concurrent programs cover `group` row blocks, whose hidden states stay in L2, by the splits of the vocabulary, whose
    tiles they pass through in step.
    """

    row_blocks: int
    group: int
    splits: int
    tiles_per_split: int


def plan_grid(rows: int, hidden_size: int, vocab_size: int, itemsize: int, config: Config, processors: int) -> GridPlan:
    """The plan with the shortest longest chain of programs, in tiles, on `processors` multiprocessors.

    Beside its tiles a program costs about half a tile: to start, to fill its pipeline and to write.
    """
    row_blocks = -(-rows // config.block_m)
    tiles = -(-vocab_size // config.block_n)
    group = min(row_blocks, max(1, L2_BYTES // (config.block_m * hidden_size * itemsize)))
    fewest = min(tiles, -(-processors // group) if row_blocks > group else 1)
    best = (float("inf"), 0)
    for splits in range(fewest, min(tiles, max(fewest, processors)) + 1):
        waves = -(-row_blocks * splits // processors)
        per_split = -(-tiles // splits)
        best = min(best, (waves * (per_split + 0.5), splits))
    per_split = -(-tiles // best[1])
    return GridPlan(row_blocks, group, -(-tiles // per_split), per_split)
