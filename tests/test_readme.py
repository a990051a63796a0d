"""What README.md and docs/ say: commands that parse, links that lead somewhere. CI runs the README itself."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from scorer.commands import cli
from scorer.requirements import REQUIREMENTS
from tests.lib.readme import README, ROOT, commands, masked

PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
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
    assert lines
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = cli.commands[name]
        command.make_context(name, arguments, parent=click.Context(cli))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_exist(page: Path) -> None:
    named = re.findall(r"pip install .*'\.\[(.*?)\]'", page.read_text(encoding="utf-8"))
    assert named
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS


def test_extras_that_are_required_exist() -> None:
    assert {needed.extra for needed in REQUIREMENTS.values()} <= EXTRAS


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)(.*?)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link.partition("#")[0]).exists(), link


def test_every_command_of_the_readme_is_run() -> None:
    """A command of scorer's stands behind a prompt, which is what makes tests/lib/readme.py run it."""
    text = README.read_text(encoding="utf-8")
    assert not re.findall(r"^    (?!\$ )(?:scorer|pip|python) .*", text, re.MULTILINE)
    run = "\n".join(command.text for command in commands(text))
    for name in ("make demo", "scorer select", "scorer score", "scorer models", "scorer lp", "scorer cluster"):
        assert name in run
    assert {"scorer compare", "scorer report", "pip install", "import scorer"} <= set(
        re.findall(r"scorer compare|scorer report|pip install|import scorer", run)
    )


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
