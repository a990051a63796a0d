"""The figures in the README: taken from bench/results, never written by hand.

Between `<!-- bench:NAME -->` and `<!-- /bench -->` stands a table made from the results whose benchmark is NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import RESULTS

README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def engines_table(result: dict[str, Any]) -> str:
    """One line an engine, and what the table can't say below it."""
    lines = [
        f"{_where(result)}; {result['model']}, {result['rows']} rows of `{result['data']}`, "
        f"{result['tokens']:,} tokens:",
        "",
        "| engine | rows/s | tokens/s | × reference | of the bound |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in result["engines"].items():
        lines.append(
            f"| {name} | {figures['rows_per_second']:.2f} | {figures['tokens_per_second']:,.0f} "
            f"| {figures['times_reference']:.2f} | {figures['fraction_of_bound']:.0%} |"
        )
    agreement = result["bfloat16_against_float32"]
    lines += [
        "",
        f"packed against reference in float32: largest relative error {result['largest_relative_error']:.0e}. bfloat16 "
        f"against float32 over {agreement['rows']:,} rows: Spearman of IFD {agreement['spearman_ifd']:.4f}, overlap of "
        f"the top tenth {agreement['top_10_percent_overlap']:.2f}. Reading, tokenising and writing: "
        f"{result['overhead_fraction']:.1%} of a run. (`{result['command']}`)",
    ]
    return "\n".join(lines)


def kernel_table(result: dict[str, Any]) -> str:
    """Milliseconds of each shape by rival."""
    names = list(result["shapes"][0]["rivals"])
    rows = "CPU path, " if result["device"] == "cpu" else ""
    lines = [
        f"The head alone, {result['dtype']}, milliseconds ({rows}{_where(result)}; `{result['command']}`):",
        "",
        f"| rows x width x vocabulary | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for shape in result["shapes"]:
        times = [shape["rivals"].get(name, {}).get("milliseconds") for name in names]
        cells = " | ".join("-" if t is None else f"{t:,.1f}" for t in times)
        lines.append(f"| {shape['rows']:,} x {shape['width']:,} x {shape['words']:,} | {cells} |")
    return "\n".join(lines)


def learning_table(result: dict[str, Any]) -> str:
    """What one fine-tuning did, in a sentence."""
    medians = " → ".join(f"{value:.2f}" for value in result["median_perplexity_by_epoch"])
    quantiles = result["lp1_approx_quantiles"]
    return (
        f"Measured on {result['rows']} rows of `{result['data']}` with {result['model']}, {result['epochs']} epoch "
        f"({_where(result)}): the median perplexity of the training rows went {medians}, and fell for "
        f"{result['share_of_rows_that_fell']:.0%} of them; the median of `lp1_approx` is {quantiles['0.5']:.4f}, its "
        f"tenths go from {quantiles['0.1']:.4f} to {quantiles['0.9']:.4f}; training and scoring took "
        f"{result['seconds']['learn']:,.0f} s, clusters {result['seconds']['cluster']:,.0f} s. (`{result['command']}`)"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "engines": engines_table,
    "kernel": kernel_table,
    "learning": learning_table,
}


def update(check: bool) -> None:
    """Write the tables into the README, or with `check` fail where they differ."""
    text = README.read_text(encoding="utf-8")
    made = SECTION.sub(lambda match: match[1] + _tables(match[2]) + match[3], text)
    if check and made != text:
        raise SystemExit("README.md is not what bench/results says: run `python -m bench readme`")
    README.write_text(made, encoding="utf-8")


def _tables(name: str) -> str:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return "".join(TABLES[name](result) + "\n" for result in results if result["benchmark"] == name)


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return str(machine["gpu"] or f"{machine['cpu']}, {machine['threads']} cores")
