"""Run the commands of README.md, then those of docs/recipes.md, and compare what they print with the pages.

    python tests/lib/readme.py            # in a fresh clone: the first command is `make demo`
    python tests/lib/readme.py --write    # write what they print into the pages

All commands run in one shell, in the order of PAGES. A command is a line of a code block that begins with `$ `; the
lines below it are its output. Python blocks are run too. Numbers vary with the machine, so only lines that match EXACT
are compared with their numbers; progress is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "recipes.md")
PROMPT = "    $ "
MARK = "--- as typed ---"
EXACT = re.compile(r"kept |status: |k-means: |demo/\S+: \d+ records")
PROGRESS = re.compile(r"[\d,]+ of [\d,]+ records  |\s*$")
VARIES = re.compile(r"bfloat16|float32|x86_64|aarch64|[+-]?\d[\d,.]*(e[+-]\d+)?|[━─]+| +")


@dataclass
class Command:
    """A shell command, its output on the page, and the lines of the page that hold the output (0-based, end open)."""

    text: str
    output: list[str]
    start: int
    end: int


def commands(text: str) -> Iterator[Command]:
    """The commands of a page, in order."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if lines[number] == "```python":
            end = lines.index("```", number)
            yield Command("\n".join(["python - <<'END'", *lines[number + 1 : end], "END"]), [], end, end)
            number = end
        elif lines[number].startswith(PROMPT):
            typed = [lines[number].removeprefix(PROMPT)]
            while typed[-1].endswith("\\"):
                number += 1
                typed.append(lines[number].strip())
            start = end = number + 1
            while end < len(lines) and lines[end].startswith("    ") and not lines[end].startswith(PROMPT):
                end += 1
            yield Command("\n".join(typed), [line[4:] for line in lines[start:end]], start, end)
            number = end - 1
        number += 1


def run(found: list[Command]) -> list[tuple[int, list[str]]]:
    """The exit code of each command, and the lines that it printed; all in one shell, in the root of the checkout."""
    script = "".join(f"{command.text}\nprintf '\\n%s %d\\n' '{MARK}' $?\n" for command in found)
    shell = ["bash", "-c", f"exec 2>&1\n{script}"]
    printed = subprocess.run(shell, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
    parts = re.split(rf"\n{MARK} (\d+)\n", printed)
    assert len(parts) == 2 * len(found) + 1, printed
    return [
        (int(code), [line.rstrip() for line in text.splitlines() if not PROGRESS.match(line)])
        for text, code in zip(parts[::2], parts[1::2], strict=False)
    ]


def masked(line: str) -> str:
    """A line without the parts that vary from machine to machine."""
    return line.strip() if EXACT.match(line) else VARIES.sub("#", line).strip("# ")


def compare(page: Path, found: list[Command], results: list[tuple[int, list[str]]], write: bool) -> int:
    """Print the commands of a page that fail or print something else, and count them. `write`: replace the output."""
    lines = page.read_text(encoding="utf-8").splitlines()
    faults = 0
    for command, (code, printed) in reversed(list(zip(found, results, strict=True))):  # from the end: lines may shift
        if code:
            faults += 1
            print(f"$ {command.text}\nexit code {code}:", *printed, sep="\n")
        elif command.output and write:
            lines[command.start : command.end] = [f"    {line}" for line in printed]
        elif command.output and list(map(masked, command.output)) != list(map(masked, printed)):
            faults += 1
            print(f"$ {command.text}\nprints something else than {page.name} says:", *printed, sep="\n")
    if write and not faults:
        page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return faults


def main() -> None:
    """Run the commands of all pages. Exit with 1 if a command fails or prints something else."""
    pages = {page: list(commands(page.read_text(encoding="utf-8"))) for page in PAGES}
    began = time.monotonic()
    results = iter(run([command for found in pages.values() for command in found]))
    faults = 0
    for page, found in pages.items():
        faults += compare(page, found, list(islice(results, len(found))), "--write" in sys.argv)
        print(f"{page.name}: {len(found)} commands")
    print(f"{faults} faults, {time.monotonic() - began:,.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
