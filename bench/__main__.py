"""The command line of the benchmarks: `python -m bench NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from scorer.config import DEFAULT_MODEL, ENGINES
from scorer.types import ScorerError, one_of

EXAMPLES = Path(__file__).parent.parent / "examples" / "alpaca.json"


DATA = click.option(
    "--data", type=click.Path(exists=True, dir_okay=False), default=str(EXAMPLES), help="A dataset that scorer reads."
)
SAVE = click.option("--save", is_flag=True, help="Write the result to bench/results.")
TINY = click.option("--tiny", is_flag=True, help="Only try it, with a tiny shape on a CPU; TRITON_INTERPRET=1 is set.")


@click.group(context_settings={"show_default": True})
def bench() -> None:
    """Measure scorer on this machine. Each benchmark checks correctness first and prints JSON on its last line."""


@bench.command()
@DATA
@click.option("--rows", default=256, help="Rows to score.")
@click.option("--model", default="smollm2-135m", help="A model that the packed engine runs.")
@click.option("--repeats", default=3, help="Rounds; every engine runs once a round, and the median is reported.")
@click.option("--agreement-rows", default=0, help="Rows to compare bfloat16 with float32 on; 0: those of --rows.")
@click.option(
    "--only", multiple=True, metavar="ENGINE", help="An engine's name in the table; repeatable.  [default: all]"
)
@click.option("--compiled", is_flag=True, help="vLLM compiles the model, in our engine and in stock vLLM.")
@click.option("--gpu-memory-utilization", default=0.3, help="CUDA: share of the memory for each of two vLLM.")
@click.option("--dummy-weights", is_flag=True, help="Random weights; --model is a name in bench/lib/shapes.py.")
@SAVE
def engines(save: bool, only: tuple[str, ...], **options: Any) -> None:
    """Compare the engines, and stock vLLM if installed, on the same rows."""
    from bench.engines import NAMES, EnginesConfig, run
    from bench.lib.report import finish

    for name in only:
        one_of("--only", name, NAMES)
    config = EnginesConfig(only=only, **options)
    finish("engines", run(config), save, *_labels(config.dummy_weights, config.model))


@bench.command()
@click.option("--weak", required=True, help="A model that `scorer score --model` takes; with --dummy-weights, a shape.")
@click.option("--strong", required=True, help="The same.")
@click.option("--dummy-weights", is_flag=True, help="Random weights in a shape of bench/lib/shapes.py; no download.")
@click.option("--weak-engine", default="auto", type=click.Choice(ENGINES), help="The weak scorer's engine.")
@click.option("--strong-engine", default="auto", type=click.Choice(ENGINES), help="The strong scorer's engine.")
@click.option("--compiled", is_flag=True, help="vLLM compiles the models.")
@DATA
@click.option("--rows", default=256, help="Rows to score.")
@click.option("--repeats", default=1, help="How often each scorer runs; the median is reported.")
@SAVE
def scorers(save: bool, compiled: bool, data: str, rows: int, repeats: int, **options: Any) -> None:
    """Compare a weak scorer with a strong one: the speed-up, and with real weights the agreement."""
    from bench.lib.report import finish
    from bench.scorers import Sample, Scorer, run

    vllm_args = {"enforce_eager": not compiled}
    weak, strong = (Scorer(options[side], options[f"{side}_engine"], vllm_args) for side in ("weak", "strong"))
    dummy_weights = options["dummy_weights"]
    result = run(Sample(data, rows, repeats), weak, strong, dummy_weights)
    finish("scorers", result, save, *_labels(dummy_weights, weak.model, strong.model))


@bench.command()
@click.option("--milliseconds", default=1000, help="Time to measure each rival on each shape.")
@TINY
@SAVE
def kernel(milliseconds: int, tiny: bool, save: bool) -> None:
    """Compare the fused head with its rivals (on a GPU, install the extra `bench` first)."""
    from bench.kernel import run
    from bench.lib.report import finish

    finish("kernel", run(milliseconds, tiny), save)


@bench.command()
@click.option("--milliseconds", default=200, help="Time to measure each configuration on each shape.")
@click.option("--shape", "shapes", multiple=True, help="A shape of `kernel`; repeatable.  [default: all]")
@TINY
@SAVE
def tune(milliseconds: int, shapes: tuple[str, ...], tiny: bool, save: bool) -> None:
    """Time every configuration of the head on this GPU, for scorer_kernels/table.py."""
    from bench.kernel import SHAPES
    from bench.kernel import tune as tune_head
    from bench.lib.report import finish

    for name in shapes:
        one_of("--shape", name, tuple(shape.name for shape in SHAPES))
    finish("tune", tune_head(milliseconds, shapes, tiny), save)


@bench.command()
@TINY
@SAVE
def exact(tiny: bool, save: bool) -> None:
    """Check the Triton kernels against float64 on this GPU."""
    from bench.exact import run
    from bench.lib.report import finish

    result = run(tiny)
    finish("exact", result, save)
    _check_none_wrong(result)


@bench.command()
@DATA
@click.option("--rows", default=8, help="Rows to score.")
@click.option(
    "--family", "families", multiple=True, help="A name in bench/lib/families.py; repeatable.  [default: all]"
)
@SAVE
def families(data: str, rows: int, families: tuple[str, ...], save: bool) -> None:
    """Check the packed engine against the reference, with a tiny random model of every family."""
    from bench.families import run
    from bench.lib.families import CONFIGS
    from bench.lib.report import finish

    for name in families:
        one_of("--family", name, CONFIGS)
    result = run(families, data, rows)
    finish("families", result, save)
    _check_none_wrong(result)


@bench.command()
@DATA
@click.option("--rows", default=45_336, help="Rows to score; the data are repeated.")
@click.option("--shape", default="gpt2", help="A name in bench/lib/shapes.py; the weights are random.")
@SAVE
def score(data: str, rows: int, shape: str, save: bool) -> None:
    """Measure all of `scorer score`, from a JSON Lines file to a run, and what the device does meanwhile."""
    from bench.lib.report import finish
    from bench.score import run

    finish("score", run(data, rows, shape), save, shape)


@bench.command()
@DATA
@click.option("--rows", default=45_336, help="Rows to write; the data are repeated.")
@click.option("--output", required=True, type=click.Path(dir_okay=False), help="A JSON Lines file.")
def rows(data: str, rows: int, output: str) -> None:
    """Write a larger file of a dataset's rows, and say what this machine is."""
    from bench.host import repeat
    from bench.lib.report import finish

    repeat(data, rows, Path(output))
    finish("rows", {"data": Path(data).name, "rows": rows}, save=False)


