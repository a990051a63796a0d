"""Numbers on the command line: what no number of the option can be is refused in one line, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from scorer.agreement.config import CompareConfig
from scorer.commands import cli
from scorer.config import Cluster, ClusterConfig, ScoreConfig, Training
from scorer.options import describe
from scorer.selection.config import SelectConfig
from scorer.types import ScorerError

# The other arguments of each command: of files that are not there, so that a valid number ends in exit code 2 too.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[type[Any], ...]]] = {
    "score": (("none.jsonl", "-o", "run", "--ray", "local"), (ScoreConfig, Cluster)),
    "select": (("none", "-o", "a.jsonl"), (SelectConfig,)),
    "filter": (("none.jsonl", "-o", "a.jsonl", "--ray", "local"), (ScoreConfig, Cluster, SelectConfig)),
    "lp": (("none.jsonl", "-o", "run"), (Training, ScoreConfig)),
    "cluster": (("none", "--flags"), (ClusterConfig,)),
    "compare": (("none", "none"), (CompareConfig,)),
    "report": (("none", "-o", "a.html"), (SelectConfig,)),
    "serve": ((), (ScoreConfig,)),
}
PARSED = ("keep", "max_ifd", "diverse", "pool", "workers", "at", "port")  # numbers that are no int or float of a config
WRONG = ("nan", "inf", "-inf", "-1", "-7", "1" + 30 * "0", "9" * 5000, "", "1e999", "0x10", "0")


def numeric_options() -> Iterator[tuple[str, str, str, bool]]:
    """Command, option, its field's name, and whether -1 or 0 is one of its numbers."""
    for name, (_, configs) in COMMANDS.items():
        fields = {f.name: (kind, info) for config in configs for f, kind, info in describe(config)}
        for parameter in cli.commands[name].params:
            kind, info = fields.get(parameter.name or "", (None, None))
            if (
                isinstance(parameter, click.Option)
                and parameter.name
                and (kind in (int, float) or parameter.name in PARSED)
            ):
                yield (
                    name,
                    parameter.opts[0],
                    parameter.name,
                    (info is not None and info.minimum in (0, -1)) or kind is float,
                )


@pytest.mark.parametrize(("name", "option", "field", "low"), list(numeric_options()))
def test_no_wrong_number_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str, field: str, low: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in WRONG:
        arguments = [name, *COMMANDS[name][0], option, text]
        if field == "pool":
            arguments += ["--diverse", "2"]
        ended = CliRunner().invoke(cli, arguments, prog_name="scorer")
        if ended.exit_code == 2:  # a usage error of Click's
            shown = ended.output
        else:
            assert isinstance(ended.exception, ScorerError), (arguments, ended.exc_info)
            assert ended.exception.exit_code == 2
            shown = str(ended.exception)
        if field == "max_ifd" and text == WRONG[5]:
            continue  # an ifd may be as large
        if text not in ("-1", "0") or not low:
            assert field in shown or option in shown, (arguments, shown)
    assert list(tmp_path.iterdir()) == [] or name == "lp"


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (ClusterConfig, {"far_below": 7}),
        (ClusterConfig, {"duplicate_above": float("nan")}),
        (ClusterConfig, {"iterations": 2**31}),
        (ScoreConfig, {"limit": 2**63}),
        (ScoreConfig, {"shard_rows": True}),
        (ScoreConfig, {"gpu_memory_utilization": float("nan")}),
        (Cluster, {"cpus_per_worker": float("inf")}),
        (Training, {"learning_rate": "0.1"}),
        (Training, {"weight_decay": float("nan")}),
        (CompareConfig, {"at": "5%,abc"}),
        (CompareConfig, {"resamples": 10**9}),
        (SelectConfig, {"seed": 10**30}),
    ],
)
def test_nor_from_python(config: type[Any], options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ScorerError, match=name):
        config(**options)


def test_the_ends_of_a_range_are_in_it() -> None:
    ClusterConfig(far_below=-1, duplicate_above=1, iterations=2**31 - 1, seed=0)
    ScoreConfig(limit=2**63 - 1, gpu_memory_utilization=1)
