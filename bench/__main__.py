"""`python -m bench NAME`: the benchmarks by name."""

from __future__ import annotations

from pathlib import Path

import click

EXAMPLES = Path(__file__).parent.parent / "examples" / "alpaca.json"


@click.group(context_settings={"show_default": True})
def bench() -> None:
    """Measure scorer on this machine. Correctness is checked first; the last line is JSON."""


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--rows", default=256, help="Rows to score.")
@click.option("--model", default="smollm2-135m", help="Any model that the packed engine runs.")
@click.option("--repeats", default=3, help="Rounds; every engine runs once a round, and medians are reported.")
@click.option("--agreement-rows", default=0, help="Rows for bfloat16 against float32; 0: those of --rows.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def engines(data: str, rows: int, model: str, repeats: int, agreement_rows: int, save: bool) -> None:
    """Reference against packed, on the same rows."""
    from bench.engines import run
    from bench.report import finish

    finish("engines", run(data, rows, model, repeats, agreement_rows), save)


@bench.command()
@click.option("--check", is_flag=True, help="Fail if the README is not what the results say.")
def readme(check: bool) -> None:
    """Put the figures of bench/results into the README."""
    from bench.readme import update

    update(check)


if __name__ == "__main__":
    bench()