@bench.command()
@DATA
@click.option(
    "--output", type=click.Path(dir_okay=False), help="A JSON file.  [default: bench/results/gpu-DEVICE.json]"
)
@click.option(
    "--dry", is_flag=True, help="Try every step on a CPU with tiny shapes; --output is in a temporary folder."
)
def gpu(data: str, output: str | None, dry: bool) -> None:
    """Check and measure everything on one GPU in eight minutes, without a network: see docs/benchmarks.md."""
    from bench.gpu import run

    run(data, Path(output) if output else None, dry)


@bench.command()
@click.option("--rows", default=10_000_000, help="Rows of the synthetic score table.")
@click.option("--clusters", default=4_000, help="Clusters to select from.")
@SAVE
def select(rows: int, clusters: int, save: bool) -> None:
    """Select a tenth of each cluster of a synthetic score table."""
    from bench.lib.report import finish
    from bench.select import run

    finish("select", run(rows, clusters), save)


@bench.command()
@click.option("--rows", default=200_000, help="Number of synthetic embeddings.")
@click.option("--clusters", default=4000, help="Number of clusters.")
@click.option("--width", default=384, help="Dimension of an embedding.")
@SAVE
def cluster(rows: int, clusters: int, width: int, save: bool) -> None:
    """Time k-means as `scorer cluster` runs it."""
    from bench.cluster import run
    from bench.lib.report import finish

    finish("cluster", run(rows, clusters, width), save)


@bench.command()
@DATA
@click.option("--rows", default=256, help="Rows to embed.")
@click.option("--embedder", default="all-minilm-l6-v2", help="An embedder that `scorer cluster` takes.")
@click.option("--repeats", default=5, help="Rounds; the median is reported.")
@SAVE
def embed(data: str, rows: int, embedder: str, repeats: int, save: bool) -> None:
    """Time the embedding of a dataset's rows, as `scorer cluster` does it."""
    from bench.embed import run
    from bench.lib.report import finish

    finish("embed", run(data, rows, embedder, repeats), save)


