"""The README as typed: its commands are run one after another in one shell, and what they print is compared with it.

    python tests/lib/readme.py            # in a clone where `make demo` was run
    python tests/lib/readme.py --write    # put what they print into the README

A command is a line of a code block that begins with `$ `; what follows it there is what it prints. A Python block is
run too. Numbers vary with the machine, so they are compared in the lines of EXACT alone; progress is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PROMPT = "    $ "
MARK = "--- as typed ---"
EXACT = re.compile(r"kept |status: |k-means: |demo/\S+: \d+ records")
PROGRESS = re.compile(r"[\d,]+ of [\d,]+ records  |\s*$")
VARIES = re.compile(r"bfloat16|float32|x86_64|aarch64|[+-]?\d[\d,.]*(e[+-]\d+)?|[━─]+| +")


@dataclass
class Command:
    """A shell command of the README, the lines that it is said to print, and where these stand (0-based, end open)."""

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
    """A line without what varies from machine to machine."""
    return line.strip() if EXACT.match(line) else VARIES.sub("#", line).strip("# ")


def main() -> None:
    """Run the README; exit with 1 where a command fails or prints something else."""
    text = README.read_text(encoding="utf-8")
    found = list(commands(text))
    began = time.monotonic()
    faults = 0
    lines = text.splitlines()
    for command, (code, printed) in reversed(list(zip(found, run(found), strict=True))):
        if code:
            faults += 1
            print(f"$ {command.text}\nexit code {code}:", *printed, sep="\n")
        elif command.output and "--write" in sys.argv:
            lines[command.start : command.end] = [f"    {line}" for line in printed]
        elif command.output and list(map(masked, command.output)) != list(map(masked, printed)):
            faults += 1
            print(f"$ {command.text}\nprints what the README does not say:", *printed, sep="\n")
    if "--write" in sys.argv and not faults:
        README.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(found)} commands of the README, {faults} faults, {time.monotonic() - began:,.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
