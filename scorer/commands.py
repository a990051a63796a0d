"""The command line: parses options, calls the library, and turns its errors into one line and an exit code.

Exit codes: 0 done; 1 the machine failed, and the same command resumes; 2 the input or an option has to be mended;
130 interrupted, and the same command resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from errno import ENOSPC
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from scorer.config import COLUMNS, DEVICES, DTYPES, ENGINES, ScoreConfig
from scorer.protocols import PROTOCOLS
from scorer.types import ScorerError

DEFAULTS = ScoreConfig()
Command = Callable[..., None]


def main() -> None:
    """The console command `scorer`."""
    try:
        cli.main(sys.argv[1:] or ["--help"], "scorer", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except ScorerError as error:
        _end(str(error), error.exit_code)
    except BrokenPipeError:  # such as `scorer models | head -1`
        sys.stdout = None  # else Python would try to flush it, and complain
        sys.exit(1)
    except OSError as error:
        if error.errno != ENOSPC or error.filename is not None:
            raise
        sys.stdout = None
        _end(f"standard output: can't be written ({error.strerror})", 1)
    except (click.Abort, KeyboardInterrupt):
        _end("interrupted; the same command resumes a run after its last whole shard", 130)


def _end(message: str, exit_code: int) -> NoReturn:
    click.echo(f"scorer: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="ifd-scorer")
def cli() -> None:
    """Score instruction-tuning data with a weak language model, and select the samples worth training on."""


def score_options(command: Command) -> Command:
    """Data, and the options that are fields of ScoreConfig."""
    protocol = click.option(
        "--protocol", type=click.Choice(tuple(PROTOCOLS)), default=DEFAULTS.protocol, help="How text becomes tokens."
    )
    return click.argument("data", nargs=-1, required=True)(protocol(engine_options(command)))


revision_option = click.option(
    "--revision", help="Revision of a Hugging Face model.  [default: what is cached, else its newest]"
)
pickle_option = click.option("--allow-pickle", is_flag=True, help="Load weights that may run code.  [default: no]")
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model.  [default: no]"
)


def engine_options(command: Command) -> Command:
    """The options that are fields of ScoreConfig, but for the protocol."""
    for option in reversed(
        (
            click.option(
                "--engine",
                default=DEFAULTS.engine,
                metavar=f"{'|'.join(ENGINES)}|URL",
                help="auto: packed for weak models, vllm for larger ones and for what packed can't run. "
                "URL: a server's, http://HOST:PORT.",
            ),
            click.option(
                "--shard-rows", type=int, default=DEFAULTS.shard_rows, help="Records a shard: what a kill can lose."
            ),
            click.option("--limit", type=int, help="Score the first so many records only.  [default: all]"),
            click.option(
                "--columns",
                callback=parse_columns,
                metavar="KEY=NAME,...",
                help=f"Your names for {', '.join(COLUMNS)}.  [default: recognised]",
            ),
            click.option(
                "--strict", is_flag=True, help="Stop at the first record that can't be scored.  [default: no]"
            ),
        )
    ):
        command = option(command)
    return model_options(command)


def model_options(command: Command) -> Command:
    """The options that are of the model and of how it is run."""
    for option in reversed(
        (
            click.option(
                "--model", default=DEFAULTS.model, help="An embedded name, a local folder, or a Hugging Face name."
            ),
            revision_option,
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default=DEFAULTS.dtype,
                help="auto: bfloat16 where the hardware has it, else float32.",
            ),
            click.option(
                "--device", type=click.Choice(DEVICES), default=DEFAULTS.device, help="auto: cuda if there is one."
            ),
            click.option("--max-length", type=int, help="Tokens of prompt and response.  [default: the protocol's]"),
            click.option("--batch-tokens", type=int, help="Tokens in one batch.  [default: by engine and device]"),
            trust_option,
            pickle_option,
            click.option("--tensor-parallel-size", type=int, help="vllm: devices that share one model.  [default: 1]"),
            click.option("--quantization", help="vllm: a method of vLLM's.  [default: the model's own]"),
            click.option(
                "--gpu-memory-utilization",
                type=float,
                help="vllm: share of the device's memory to take.  [default: vLLM's]",
            ),
            click.option("--max-model-len", type=int, help="vllm: tokens of its longest sequence.  [default: enough]"),
            click.option(
                "--vllm-arg",
                "vllm_args",
                multiple=True,
                callback=parse_vllm_args,
                metavar="KEY=VALUE",
                help="vllm: any other engine argument, the value as JSON or as it is; may be given again.  "
                "[default: none]",
            ),
        )
    ):
        command = option(command)
    return command


def select_options(command: Command) -> Command:
    """The options of a selection."""
    for option in reversed(
        (
            click.option("--keep", help="A share of all records, or a number of records.  [default: 10%]"),
            click.option("--by", help="Column to rank by.  [default: the protocol's own, mostly ifd]"),
            click.option(
                "--lowest/--highest",
                default=None,
                help="Which end to keep.  [default: lowest for LP, else mostly highest]",
            ),
            click.option("--max-ifd", type=float, default=1.0, help="Drop records whose ifd is not below this."),
            click.option("--no-max-ifd", is_flag=True, help="Keep records of any ifd.  [default: no]"),
            click.option("--per", metavar="COLUMN", help="A quota per value of a column of the data.  [default: none]"),
            click.option("--per-cluster", is_flag=True, help="A quota per cluster of RUN.  [default: no]"),
            click.option(
                "--rounding",
                type=click.Choice(("exact", "paper")),
                default="exact",
                help="Of quotas: exact totals, or each rounded up as the paper's code does.",
            ),
            click.option(
                "--bucket",
                type=click.Choice(("low", "mid", "high")),
                help="Only this third of the values (per cluster or column).  [default: all]",
            ),
            click.option(
                "--diverse", metavar="SIZE", help="Instead of --keep: so many by facility location.  [default: no]"
            ),
            click.option("--from", "pool", metavar="SIZE", help="What --diverse chooses from.  [default: 20%]"),
            click.option(
                "--drop-flagged",
                callback=parse_names,
                metavar="NAME,...",
                help="Drop what is ifd_above_1, gibberish, empty_or_link_only, refusal, far_from_instruction, "
                "near_duplicate.  [default: none]",
            ),
            click.option("--random", is_flag=True, help="Draw at random instead of ranking.  [default: no]"),
            click.option("--seed", type=int, default=42, help="Of --random."),
            click.option(
                "--aggregate",
                type=click.Choice(("mean", "min", "max", "last")),
                default="mean",
                help="How the turns of a conversation become one value.",
            ),
            click.option(
                "--order", type=click.Choice(("input", "rank")), default="input", help="Order of the kept records."
            ),
            click.option("--with-scores", is_flag=True, help="Add each record's scores under 'scorer'.  [default: no]"),
            click.option(
                "--rejected",
                metavar="FILE",
                help="Write every other record there, with the reason.  [default: not written]",
            ),
        )
    ):
        command = option(command)
    return command


def training_options(command: Command) -> Command:
    """The options that are fields of scorer.learning.learn.Training."""
    for option in reversed(
        (
            click.option("--epochs", type=int, default=3, help="Epochs to train; 1 gives lp1_approx only."),
            click.option(
                "--schedule-epochs", type=int, help="Epochs of the learning rate's schedule.  [default: 3, or --epochs]"
            ),
            click.option("--learning-rate", type=float, default=2e-5, help="Its peak."),
            click.option(
                "--scheduler",
                type=click.Choice(("cosine", "linear", "constant_with_warmup")),
                default="cosine",
                help="The learning rate's schedule.",
            ),
            click.option("--warmup-ratio", type=float, default=0.03, help="Share of the schedule that is warm-up."),
            click.option("--batch-size", type=int, default=128, help="Records a step."),
            click.option("--device-batch", type=int, help="Records at a time.  [default: 4 on cpu, 16 on cuda]"),
            click.option("--weight-decay", type=float, default=0.0, help="Of AdamW."),
            click.option("--seed", type=int, default=42, help="Of the order of the records, and of dropout."),
            click.option("--save-steps", type=int, default=100, help="Steps between two checkpoints."),
            click.option("--keep-checkpoints", is_flag=True, help="Keep the model of each epoch.  [default: no]"),
        )
    ):
        command = option(command)
    return command


def parse_columns(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, str] | None:
    """`prompt=question,response=answer` as a dict."""
    if value is None:
        return None
    pairs = [part.partition("=") for part in value.split(",")]
    if any(not key or not name for key, _, name in pairs):
        raise click.BadParameter("write it as prompt=NAME,response=NAME")
    columns: dict[str, str] = {}
    for key, _, name in pairs:
        if key.strip() in columns:
            raise click.BadParameter(f"{key.strip()} stands there twice; name one column")
        columns[key.strip()] = name.strip()
    return columns


def parse_vllm_args(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any] | None:
    """`enforce_eager=false`, `block_size=32` as a dict of JSON values; what is not JSON is a string."""
    arguments: dict[str, Any] = {}
    for pair in values:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"'{pair}': write it as KEY=VALUE")
        if key in arguments:
            raise click.BadParameter(f"{key} is given twice")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments or None


def parse_workers(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """`auto` as None."""
    if value in (None, "auto"):
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"'{value}' is neither auto nor a whole number of at least 1")
    return int(value)


def parse_names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return () if value is None else tuple(name.strip() for name in value.split(","))


RAY_NAMES = ("ray", "workers", "gpus_per_worker", "cpus_per_worker")


def ray_options(command: Command) -> Command:
    """Where a run is spread to: the fields of scorer.runs.ray_driver.Cluster."""
    for option in reversed(
        (
            click.option(
                "--ray",
                metavar="ADDRESS",
                help="Score on Ray: local, or the address of a cluster (auto finds it).  [default: no]",
            ),
            click.option(
                "--workers", callback=parse_workers, metavar="N", help="--ray: how many engines.  [default: auto]"
            ),
            click.option(
                "--gpus-per-worker", type=float, help="--ray: a share is allowed.  [default: 1 if there is one]"
            ),
            click.option("--cpus-per-worker", type=float, help="--ray: a share is allowed.  [default: an even share]"),
        )
    ):
        command = option(command)
    return command


@cli.command()
@score_options
@click.option("-o", "--output", required=True, metavar="RUN", help="The run directory.")
@click.option("--fresh", is_flag=True, help="Discard what an earlier run left in RUN.  [default: no]")
@ray_options
def score(data: tuple[str, ...], output: str, fresh: bool, strict: bool, **options: Any) -> None:
    """Score DATA (JSON, JSON Lines, Parquet; - is standard input) into the directory RUN.

    DATA and RUN may be s3:// URLs. The same command again resumes an unfinished run.
    """
    _score(data, output, fresh, strict, options)


@cli.command()
@click.argument("run")
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="Where the kept records go; its suffix is the format."
)
@select_options
def select(run: str, output: str, **options: Any) -> None:
    """Keep the best records of the finished run RUN, as they came."""
    _select(run, output, _selection(options))


@cli.command(name="filter")
@score_options
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="Where the kept records go; its suffix is the format."
)
@click.option("--run", metavar="RUN", help="Keep the scores in this run directory.  [default: FILE.run]")
@click.option("--fresh", is_flag=True, help="Discard what an earlier run left in RUN.  [default: no]")
@ray_options
@select_options
def filter_(data: tuple[str, ...], output: str, run: str | None, fresh: bool, strict: bool, **options: Any) -> None:
    """Score DATA and select from it in one go.

    What needs clusters (--per-cluster, --diverse) is for scorer select, after scorer cluster.
    """
    from scorer.runs.run import spool
    from scorer.selection.export import check_apart, check_column, check_measure, check_options

    selection = _selection({name: options.pop(name) for name in SELECT_NAMES})
    check_options(data, output, **selection)
    check_measure(selection["by"], options["protocol"])
    directory = run or f"{output}.run"
    check_apart(directory, [name for name in (output, selection["rejected"]) if name is not None])
    paths = spool(data, directory, fresh=fresh)
    check_column(paths, selection["per"], options["limit"])
    _score(paths, directory, fresh, strict, options)
    _select(directory, output, selection)


@cli.command()
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="RUN", help="The run directory.")
@click.option("--runs", is_flag=True, help="DATA are scores: before training, and after each epoch.  [default: no]")
@training_options
@engine_options
@click.option("--fresh", is_flag=True, help="Discard what an earlier run left in RUN.  [default: no]")
def lp(data: tuple[str, ...], output: str, runs: bool, fresh: bool, **options: Any) -> None:
    """Fine-tune the model on DATA, and score how it learns each record, into the directory RUN.

    With --runs nothing is trained: DATA are run directories, or Parquet, CSV or JSON Lines files with record_id and
    ppl_conditioned. The score table gets ppl_0 .. ppl_n, lp1 (with two epochs or more) and lp1_approx; low is hard, and
    worth keeping. On a CPU a dtype of auto is float32, and no server (--engine URL) can train. The same command again
    resumes.
    """
    from scorer.console import ConsoleProgress, show_run
    from scorer.learning.join import join_runs
    from scorer.learning.learn import Training, learn

    if runs:
        _check_not_given(options, "--runs computes nothing")
    with ConsoleProgress() as progress:
        if runs:
            run = join_runs(data, output, fresh=fresh, progress=progress)
        else:
            keep_checkpoints = options.pop("keep_checkpoints")
            training = Training(**{field.name: options.pop(field.name) for field in fields(Training)})
            run = learn(
                data,
                output,
                training=training,
                keep_checkpoints=keep_checkpoints,
                fresh=fresh,
                progress=progress,
                **options,
            )
    show_run(run)


@cli.command()
@click.argument("run")
@click.option("--clusters", type=int, help="How many clusters.  [default: records / --min-mean-size]")
@click.option("--min-mean-size", type=int, default=50, help="Records a cluster, on average, unless --clusters.")
@click.option("--embedder", default="all-minilm-l6-v2", help="A sentence-transformers model: a name or a local folder.")
@click.option("--max-tokens", type=int, default=256, help="Tokens of a text to embed, up to what the embedder takes.")
@trust_option
@pickle_option
@click.option("--iterations", type=int, default=20, help="Of k-means.")
@click.option("--seed", type=int, default=42, help="Of k-means.")
@click.option("--device", type=click.Choice(DEVICES), default=DEFAULTS.device, help="auto: cuda if there is one.")
@click.option("--flags", is_flag=True, help="Also flag far responses and near-duplicates.  [default: no]")
@click.option("--far-below", type=float, default=0.1, help="Cosine of instruction and response that is far (--flags).")
@click.option("--duplicate-above", type=float, default=0.98, help="Cosine of two records that is a copy (--flags).")
@click.option("--fresh", is_flag=True, help="Discard embeddings that an earlier command left.  [default: no]")
def cluster(run: str, **options: Any) -> None:
    """Embed the records of the run RUN, and cluster them: RUN/clusters.parquet.

    The same command again resumes the embedding.
    """
    if options["clusters"] is not None:
        _check_not_given(["min_mean_size"], "--clusters says how many")
    if not options["flags"]:
        _check_not_given(["far_below", "duplicate_above"], "without --flags there is nothing that it says")
    from scorer.clusters.cluster import cluster as cluster_records
    from scorer.console import ConsoleProgress

    with ConsoleProgress() as progress:
        cluster_records(run, progress=progress, **options)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "--by", metavar="COLUMN,...", help="A column, or one for each RUN.  [default: the protocol's own, or the only one]"
)
@click.option(
    "--lowest/--highest", default=None, help="Which end is the best.  [default: lowest for LP, else mostly highest]"
)
@click.option("--at", default="1%,3%,5%,10%,15%", help="Shares of the records whose selections are compared.")
@click.option("--resamples", type=int, default=200, help="Draws of the bootstrap; of Kendall's tau at most 50.")
@click.option("--seed", type=int, default=42, help="Of the bootstrap.")
@click.option("--json", "output", metavar="FILE", help="Write the figures there too.  [default: not written]")
def compare(runs: tuple[str, ...], **options: Any) -> None:
    """How far scorers agree: correlations, and what their selections share.

    RUN is a run directory, or a Parquet, CSV or JSON Lines file with record_id and the column. Files without record_id
    are compared by content.
    """
    from scorer.agreement.compare import compare as compare_sources
    from scorer.console import show_comparison

    show_comparison(compare_sources(runs, **options))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN]...")
@click.option("-o", "--output", required=True, metavar="FILE", help="The page, an .html file.")
@click.option("--pictures", metavar="FOLDER", help="Also write the pictures as PNG and SVG.  [default: not written]")
@click.option("--by", metavar="COLUMN", help="Column to rank by.  [default: each RUN's own, mostly ifd]")
@click.option("--keep", default="10%", help="The share, or number, of records whose selection is shown.")
def report(runs: tuple[str, ...], output: str, pictures: str | None, **options: Any) -> None:
    """A web page about finished runs: distributions, length, clusters, samples; it opens offline.

    Each further RUN, of the same data, is compared with the first.
    """
    from scorer.console import line
    from scorer.report.report import report as write_report

    path = write_report(runs, output, pictures_folder=pictures, **options)
    line(f"report: {path}, {path.stat().st_size:,} bytes")


@cli.command()
@model_options
@click.option("--host", default="127.0.0.1", help="The address to listen on.")
@click.option("--port", type=int, default=8000, help="The port to listen on.")
def serve(host: str, port: int, **options: Any) -> None:
    """Serve a model with vLLM, for scorer score --engine http://HOST:PORT elsewhere.

    VLLM_API_KEY in the environment, here and there, keeps others out.
    """
    from scorer.engines.choose import resolve_config
    from scorer.engines.vllm import check_serving
    from scorer.engines.vllm import serve as serve_model
    from scorer.models.find import find_model

    config = ScoreConfig(engine="vllm", **options)
    check_serving(config)
    files = find_model(config.model, revision=config.revision, allow_pickle=config.allow_pickle)
    serve_model(resolve_config(config, files), files, host, port)


@cli.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the known models: where they come from, and what is on disk."""
    if context.invoked_subcommand is None:
        from scorer.console import show_models
        from scorer.models.find import model_table

        show_models(model_table())


