"""What a user names as data, on a disk: files, patterns, folders, and what Hugging Face's datasets saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scorer.data.dataset import Dataset
from scorer.files.inputs import input_files
from scorer.files.layout import chosen_files
from scorer.types import ScorerError

ROW = {"instruction": "Say it.", "output": "It."}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(ScorerError) as caught:
        input_files(path, **options)
    assert str(caught.value).startswith(path.rstrip("/"))
    return str(caught.value)


def save(folder: Path, parts: Iterable[Iterable[int]], split: str = "train") -> None:
    """A folder as `Dataset.save_to_disk` writes it: a stream of Arrow for each part, and two JSON files."""
    folder.mkdir(parents=True)
    names = []
    for number, part in enumerate(parts):
        table = pa.table({"instruction": [f"Say {n}." for n in part], "output": [f"{n}" for n in part]})
        names.append(f"data-{number:05}-of-00002.arrow")
        with pa.ipc.new_stream(folder / names[-1], table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    touch(f"{folder}/cache-0123456789abcdef.arrow")  # as `Dataset.map` leaves it: no part of the dataset


def save_splits(folder: Path, **splits: Iterable[int]) -> None:
    for name, rows in splits.items():
        save(folder / name, [rows], name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


@pytest.mark.parametrize("path", ["a.jsonl", "missing.jsonl", "data/missing.jsonl", "-", "./ORG", "/none/of/these"])
def test_other_paths_stay_as_they_are(path: str) -> None:
    touch("a.jsonl")
    assert input_files(path) == [path]


def test_patterns() -> None:
    touch("data/b.jsonl", "data/a.jsonl", "data/deep/er/c.parquet", "data/x[1].jsonl", "data/x1.jsonl", "data/.d.jsonl")
    assert input_files("data/[ab].jsonl") == ["data/a.jsonl", "data/b.jsonl"]
    assert input_files("data/*") == ["data/a.jsonl", "data/b.jsonl", "data/x1.jsonl", "data/x[1].jsonl"]
    assert input_files("data/**/*.parquet") == ["data/deep/er/c.parquet"]
    assert input_files("data/x[1].jsonl") == ["data/x[1].jsonl"]  # a file of that very name
    assert "no file matches" in refusal("data/*.csv")
    assert "no file matches" in refusal("data/dee*")


def test_a_folder_of_mixed_files() -> None:
    touch("d/b.jsonl", "d/a.csv.gz", "d/in/c.parquet", "d/in/d.arrow", "d/README.md", "d/script.py")
    touch("d/.hidden/e.jsonl", "d/_work/f.jsonl", "d/_g.jsonl", "d/.h.jsonl", "d/dataset_infos.json")
    touch("elsewhere/z.json")
    os.symlink("../elsewhere", "d/linked")
    os.symlink("..", "d/in/round")
    expected = ["d/a.csv.gz", "d/b.jsonl", "d/in/c.parquet", "d/in/d.arrow", "d/linked/z.json"]
    assert input_files("d") == input_files("d/") == expected
    touch("none/notes.txt", "none/_a.jsonl")
    assert "without a file of a kind that scorer reads: JSON" in refusal("none")


def test_files_of_different_kinds_are_one_dataset() -> None:
    Path("d").mkdir()
    Path("d/a.csv").write_text("instruction,output\nSay 0.,0\n")
    Path("d/b.json").write_text(json.dumps({"data": [{"instruction": "Say 1.", "output": "1"}]}))
    save(Path("d/c"), [[2, 3]])
    os.remove("d/c/cache-0123456789abcdef.arrow")
    with Dataset(input_files("d")) as data:
        data.inspect()
        assert [raw.value["output"] for raw in data.rows()] == ["0", "1", "2", "3"]


def test_a_saved_dataset() -> None:
    save(Path("saved"), [[0, 1], [2]])
    paths = input_files("saved/")
    assert paths == [f"saved/data-0000{i}-of-00002.arrow" for i in (0, 1)]
    with Dataset(paths) as data:
        data.inspect()
        assert [raw.value for raw in data.rows()][-1] == {"instruction": "Say 2.", "output": "2"}
    assert input_files("saved", split="train") == paths
    assert "of one split, train: leave out --split" in refusal("saved", split="test")
    assert "no subsets" in refusal("saved", subset="en")
    Path("saved/state.json").write_text('{"_data_files": [{"file": "a"}]}')
    assert "does not list the data files" in refusal("saved")
    Path("saved/state.json").write_text('{"_data_files": [')
    assert "can't be read" in refusal("saved")


def test_a_saved_dataset_of_several_splits() -> None:
    save_splits(Path("both"), test=[0], train=[1])
    save_splits(Path("odd"), validation=[0], test=[1])
    save_splits(Path("one"), holdout=[0])
    name = "data-00000-of-00002.arrow"
    assert input_files("both") == [f"both/train/{name}"]
    assert input_files("both", split="test") == [f"both/test/{name}"]
    assert input_files("one") == [f"one/holdout/{name}"]
    assert "there is no split 'dev'; --split takes one of: test, train" in refusal("both", split="dev")
    assert "choose one with --split: validation, test" in refusal("odd")


@pytest.mark.parametrize(("options", "flag"), [({"split": "train"}, "--split"), ({"subset": "en"}, "--subset")])
def test_a_choice_where_there_is_none(options: dict[str, str], flag: str) -> None:
    touch("a.jsonl", "b/train.jsonl")
    assert f"leave out {flag}" in refusal("a.jsonl", **options)
    assert f"leave out {flag}" in refusal("*.jsonl", **options)
    assert f"leave out {flag}" in refusal("-", **options)


def test_a_local_copy_of_a_dataset_of_the_hub() -> None:
    touch("d/data/en/train.jsonl", "d/data/en/test.jsonl", "d/data/de/train.jsonl")
    assert len(input_files("d")) == 3
    assert input_files("d", split="test") == ["d/data/en/test.jsonl"]
    assert input_files("d", split="train", subset="de") == ["d/data/de/train.jsonl"]
    assert "there is no subset 'fr'" in refusal("d", subset="fr")
    Path("d/README.md").write_text("---\nconfigs:\n- config_name: deutsch\n  data_files: data/de/*\n---\n# D\n")
    assert input_files("d", subset="deutsch") == ["d/data/de/train.jsonl"]
    Path("d/README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ScorerError, match=r"README\.md: its YAML can't be read"):
        input_files("d", subset="deutsch")


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["a.csv", "b.csv", "README.md"], None, ["a.csv", "b.csv"]),
        (["train.jsonl", "test.jsonl", "extra.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["en/train.json", "de/train.json", "de/test.json"], None, ["de/train.json", "en/train.json"]),
        (
            ["train/a.json", "train/b.json", "test/train.json"],
            "train",
            ["test/train.json", "train/a.json", "train/b.json"],
        ),
        (["my-training-set.csv", "constrain.csv"], None, ["my-training-set.csv"]),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], "train_gen", [1]),
        (["holdout.csv", "test.csv"], None, ["test.csv"]),
    ],
)
def test_splits_by_the_names_of_files(files: list[str], split: str | None, expected: list[Any]) -> None:
    expected = [files[name] if isinstance(name, int) else name for name in expected]
    assert chosen_files("it", files, {}, split=split, subset=None) == expected


FILES = ["README.md", "a/train-1.json", "a/train-0.json", "a/test.json", "b/train.csv", "b/deep/more.csv", "c.zip"]
CARD = {
    "configs": [
        {
            "config_name": "a",
            "data_files": [{"split": "train", "path": "a/train-*"}, {"split": "test", "path": ["a/test.*"]}],
        },
        {"config_name": "b", "data_dir": "b", "data_files": {"all": ["train.csv", "**/m*.csv"]}},
        {"config_name": "c", "data_files": "c.zip"},
        {"config_name": "d", "data_dir": "a"},
        {"config_name": "e", "data_files": ["b"]},
    ]
}


@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("a", None, ["a/train-0.json", "a/train-1.json"]),
        ("a", "test", ["a/test.json"]),
        ("a", "dev", "there is no split 'dev'; --split takes one of: train, test"),
        ("b", None, ["b/train.csv", "b/deep/more.csv"]),
        ("c", None, r"there is no file \(c.zip\) of a kind that scorer reads"),
        ("d", "test", ["a/test.json"]),
        ("e", None, ["b/deep/more.csv", "b/train.csv"]),
        ("f", None, "there is no subset 'f'; --subset takes one of: a, b, c, d, e"),
        (None, None, "several subsets; choose one with --subset: a, b, c, d, e"),
    ],
)
def test_a_card_says_which_files_a_subset_has(subset: str | None, split: str | None, expected: Any) -> None:
    if isinstance(expected, list):
        assert chosen_files("it", FILES, CARD, split=split, subset=subset) == expected
        return
    with pytest.raises(ScorerError, match=f"^it: .*{expected}"):
        chosen_files("it", FILES, CARD, split=split, subset=subset)


def test_the_default_subset() -> None:
    entries: list[dict[str, Any]] = [{"config_name": name, "data_files": f"{name}/*"} for name in ("a", "b")]
    entries[1]["default"] = True
    assert chosen_files("it", FILES, {"configs": entries}, split=None, subset=None) == ["b/train.csv"]
    entries = [{"data_files": "a/test.json"}, {"config_name": "b", "data_files": "b/*"}]
    assert chosen_files("it", FILES, {"configs": entries}, split=None, subset=None) == ["a/test.json"]
