"""The device and the versions of the packages that scores are computed with."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from scorer.config import ScoreConfig
from scorer.engines.choose import engine_versions

PACKAGES = ("ifd-scorer", "torch", "transformers")  # whose versions a score depends on, beside the engine's


def package_versions(engine: str) -> dict[str, str]:
    """The versions of PACKAGES, and of those of `engine`, in this process; "none" where one is not installed."""
    return {name: _version(name) for name in PACKAGES} | engine_versions(engine)


def environment(config: ScoreConfig) -> dict[str, str]:
    """What scores in this process are computed with: device, python, and packages."""
    return {
        "device": _device_name(config.device),
        "python": platform.python_version(),
        "polars": _version("polars"),
        **package_versions(config.engine),
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two environments, as text for a message."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name, 'none')} then, {now.get(name, 'none')} now" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _device_name(device: str) -> str:
    if device == "auto":
        return "the server's"
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
