"""What the device does while an engine runs: the share of the time in which it computes, and the costliest kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

COSTLIEST = 10
MOVES = ("Memcpy", "Memset")  # the device's events that are no kernels begin so


def device_figures(work: Callable[[], float]) -> dict[str, Any]:
    """The figures of `shares` for `work`, which returns its seconds. Without CUDA: none, and `work` is not called.

    Kernels of all threads count. They run one after another, so their sum is the time in which the device computes.
    """
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        seconds = work()
    kernels: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == DeviceType.CUDA and not event.key.startswith(MOVES):
            kernels[event.key] = kernels.get(event.key, 0.0) + event.self_device_time_total / 1e6
    return shares(kernels, seconds)


def shares(kernels: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """What a report says of the seconds of each kernel in a run of `seconds`."""
    total = sum(kernels.values())
    costliest = sorted(kernels.items(), key=lambda item: item[1], reverse=True)[:COSTLIEST]
    return {
        "device_computes": total / seconds,  # a share of the time
        "kernel_seconds": total,
        "costliest_kernels": [
            {"name": name, "seconds": own, "share_of_kernels": own / total} for name, own in costliest
        ],
    }
