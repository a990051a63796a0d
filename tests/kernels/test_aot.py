"""The Triton kernels compiled without a GPU, as the launchers call them, for each chip and configuration of the table.

Each chip has its own process, which runs `report` below the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
KERNELS = Path(__file__).parents[2] / "kernels"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

pytest.importorskip("triton")


@cache
def start(chip: int, directory: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": directory, "PYTHONPATH": str(KERNELS), "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, __file__, str(chip)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The report of each chip's process: a dictionary for each compiled kernel."""
    processes = {chip: start(chip, str(tmp_path_factory.mktemp(f"sm_{chip}"))) for chip in SHARED_BYTES}
    reports = {}
    for chip, process in processes.items():
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        reports[chip] = json.loads(out.splitlines()[-1])
    return reports


@pytest.mark.parametrize("chip", SHARED_BYTES)
def test_every_launch_compiles_within_the_chip(chip: int, compiled: dict[int, list[dict[str, Any]]]) -> None:
    names = [kernel["name"] for kernel in compiled[chip]]
    assert set(names) == {"head_kernel", "finish_kernel", "merge_kernel", "segment_kernel", "ifd_kernel"}
    assert names.count("head_kernel") >= 4
    for kernel in compiled[chip]:
        assert kernel["cubin_bytes"] > 0
        assert kernel["shared"] <= SHARED_BYTES[chip], kernel


def halves(chip: int, compiled: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        kernel for kernel in compiled[chip] if kernel["name"] == "head_kernel" and kernel["case"].startswith("half")
    ]


def test_hopper_multiplies_in_wgmma_without_spills_or_serialisation(
    compiled: dict[int, list[dict[str, Any]]],
) -> None:
    for kernel in halves(90, compiled):
        assert kernel["wgmma"], kernel
        assert "serialized" not in kernel["log"], kernel
        assert "0 bytes spill stores, 0 bytes spill loads" in kernel["log"], kernel


@pytest.mark.parametrize(("chip", "loads"), [(80, {False}), (90, {False, True}), (100, {False, True})])
def test_tma_loads_the_tiles_where_the_configuration_says(
    chip: int, loads: set[bool], compiled: dict[int, list[dict[str, Any]]]
) -> None:
    found = halves(chip, compiled)
    assert {kernel["tma"] for kernel in found} == loads
    for kernel in found:
        assert kernel["tma"] == ("TMA" in kernel["case"]), kernel


def test_one_kernel_serves_every_batch(compiled: dict[int, list[dict[str, Any]]]) -> None:
    for chip in SHARED_BYTES:
        assert not [kernel for kernel in compiled[chip] if kernel["case"] == "other batch"]


def report(chip: int) -> None:
    """Call the launchers with a driver that compiles for a chip and launches nothing."""
    import contextlib
    import io
    from dataclasses import replace

    import scorer_kernels as sk
    import torch
    import triton
    from scorer_kernels import linear, segments, table
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class CompileOnly(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # loads nothing of CUDA
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip, 32)

    kernels: list[dict[str, Any]] = []
    seen: set[str] = set()
    case = ""
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, **(kwargs | {"warmup": True}))
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        kernels.append(
            {
                "name": kernel.metadata.name,
                "case": case,
                "shared": kernel.metadata.shared,
                "cubin_bytes": len(kernel.asm["cubin"]),
                "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
                "tma": "cp.async.bulk.tensor" in kernel.asm["ptx"],
                "log": log.getvalue(),
            }
        )

    triton.runtime.driver.set_active(CompileOnly())
    triton.JITFunction.run = compile_only
    for launcher in (linear, segments):
        vars(launcher)["on_device"] = lambda tensor: contextlib.nullcontext()

    def head(dtype: torch.dtype, config: table.Config, hidden_size: int = 768, **options: Any) -> None:
        nonlocal case
        kind = "single" if dtype == torch.float32 else "half TMA" if config.tma else "half pointers"
        weight = torch.zeros(1000, hidden_size, dtype=dtype)
        for rows, vocab_size in ((300, 1000), (1, 7), (64, 992)):
            case = " ".join((kind, *options)) if rows == 300 else "other batch"
            hidden, targets = torch.zeros(rows, hidden_size, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
            own = {name: value[:vocab_size] if name == "bias" else value for name, value in options.items()}
            sk.linear_nll(hidden, sk.Head(weight[:vocab_size], **own), targets, config=config)

    rows = [row for row in table.TABLE if row.capability == (chip // 10, chip % 10)]
    tiles = [row.config for row in rows if row.itemsize == 2]
    candidates = table.CANDIDATES if chip == 90 else ()
    for config in dict.fromkeys((*tiles, replace(tiles[-1], tma=False), *candidates)):
        head(torch.bfloat16, config)
    options: dict[str, Any] = {"bias": torch.zeros(1000), "scale": 0.5, "softcap": 30.0}
    head(torch.float16, tiles[-1], **options)
    single = next(row.config for row in rows if row.itemsize == 4)
    head(torch.float32, single)
    if chip == min(SHARED_BYTES):  # the chip with the least shared memory
        head(torch.float32, single, **options)
        head(torch.bfloat16, table.FALLBACK[2], hidden_size=100)
        head(torch.float32, table.FALLBACK[4], hidden_size=100)
    case = "rest"
    sk.linear_nll_partials(torch.zeros(5, 64), sk.Head(torch.zeros(9, 64), vocab_start=9), torch.zeros(5).long())
    sk.merge_partials(torch.zeros(2, 3, 5))
    sk.segment_nll(torch.zeros(5), torch.tensor([0, 2, 5]))
    sk.sample_ifd(torch.zeros(5), torch.tensor([[0, 2]]), torch.tensor([[2, 5]]))
    print(json.dumps(kernels))


if __name__ == "__main__":
    report(int(sys.argv[1]))
