"""The figures in README.md and docs/: taken from bench/results, never written by hand.

The text between `<!-- bench:NAME -->` and `<!-- /bench -->` is made from the results whose benchmark is NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.lib.report import RESULTS
from scorer.agreement.statistics import Estimate
from scorer.validation.comparison import Comparison

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def engines_table(result: dict[str, Any]) -> str:
    """A line per engine, and below the table what does not fit into it."""
    lines = [
        f"{_machine(result)}; {result['model']}, {result['rows']} rows of `{result['data']}`, "
        f"{result['tokens']:,} tokens:",
        "",
        "| engine | rows/s | tokens/s | × reference | of the bound |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in result["engines"].items():
        times = figures["times_reference"]
        lines.append(
            f"| {name} | {figures['rows_per_second']:.2f} | {figures['tokens_per_second']:,.0f} "
            f"| {'-' if times is None else f'{times:.2f}'} | {figures['fraction_of_bound']:.0%} |"
        )
    notes = []
    if result["largest_relative_error"] is not None:
        notes.append(
            f"packed against reference in float32: largest relative error {result['largest_relative_error']:.0e}."
        )
    if agreement := result.get("bfloat16_against_float32"):
        notes.append(
            f"bfloat16 against float32 over {agreement['rows']:,} rows: Spearman of IFD "
            f"{agreement['spearman_ifd']:.4f}, overlap of the top tenth {agreement['top_10_percent_overlap']:.2f}."
        )
    if result["overhead_fraction"] is not None:
        notes.append(f"Reading, tokenising and writing: {result['overhead_fraction']:.1%} of a run.")
    if vllm := result.get("vllm"):
        notes += _vllm_sentences(vllm, result["engines"])
    if result.get("dummy_weights"):
        notes.append("Random weights, and random tokens of the rows' lengths.")
    return "\n".join([*lines, "", " ".join([*notes, f"(`{result['command']}`)"])])


def _vllm_sentences(vllm: dict[str, Any], engines: dict[str, Any]) -> list[str]:
    """How the vLLM engine compares with stock vLLM and with float32, and what was not measured."""
    notes = []
    mode = "compiled" if vllm["compiled"] else "eager"
    versions = ", ".join(f"{name} {release}" for name, release in vllm["versions"].items())
    if ratios := [f"{ratio:.2f} times {name}" for name, ratio in vllm["times_stock"].items()]:
        notes.append(f"vllm bfloat16 ({versions}, {mode}): {', '.join(ratios)}.")
    for name, figures in engines.items():
        if name.startswith("vllm") and "spearman_ifd" in figures:
            notes.append(
                f"{name} against {figures['compared_with']}: Spearman of IFD {figures['spearman_ifd']:.4f}, "
                f"overlap of the top tenth {figures['top_10_percent_overlap']:.2f}."
            )
    return notes + [f"{name} is left out: {why.rstrip('.')}." for name, why in vllm["left_out"].items()]


def scorers_table(result: dict[str, Any]) -> str:
    """A line per scorer, then the speed-up and how far the two agree."""
    lines = [
        f"{_machine(result)}; {result['rows']} rows of `{result['data']}`:",
        "",
        "| scorer | engine | parameters | rows/s | tokens/s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for side in ("weak", "strong"):
        figures = result[side]
        lines.append(
            f"| {side}: {figures['model']} | {figures['engine']} {figures['dtype']} "
            f"| {figures['parameters'] / 1e6:,.0f}M | {figures['rows_per_second']:.2f} "
            f"| {figures['tokens_per_second']:,.0f} |"
        )
    notes = [f"The weak scorer is {result['speed_up']['rows_per_second']:.1f} times as fast."]
    for name, title in (("ppl_conditioned", "perplexity"), ("ifd", "IFD")):
        if found := (result["agreement"] or {}).get(name):
            overlap = ", ".join(f"{_figure(own)} of the top {share}" for share, own in found["overlap"].items())
            notes.append(f"Spearman of {title}: {_figure(found['spearman'])}; overlap: {overlap}.")
    if result["dummy_weights"]:
        notes.append("Random weights, and random tokens of the rows' lengths.")
    return "\n".join([*lines, "", " ".join([*notes, f"(`{result['command']}`)"])])


def _figure(figure: dict[str, Any]) -> str:
    return "not defined" if figure["value"] is None else f"{figure['value']:.3f}"


def kernel_table(result: dict[str, Any]) -> str:
    """The milliseconds of each rival at each shape."""
    names = list(result["shapes"][0]["rivals"])
    rows = "CPU path, " if result["device"] == "cpu" else ""
    lines = [
        f"The head alone, {result['dtype']}, milliseconds ({rows}{_machine(result)}; `{result['command']}`):",
        "",
        f"| rows × hidden size × vocabulary | {' | '.join(names)} |",
        f"| --- |{' ---: |' * len(names)}",
    ]
    for shape in result["shapes"]:
        times = [shape["rivals"].get(name, {}).get("milliseconds") for name in names]
        cells = " | ".join("-" if t is None else f"{t:,.1f}" for t in times)
        lines.append(f"| {shape['rows']:,} x {shape['hidden_size']:,} x {shape['vocab_size']:,} | {cells} |")
    return "\n".join(lines)


def learning_table(result: dict[str, Any]) -> str:
    """The result of one fine-tuning, in a sentence."""
    medians = " → ".join(f"{value:.2f}" for value in result["median_perplexity_by_epoch"])
    quantiles = result["lp1_approx_quantiles"]
    return (
        f"Measured on {result['rows']} rows of `{result['data']}` with {result['model']}, {result['epochs']} epoch "
        f"({_machine(result)}): the median perplexity of the training rows went {medians}, and fell for "
        f"{result['share_of_rows_that_fell']:.0%} of them; the median of `lp1_approx` is {quantiles['0.5']:.4f}, its "
        f"tenths go from {quantiles['0.1']:.4f} to {quantiles['0.9']:.4f}; training and scoring took "
        f"{result['seconds']['learn']:,.0f} s, clusters {result['seconds']['cluster']:,.0f} s. (`{result['command']}`)"
    )


def validation_table(result: dict[str, Any]) -> str:
    """A line per arm, and a line per arm against the random one."""
    found, recipe = Comparison.from_dict(result["results"]), result["recipe"]
    bands = list(found.sizes["length"])
    heads = ["records", "response tokens", "NLL a token", "mean of rows", *bands, "hardest third"]
    how = "all weights" if recipe["lora"] is None else f"LoRA of rank {recipe['lora']['rank']}"
    lines = [
        f"{result['target']} on `{result['data']}`, {how}, {recipe['epochs']} epoch at {recipe['learning_rate']:g} in "
        f"batches of {recipe['batch_size']}, {len(result['seeds'])} seeds, arms of equal {result['equal']}; "
        f"{found.records} held-out records ({', '.join(f'{n} {band}' for band, n in found.sizes['length'].items())}); "
        f"{_machine(result)}:",
        "",
        f"| arm | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for arm in found.arms:
        figures = [arm.nll_per_token, arm.mean_of_rows, *(arm.by["length"][band] for band in bands), arm.hardest_third]
        sizes = ["-" if size is None else f"{size:,.0f}" for size in (arm.records, arm.tokens)]
        lines.append(f"| {arm.arm} | {' | '.join([*sizes, *(_nats(figure, '.4f') for figure in figures)])} |")
    lines += [
        "",
        f"| against {found.baseline} | NLL a token | mean of rows | hardest third | win rate |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for pair in found.against_baseline:
        differences = [
            f"{_nats(of, '+.4f')} ({_nats(of, '+.4f', 'low')} to {_nats(of, '+.4f', 'high')})"
            for of in (pair.nll_per_token, pair.mean_of_rows, pair.hardest_third)
        ]
        rate = pair.win_rate
        won = f"{_nats(rate, '.1%')} ({_nats(rate, '.1%', 'low')} to {_nats(rate, '.1%', 'high')})"
        lines.append(f"| {pair.arm} | {' | '.join([*differences, won])} |")
    return "\n".join([*lines, "", f"(`{result['command']}`)"])


def _nats(of: Estimate, digits: str, end: str = "value") -> str:
    value = getattr(of, end)
    return "-" if value is None else format(value, digits)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "engines": engines_table,
    "kernel": kernel_table,
    "learning": learning_table,
    "scorers": scorers_table,
    "validation": validation_table,
}


def update(check: bool, root: Path = ROOT) -> None:
    """Write the tables into README.md and docs/ below `root`, or with `check` exit where one differs."""
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        made = SECTION.sub(lambda match: match[1] + _tables(match[2]) + match[3], text)
        if made != text and check:
            raise SystemExit(f"{page.relative_to(root)} differs from bench/results: run `python -m bench readme`")
        if made != text:
            page.write_text(made, encoding="utf-8")


def _tables(name: str) -> str:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return "".join(TABLES[name](result) + "\n" for result in results if result["benchmark"] == name)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return str(machine["gpu"] or f"{machine['cpu']}, {machine['threads']} cores")