@bench.command()
@DATA
@click.option("--rows", default=300, help="Rows to train on.")
@click.option("--model", default="smollm2-135m", help="The weak model to fine-tune.")
@click.option("--epochs", default=1, help="Epochs of training.")
@SAVE
def learning(data: str, rows: int, model: str, epochs: int, save: bool) -> None:
    """Time Learning Percentage end to end: fine-tune, score, cluster, select, report."""
    from bench.learning import run
    from bench.lib.report import finish

    finish("learning", run(data, rows, model, epochs), save)


@bench.command()
@click.argument("folder")
@DATA
@SAVE
def validation(folder: str, data: str, save: bool) -> None:
    """Report what a finished `scorer validate` of a run of the data found in FOLDER."""
    from bench.lib.report import finish
    from bench.validation import run

    report = run(folder, data)
    finish("validation", report, save, f"equal-{report['equal']}")


@bench.command()
@DATA
@click.option("--scored", default=256, help="Rows to score, to measure the size of a shard.")
@click.option("--model", default="smollm2-135m", help="Its tokenizer counts the tokens, and it scores --scored rows.")
@click.option("--samples", default=1_000_000_000, help="Rows of the simulated run.")
@SAVE
def scaling(data: str, scored: int, model: str, samples: int, save: bool) -> None:
    """Simulate a billion samples on 1, 8 and 64 H100, from the costs of a row on this machine."""
    from bench.lib.report import finish
    from bench.scaling import run

    finish("scaling", run(data, scored, model, samples), save)


@bench.command()
@DATA
@click.option("--rows", default=45_336, help="Rows of the whole path; the data are repeated.")
@SAVE
def host(data: str, rows: int, save: bool) -> None:
    """Measure the path from a JSON Lines file to packed batches, with an engine that computes nothing."""
    from rich.console import Console

    from bench.host import run
    from bench.lib.report import finish

    finish("host", run(data, rows, Console(stderr=True)), save)


@bench.command()
@click.option("--rows", default=5_000_000, help="Rows of the made-up run.")
@click.option("--repeats", default=3, help="Rounds; the median is reported.")
@click.option("--rows-per-second", default=30_000.0, help="Of scoring: by default what `host` measures.")
@SAVE
def verify(save: bool, rows: int, repeats: int, rows_per_second: float) -> None:
    """Measure what it costs to verify the shards of a run, against scoring and selecting."""
    from bench.lib.report import finish
    from bench.verify import run

    finish("verify", run(rows, repeats, rows_per_second), save)


@bench.command()
@DATA
@click.option("--rows", default=1000, help="Rows to score.")
@click.option("--model", default=DEFAULT_MODEL, help="A model that `scorer score --model` takes.")
@click.option("--repeats", default=1, help="Rounds of a local run and a run over Ray; the median is reported.")
@click.option(
    "--pair-rows", default=200, help="Rows to compare two workers with a local run on, in both dtypes; 0: skip."
)
@SAVE
def ray(data: str, rows: int, model: str, repeats: int, pair_rows: int, save: bool) -> None:
    """Compare one worker over Ray with a local run, and check that two workers give the same table."""
    from bench.lib.report import finish
    from bench.ray_runs import run

    finish("ray", run(data, rows, model, repeats, pair_rows), save, *_labels(False, model))


@bench.command()
@click.option("--rows", default=1_000_000, help="Short rows to score, with a tiny model.")
@click.option("--shard-rows", default=5_000, help="Rows of a shard.")
@click.option("--workers", default=1, help="Ray workers on this machine.")
@SAVE
def ray_million(rows: int, shard_rows: int, workers: int, save: bool) -> None:
    """Watch the memory and open files of every process of a long run over Ray."""
    from bench.lib.report import finish
    from bench.ray_runs import long_run

    finish("ray-million", long_run(rows, shard_rows, workers), save)


@bench.command()
@click.option("--check", is_flag=True, help="Fail if a page differs from the results.")
def readme(check: bool) -> None:
    """Write the figures of bench/results into the pages."""
    from bench.lib.readme import update

    update(check)


def _labels(dummy_weights: bool, *models: str) -> list[str]:
    """The part of a result's file name that tells its models apart; empty for the default model."""
    names = [Path(model).name for model in models]
    return [] if names == [DEFAULT_MODEL] else [*names, *(["dummy"] if dummy_weights else [])]


def _check_none_wrong(result: dict[str, Any]) -> None:
    if result["wrong"]:
        raise SystemExit(f"wrong: {', '.join(result['wrong'])}")


def main() -> None:
    """Run the command of sys.argv."""
    try:
        bench()
    except ScorerError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
