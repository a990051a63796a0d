"""What the command line prints: one clean line, whatever names it holds, and wherever it goes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from scorer.printing import MAX_CHARACTERS, error_line, printable
from scorer.runs.progress import PlainConsole
from tests.lib.command import Commands, bash
from tests.lib.runs import make_run

ROOT = Path(__file__).parents[1]
ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(40)]
EVIL = "a\x1b]0;t\x07\n\r\x9b1m\u202eb\u2066"
SHOWN = r"a\x1b]0;t\x07\n\r\x9b1m\u202eb\u2066"


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $S is the command, in three words."""
    return bash(folder, f"S='{sys.executable} {ROOT / 'cli.py'}'; {line}")


def test_escapes_are_python_s_and_other_text_stays() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("\udcff \u2028 é שלום 🙂 [red] C:\\new") == r"\udcff \u2028 é שלום 🙂 [red] C:\new"
    every = printable("".join(map(chr, range(0x110000))))
    assert "\n" not in every
    assert len(every.splitlines()) == 1
    every.encode()


def test_an_error_is_cut_in_its_middle() -> None:
    assert error_line("x" * MAX_CHARACTERS) == "x" * MAX_CHARACTERS
    line = error_line("begin " + "\n" * 10**6 + " end")
    assert len(line) <= MAX_CHARACTERS
    assert re.fullmatch(r"begin (\\n)+\\?\.\.\.n?(\\n)+ end", line)


def test_tables_and_lines_of_the_console() -> None:
    console = PlainConsole(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(EVIL, soft_wrap=True)
    assert isinstance(console, Console)
    assert console.export_text().count(SHOWN) == 4


def test_errors_notes_and_tables_of_commands(command: Commands, tmp_path: Path) -> None:
    arguments: tuple[str, ...]
    make_run(tmp_path / EVIL, ROWS, ifd=[i / 50 for i in range(40)])
    for arguments in (
        ("select", f"{EVIL}.none", "-o", "a.jsonl"),
        ("select", EVIL, "-o", f"{EVIL}.txt"),
        ("select", EVIL, "-o", "a.jsonl", "--by", EVIL),
        ("select", EVIL, "-o", "a.jsonl", "--per", EVIL),
        ("select", EVIL, "-o", "a.jsonl", "--keep", EVIL),
        ("score", f"{EVIL}.jsonl", "-o", "new", "--columns", f"prompt={EVIL},response=output"),
        ("score", f"{EVIL}.jsonl", "-o", "new", "--model", f"./{EVIL}"),
        ("compare", EVIL, f"{EVIL}.jsonl"),
    ):
        assert SHOWN in command(*arguments).line()
    for arguments in ((f"--{EVIL}",), (EVIL,), ("select", EVIL, EVIL, "-o", "a"), ("score", "--dtype", EVIL)):
        assert SHOWN in command(*arguments).usage_error()
    assert command("select", EVIL, "-o", f"{EVIL}.csv").done().startswith(f"kept 4 of 40 records: {SHOWN}.csv\n")
    compared = command("compare", EVIL, EVIL).out.splitlines()
    assert compared[0] == f"{SHOWN} by ifd (highest), {SHOWN} by ifd (highest): 40 records"
    assert len(command("select", "x" * 10**5, "-o", "a.jsonl").line()) < 2100


@pytest.mark.parametrize("given", ["--help", "--version", "models", "select --help"])
def test_standard_output_that_is_full_or_not_read(tmp_path: Path, given: str) -> None:
    full = shell(tmp_path, f"$S {given} > /dev/full")
    assert full.returncode == 1
    assert full.stderr == "scorer: standard output: can't be written (No space left on device)\n"
    unread = shell(tmp_path, f"$S {given} | true; exit ${{PIPESTATUS[0]}}")  # which may end first, or last
    assert unread.returncode in (0, 1)
    assert unread.stderr in ("", "Any other Hugging Face name or local folder works too.\n")


def test_standard_error_that_is_full_closed_or_not_read(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ROWS, ifd=[i / 50 for i in range(40)])
    select = "$S select run -o a.jsonl"
    for line, code in (
        (f"{select} 2>&-", 0),
        (f"{select} >&- 2>&-", 0),
        (f"{select} 2>/dev/full", 1),
        ("$S select none -o a.jsonl 2>/dev/full", 2),
        ("$S select none -o a.jsonl 2>&-", 2),
        (f"{select} 2>&1 | head -0; exit ${{PIPESTATUS[0]}}", 1),
        (f"ulimit -n 24; {select} 2>/dev/null", 0),
    ):
        ended = shell(tmp_path, line)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", ""), line
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4  # with no message in it


def test_an_encoding_that_lacks_a_character(tmp_path: Path) -> None:
    make_run(tmp_path / "é", ROWS, ifd=[i / 50 for i in range(40)])
    ended = shell(tmp_path, "PYTHONIOENCODING=ascii $S compare é é")
    assert ended.returncode == 0
    assert r"\xe9 by ifd" in ended.stdout


def test_a_cache_that_is_a_file(command: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in ("file", "file/cache"):
        line = command("models", "fetch", "smollm2-135m", SCORER_CACHE=cache).line()
        assert f"{cache}: the cache can't be there" in line
        assert "SCORER_CACHE" in line


@pytest.mark.parametrize("way", [[str(ROOT / "cli.py")], ["-m", "scorer"]])
def test_an_interrupt_while_the_sources_are_read(tmp_path: Path, way: list[str]) -> None:
    """At the moment when scorer's first source is read, which the audit hook of a sitecustomize sees."""
    hook = (
        "import os, signal, sys\n"
        "def see(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'click.core':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(see)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, *way, "--help"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
