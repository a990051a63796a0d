"""README.md and docs/: commands parse, extras exist, links work. `.ci/run` runs the commands of README and recipes."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from scorer.commands import cli
from scorer.requirements import REQUIREMENTS
from tests.lib import readme
from tests.lib.readme import README, ROOT, commands, compare, masked

PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TABLES_ONLY = ("benchmarks.md", "data.md", "guarantees.md", "measures.md")  # pages without commands of scorer
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
CODE = re.compile(r"^    (?:\$ )?(.*?)(?:  +# .*)?$", re.MULTILINE)


def typed(page: Path) -> list[str]:
    """The command lines of a page's indented blocks, without their comments."""
    found = []
    for line in CODE.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        found += [part.strip() for part in line.split("|")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    """Every command and option is known; nothing is run."""
    lines = [line for line in typed(page) if line.startswith("scorer ")]
    assert lines or page.name in TABLES_ONLY
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = cli.commands[name]
        command.make_context(name, arguments, parent=click.Context(cli))


def test_extras_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"pip install .*'\.\[(.*?)\]'", text)
    assert {extra for names in named for extra in names.split(",")} == EXTRAS - {"lint", "test"}


def test_extras_that_are_required_exist() -> None:
    assert {needed.extra for needed in REQUIREMENTS.values()} <= EXTRAS


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)(.*?)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link.partition("#")[0]).exists(), link


def test_every_command_of_readme_and_recipes_is_run() -> None:
    """A command stands behind a prompt, which makes tests/lib/readme.py run it. The order is that of a fresh clone."""
    pages = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    for text in pages:
        assert not re.findall(r"^    (?!\$ )(?:scorer|pip|python) .*", text, re.MULTILINE)
    run = [command.text for text in pages for command in commands(text)]
    assert run[:2] == ["make demo", ". .venv/bin/activate"]
    joined = "\n".join(run)
    for name in ("select", "score", "models", "lp", "cluster", "compare", "report"):
        assert f"scorer {name}" in joined
    assert "pip install" in joined
    assert "import scorer" in joined


def test_the_table_of_commands_is_complete() -> None:
    table = re.findall(r"^\| `scorer (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(cli.commands)


def test_output_is_compared_and_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("    $ one\n    kept 1\n    $ two\n    5 s\n    more\nend\n")
    found = list(commands(page.read_text()))
    assert compare(page, found, [(0, ["kept 1"]), (0, ["7 s", "more"])], write=False) == 0
    assert compare(page, found, [(0, ["kept 2"]), (1, ["7 s", "more"])], write=False) == 2
    assert compare(page, found, [(0, ["kept 2", "new"]), (0, ["7 s"])], write=True) == 0
    assert page.read_text() == "    $ one\n    kept 2\n    new\n    $ two\n    7 s\nend\n"


def test_what_is_run_and_what_it_prints() -> None:
    shell = "Text\n\n    $ one \\\n          two\n    printed\n    too\n    $ three\n\n"
    text = f"{shell}```python\nimport x\n```\n    not a command\n"
    one, three, python = commands(text)
    assert (one.text, one.output) == ("one \\\ntwo", ["printed", "too"])
    assert (three.text, three.output) == ("three", [])
    assert python.text == "python - <<'END'\nimport x\nEND"
    assert masked("38,377 tokens in 35.2 s: 1,091 tokens/s") == masked("38,377 tokens in 87.1 s: 440.6 tokens/s")
    assert masked("kept 20 of 203 records: a") != masked("kept 21 of 203 records: a")
    assert masked("status: 243 ok") != masked("status: 242 ok")
    assert masked("loading m (bfloat16)") != masked("loading n (bfloat16)")
