"""What the tests share: tiny random models of every packed family, real files, and a hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.lib.families import make
from scorer.models.find import ModelFiles, find_model
from tests.lib.hub import Hub, serving

os.environ.setdefault("SCORER_SERVER_WAIT", "0")  # a test in which a client waits for a server sets its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, by name from the end of the alphabet: those of vLLM and Ray take longest.

    So no process is left with a long one at the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path in slow, item.path.name, item.path), reverse=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFiles]:
    """`tiny(family)`: the files of a random model, made once."""
    made: dict[str, ModelFiles] = {}

    def files(family: str) -> ModelFiles:
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return files


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path that is short enough for sockets; pytest's own is not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The embedded model, fetched if it is not in the cache."""
    return find_model("smollm2-135m")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(rows, name="data.jsonl")` writes rows as JSON Lines."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    """A server that speaks the API of the Hugging Face hub."""
    with serving() as server:
        yield server


@pytest.fixture
def hub(hub_server: Hub) -> Hub:
    """That server, as it began."""
    hub_server.clear()
    return hub_server