@models.command()
@click.argument("name")
@revision_option
@pickle_option
def fetch(name: str, **options: Any) -> None:
    """Fetch the model NAME, so that a later run needs no network."""
    from scorer.models.find import find_model

    click.echo(find_model(name, report=lambda message: click.echo(message, err=True), **options).path)


SELECT_NAMES = tuple(parameter.name for parameter in select.params if parameter.name not in ("run", "output"))


def _score(data: Sequence[str], output: str, fresh: bool, strict: bool, options: dict[str, Any]) -> None:
    from scorer.console import ConsoleProgress, show_run
    from scorer.runs.run import score as score_data

    cluster = _cluster(**{name: options.pop(name) for name in RAY_NAMES})
    with ConsoleProgress() as progress:
        run = score_data(data, output, fresh=fresh, strict=strict, cluster=cluster, progress=progress, **options)
    show_run(run)


def _cluster(ray: str | None, workers: int | None, gpus_per_worker: float | None, cpus_per_worker: float | None) -> Any:
    if ray is not None:
        from scorer.runs.ray_driver import Cluster

        return Cluster(ray, workers, gpus_per_worker, cpus_per_worker)
    if given := [w for w in (workers, gpus_per_worker, cpus_per_worker) if w is not None]:
        raise click.UsageError(f"{given[0]:g} of what? --workers and its like are for --ray")
    return None


def _selection(options: dict[str, Any]) -> dict[str, Any]:
    """The library's options: --no-max-ifd is a limit of None there."""
    if not options.pop("no_max_ifd"):
        return options
    _check_not_given(["max_ifd"], "--no-max-ifd keeps every ifd")
    return options | {"max_ifd": None}


def _check_not_given(names: Iterable[str], why: str) -> None:
    """Raise ScorerError where one of the options was given on the command line: nothing is dropped silently."""
    source = click.get_current_context().get_parameter_source
    if given := [f"--{name.replace('_', '-')}" for name in names if source(name) is ParameterSource.COMMANDLINE]:
        raise ScorerError(f"{why}: leave out {', '.join(given)}")


def _select(run: str, output: str, options: dict[str, Any]) -> None:
    from scorer.console import show_selection
    from scorer.selection.export import select as select_records

    show_selection(select_records(run, output, **options), output)
