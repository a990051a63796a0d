"""`python -m bench NAME`: the benchmarks by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from scorer.config import DEFAULT_MODEL, ENGINES
from scorer.types import ScorerError, one_of

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
@click.option("--only", multiple=True, metavar="ENGINE", help="Its name in the table; repeatable.  [default: all]")
@click.option("--compiled", is_flag=True, help="Compile every vLLM, ours and stock; they start a minute later.")
@click.option("--gpu-memory-utilization", default=0.3, help="On CUDA: the share of its memory for each of two vLLM.")
@click.option("--dummy-weights", is_flag=True, help="Random weights: --model is a shape of bench/shapes.py.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def engines(save: bool, only: tuple[str, ...], **options: Any) -> None:
    """The engines, and stock vLLM where there is one, on the same rows."""
    from bench.engines import NAMES, EnginesConfig, run
    from bench.lib.report import finish

    for name in only:
        one_of("--only", name, NAMES)
    config = EnginesConfig(only=only, **options)
    finish("engines", run(config), save, *_labels(config.dummy_weights, config.model))


@bench.command()
@click.option("--weak", required=True, help="Any model that `scorer score --model` takes; or a shape.")
@click.option("--strong", required=True, help="The same.")
@click.option("--dummy-weights", is_flag=True, help="Random weights, in the shapes of bench/shapes.py; no download.")
@click.option("--weak-engine", default="auto", type=click.Choice(ENGINES), help="Of the weak scorer.")
@click.option("--strong-engine", default="auto", type=click.Choice(ENGINES), help="Of the strong scorer.")
@click.option("--compiled", is_flag=True, help="Compile the models that vLLM runs.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--rows", default=256, help="Rows to score.")
@click.option("--repeats", default=1, help="How often each scores them; medians are reported.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def scorers(
    weak: str,
    strong: str,
    dummy_weights: bool,
    weak_engine: str,
    strong_engine: str,
    compiled: bool,
    data: str,
    rows: int,
    repeats: int,
    save: bool,
) -> None:
    """A weak scorer against a strong one: the speed-up, and with real weights how far they agree."""
    from bench.lib.report import finish
    from bench.scorers import Scorer, run

    vllm_args = {"enforce_eager": not compiled}
    sides = (Scorer(weak, weak_engine, vllm_args), Scorer(strong, strong_engine, vllm_args))
    finish("scorers", run(data, rows, *sides, repeats, dummy_weights), save, *_labels(dummy_weights, weak, strong))


@bench.command()
@click.option("--milliseconds", default=1000, help="How long each rival is timed on each shape.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def kernel(milliseconds: int, save: bool) -> None:
    """The fused head against its rivals (on a GPU, install the extra `bench` first)."""
    from bench.kernel import run
    from bench.lib.report import finish

    finish("kernel", run(milliseconds), save)


@bench.command()
@click.option("--milliseconds", default=200, help="How long each configuration is timed on each shape.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def tune(milliseconds: int, save: bool) -> None:
    """Every configuration of the head on this GPU, for scorer_kernels/table.py."""
    from bench.kernel import tune as tune_head
    from bench.lib.report import finish

    finish("tune", tune_head(milliseconds), save)


@bench.command()
@click.option("--rows", default=10_000_000, help="Rows of a synthetic score table.")
@click.option("--clusters", default=4_000, help="Clusters to share the selection out over.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def select(rows: int, clusters: int, save: bool) -> None:
    """Keep a tenth per cluster of a synthetic score table."""
    from bench.lib.report import finish
    from bench.select import run

    finish("select", run(rows, clusters), save)


@bench.command()
@click.option("--rows", default=200_000, help="Synthetic embeddings.")
@click.option("--clusters", default=4000, help="Of k-means.")
@click.option("--width", default=384, help="Of an embedding.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def cluster(rows: int, clusters: int, width: int, save: bool) -> None:
    """K-means of embeddings, as `scorer cluster` runs it."""
    from bench.cluster import run
    from bench.lib.report import finish

    finish("cluster", run(rows, clusters, width), save)


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--rows", default=256, help="Rows to embed.")
@click.option("--embedder", default="all-minilm-l6-v2", help="Any embedder that `scorer cluster` takes.")
@click.option("--repeats", default=5, help="Rounds; medians are reported.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def embed(data: str, rows: int, embedder: str, repeats: int, save: bool) -> None:
    """Embeddings of a dataset's rows, as `scorer cluster` makes them."""
    from bench.embed import run
    from bench.lib.report import finish

    finish("embed", run(data, rows, embedder, repeats), save)


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--rows", default=300, help="Rows to learn from.")
@click.option("--model", default="smollm2-135m", help="The weak model to fine-tune.")
@click.option("--epochs", default=1, help="Epochs of training.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def learning(data: str, rows: int, model: str, epochs: int, save: bool) -> None:
    """Learning percentage end to end: fine-tune, score, cluster, select, report."""
    from bench.learning import run
    from bench.lib.report import finish

    finish("learning", run(data, rows, model, epochs), save)


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--scored", default=256, help="Rows of it to score, for the size of a shard.")
@click.option("--model", default="smollm2-135m", help="Whose tokenizer counts, and what scores those rows.")
@click.option("--samples", default=1_000_000_000, help="Rows of the run that is simulated.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def scaling(data: str, scored: int, model: str, samples: int, save: bool) -> None:
    """A billion samples on one H100, eight and 64: simulated, from what a row takes here."""
    from bench.lib.report import finish
    from bench.scaling import run

    finish("scaling", run(data, scored, model, samples), save)


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset.")
@click.option("--rows", default=1000, help="Rows to score.")
@click.option("--model", default=DEFAULT_MODEL, help="Any model that `scorer score --model` takes.")
@click.option("--repeats", default=1, help="How often both sides score them, in turn; medians are reported.")
@click.option("--pair-rows", default=200, help="Rows for two workers against none, in both dtypes; 0: leave them out.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def ray(data: str, rows: int, model: str, repeats: int, pair_rows: int, save: bool) -> None:
    """One worker over Ray against a run without it, and that two workers give the same table."""
    from bench.lib.report import finish
    from bench.ray_runs import run

    finish("ray", run(data, rows, model, repeats, pair_rows), save, *_labels(False, model))


@bench.command()
@click.option("--rows", default=1_000_000, help="Short rows, for a tiny model.")
@click.option("--shard-rows", default=5_000, help="Of one shard.")
@click.option("--workers", default=1, help="Over Ray, on this machine.")
@click.option("--save", is_flag=True, help="Write the result under bench/results.")
def ray_million(rows: int, shard_rows: int, workers: int, save: bool) -> None:
    """A long run over Ray: memory and open files of every process, from its beginning to its end."""
    from bench.lib.report import finish
    from bench.ray_runs import long_run

    finish("ray-million", long_run(rows, shard_rows, workers), save)


@bench.command()
@click.option("--check", is_flag=True, help="Fail if the README is not what the results say.")
def readme(check: bool) -> None:
    """Put the figures of bench/results into the README."""
    from bench.lib.readme import update

    update(check)


def _labels(dummy_weights: bool, *models: str) -> list[str]:
    """What tells a result apart from those of other models; nothing for the default one."""
    names = [Path(model).name for model in models]
    return [] if names == [DEFAULT_MODEL] else [*names, *(["dummy"] if dummy_weights else [])]


if __name__ == "__main__":
    try:
        bench()
    except ScorerError as error:
        raise SystemExit(f"error: {error}") from error
