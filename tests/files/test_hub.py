"""Datasets on the hub, as data."""

from __future__ import annotations

from pathlib import Path

from scorer.data.dataset import Dataset
from tests.lib.hub import COMMIT, CONVERTED, Hub


def names(paths: list[str]) -> list[str]:
    """The paths in the dataset, of paths in the cache's folder of the commit."""
    assert all(Path(path).is_file() and f"/snapshots/{COMMIT}/" in path for path in paths), paths
    return [path.partition(f"/snapshots/{COMMIT}/")[2] for path in paths]


def test_the_files_that_an_address_means(hub: Hub, tmp_path: Path) -> None:
    train = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    test = ["data/test-00000-of-00001.jsonl"]
    wanted: list[tuple[str, dict[str, str], list[str]]] = [
        ("org/plain", {}, ["a.jsonl", "b.jsonl"]),
        ("hf://datasets/org/plain", {}, ["a.jsonl", "b.jsonl"]),
        (f"hf://datasets/org/plain@{COMMIT}/a.jsonl", {}, ["a.jsonl"]),
        (f"hf://datasets/org/plain@{CONVERTED}/b.jsonl", {}, ["b.jsonl"]),
        ("hf://datasets/org/plain@refs%2Fconvert%2Fparquet", {}, ["a.jsonl", "b.jsonl"]),
        ("org/plain@v1.0", {}, ["a.jsonl", "b.jsonl"]),
        ("org/splits", {}, train),
        ("org/splits", {"split": "test"}, test),
        ("hf://datasets/org/splits/data/*.jsonl", {}, [*test, *train]),
        ("hf://datasets/org/splits/*.jsonl", {}, []),
        ("hf://datasets/org/splits/data", {}, train),
        ("org/subsets", {"subset": "en"}, ["en/part-0.jsonl", "en/part-1.jsonl"]),
        ("org/subsets", {"subset": "en", "split": "test"}, ["en/held.jsonl"]),
        ("org/subsets", {"subset": "de"}, ["de.csv"]),
    ]
    found = hub.look(tmp_path, *((path, options) for path, options, _ in wanted))
    for (path, options, expected), one in zip(wanted, found, strict=True):
        if expected:
            assert names(one) == expected, (path, options)
        else:
            assert one == f"2 {path}: the dataset has no such file; see https://huggingface.co/datasets/org/splits"
    with Dataset(found[6]) as data:
        data.inspect()
        assert data.counts == (1, 2)


def test_what_the_user_has_to_mend(hub: Hub, tmp_path: Path) -> None:
    wanted: list[tuple[str, dict[str, str], str]] = [
        ("org/missing", {}, "no such file or folder here, and no such dataset on the hub"),
        ("hf://datasets/org/missing", {}, "hf://datasets/org/missing: no such dataset on the hub"),
        ("org/plain@v2", {}, "has no revision 'v2'"),
        (
            "org/gated",
            {},
            "access is restricted; ask for it at https://huggingface.co/datasets/org/gated, then run `hf",
        ),
        ("org/splits", {"split": "dev"}, "there is no split 'dev'; --split takes one of: test, train"),
        ("org/subsets", {}, "several subsets; choose one with --subset: en, de"),
        ("org/subsets", {"subset": "fr"}, "there is no subset 'fr'; --subset takes one of: en, de"),
        ("org/script", {}, "there is no file (data.zip, script.py) of a kind that scorer reads"),
        ("hf://datasets/org/plain/a.jsonl", {"split": "train"}, "leave out --split"),
        ("hf://datasets/plain", {}, "write hf://datasets/ORG/NAME"),
        ("hf://models/org/plain", {}, "write hf://datasets/ORG/NAME"),
    ]
    found = hub.look(tmp_path, *((path, options) for path, options, _ in wanted))
    for (path, _, told), one in zip(wanted, found, strict=True):
        assert one.startswith(f"2 {path}: "), one
        assert told in one
        assert "\n" not in one


def test_a_token_opens_a_gated_dataset(hub: Hub, tmp_path: Path) -> None:
    (found,) = hub.look(tmp_path, ("org/gated", {}), HF_TOKEN="hf_member")
    assert names(found) == ["train.jsonl"]


def test_local_names_are_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    paths = ["org/data.jsonl", "org/data.xlsx", "here/nothing", "org/a/b", "../org", "nothing"]
    assert hub.look(tmp_path, *((path, {}) for path in paths)) == [[path] for path in paths]
    assert hub.asked == []


def test_the_cache_serves_without_a_network(hub: Hub, tmp_path: Path) -> None:
    wanted: tuple[str, dict[str, str]] = ("org/splits", {})
    (online,) = hub.look(tmp_path, wanted)
    assert f"datasets/org/splits/resolve/{COMMIT}/data/train-00001-of-00002.jsonl" in hub.asked
    hub.asked.clear()
    found = hub.look(tmp_path, wanted, ("org/splits", {"split": "test"}), ("org/plain", {}), HF_HUB_OFFLINE="1")
    assert hub.asked == []
    assert found[0] == online
    assert found[1].startswith("2 org/splits: there is no split 'test'")
    assert found[2].startswith("2 org/plain: no such file or folder here, and not whole in the hub's cache")
    Path(online[1]).unlink()
    (found,) = hub.look(tmp_path, wanted, HF_HUB_OFFLINE="1")
    assert "1 of the 2 files data/train-*.jsonl are there; run it without HF_HUB_OFFLINE" in found


def test_a_hub_that_fails(hub: Hub, tmp_path: Path) -> None:
    hub.status = 500
    (found,) = hub.look(tmp_path, ("org/plain", {}))
    assert found.startswith("1 org/plain: the hub fails (")
    (found,) = hub.look(tmp_path, ("org/plain", {}), HF_ENDPOINT="http://127.0.0.1:9")
    assert found.startswith("1 org/plain: no such file or folder here, and the hub can't be reached (")
    hub.status = 401
    (found,) = hub.look(tmp_path, ("hf://datasets/org/plain", {}))
    assert found.startswith("2 hf://datasets/org/plain: ")
