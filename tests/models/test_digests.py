"""What a changed file does to a digest, with a memo of what was read before."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from scorer.models import digests
from scorer.models.digests import MEMO, SMALL_BYTES, cache_dir, digest, listing

SIZE = SMALL_BYTES + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a large file, a small one in a folder, and a cache of its own beside it."""
    monkeypatch.setenv("SCORER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_NS", 100_000_000)
    folder = tmp_path / "model"
    (folder / "in").mkdir(parents=True)
    (folder / "large").write_bytes(bytes(SIZE))
    (folder / "in" / "small").write_text("abc")
    return folder


def settled(path: Path) -> None:
    """Wait until a file is old enough to be remembered."""
    time.sleep(max(0, 0.2 - (time.time_ns() - path.stat().st_ctime_ns) / 1e9))


def found(folder: Path) -> dict[str, str]:
    return listing(folder, [folder / "in" / "small", folder / "large"])


def test_every_byte_counts_and_so_do_names(folder: Path) -> None:
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    first = found(folder)
    assert first["in/small"] == abc
    with (folder / "large").open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"x")
    assert found(folder)["large"] != first["large"]
    assert digest(folder, [folder / "large"]) != digest(folder.parent, [folder / "large"])


def test_a_large_file_is_read_once_and_again_when_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, memo = folder / "large", cache_dir() / MEMO
    with monkeypatch.context() as patch:
        patch.setattr(digests, "SETTLED_NS", 10**12)
        first = found(folder)
    assert not memo.exists()  # it may change again in this very moment
    settled(large)
    assert found(folder) == first
    [(path, (state, sha256))] = json.loads(memo.read_text()).items()
    assert (path, sha256) == (str(large), first["large"])
    memo.write_text(json.dumps({path: [state, "remembered"]}))
    assert found(folder)["large"] == "remembered"
    before = large.stat()
    with large.open("r+b") as file:
        file.write(b"x")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a program leaves it that copies times
    changed = found(folder)["large"]
    assert changed not in ("remembered", first["large"])
    settled(large)
    large.rename(folder / "moved")
    (folder / "moved").rename(large)
    assert found(folder)["large"] == changed


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"a": 1, "b": [1]}', "\udcff"])
def test_a_memo_that_is_broken_is_made_again(folder: Path, content: str) -> None:
    first = found(folder)
    cache_dir().mkdir(exist_ok=True)  # on a slow machine the file is settled already
    (cache_dir() / MEMO).write_text(content, "utf-8", "surrogateescape")
    settled(folder / "large")
    assert found(folder) == first
    assert json.loads((cache_dir() / MEMO).read_text()).keys() == {str(folder / "large")}


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    cache_dir().write_text("a file in the folder's place")
    settled(folder / "large")
    assert found(folder) == found(folder)


def test_files_that_are_gone_are_forgotten(folder: Path) -> None:
    settled(folder / "large")
    found(folder)
    (folder / "large").rename(folder / "other")
    settled(folder / "other")
    listing(folder, [folder / "other"])
    assert json.loads((cache_dir() / MEMO).read_text()).keys() == {str(folder / "other")}
