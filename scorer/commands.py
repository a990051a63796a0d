"""The command line: parses options, calls the library, and turns its errors into a message and an exit code.

Exit codes: 0 done; 1 the machine failed, and the same command resumes; 2 the input or an option has to be mended;
130 interrupted, and the same command resumes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from errno import EMFILE, ENOSPC
from functools import partial
from io import TextIOWrapper
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from scorer.agreement.config import CompareConfig
from scorer.config import Cluster, ClusterConfig, Part, ScoreConfig, Training
from scorer.options import DATA, EVALUATION, GROUPS, OUTPUT, SELECTION, OptionInfo, describe, take
from scorer.printing import error_line, printable
from scorer.selection.config import CHOICES, SelectConfig
from scorer.types import ScorerError
from scorer.validation.config import ValidateConfig

Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


def main() -> None:
    """Run the command line, and exit."""
    _open_streams()
    try:
        cli.main(sys.argv[1:] or ["--help"], "scorer", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.ClickException as error:
        usage = isinstance(error, click.UsageError) and error.ctx and error.ctx.get_usage()
        _end(error.format_message(), error.exit_code, usage or "")
    except ScorerError as error:
        _end(str(error), error.exit_code)
    except BrokenPipeError:  # such as `scorer models | head -1`
        sys.exit(1)
    except OSError as error:  # of printing, or of a machine without files or memory to spare
        full = error.errno == ENOSPC and error.filename is None
        where = "standard output: can't be written (" if full else f"{error.filename or 'this machine'}: fails ("
        help = "; raise the limit with ulimit -n" if error.errno == EMFILE else ""
        _end(f"{where}{error.strerror or error}){help}", 1)
    except (click.Abort, KeyboardInterrupt):
        _end("interrupted; the same command goes on after what is done", 130)
    finally:
        _drop_unwritten()


def _end(message: str, exit_code: int, usage: str = "") -> NoReturn:
    with suppress(OSError):  # standard error may be full, or its reader gone
        if usage:
            click.echo(usage, err=True)
        click.echo(f"scorer: {error_line(message)}", err=True)
    sys.exit(exit_code)


def _open_streams() -> None:
    """Let no file that is opened later be taken for a standard stream that is closed, and print in any encoding."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # has the lowest free number
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """Let Python not fail at its exit to write what could not be written before."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Option(click.Option):
    """An option that stands under the heading `group` in `--help`."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class Command(click.Command):
    """A command whose `--help` has the options under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections[getattr(parameter, "group", "Options")].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class CommandGroup(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


def command_option(group: str, *names: str, help: str, unset: str = "", **details: Any) -> Decorator:
    """An option under the heading `group`; `unset` is shown as its default."""
    help = f"{help}  [default: {unset}]" if unset else help
    return click.option(*names, cls=Option, group=group, help=help, **details)


def flag(group: str, name: str, help: str) -> Decorator:
    """An option that takes no value."""
    return command_option(group, name, help=help, unset="no", is_flag=True)


def output_option(metavar: str, help: str) -> Decorator:
    return command_option(OUTPUT, "-o", "--output", help=help, metavar=metavar, required=True)


def options_of(
    *configs: type[Any], only: Collection[str] = (), without: Collection[str] = (), **defaults: Any
) -> Decorator:
    """The options that are fields of dataclasses, or some of them, in order. `defaults` replace those of the fields.

    without: names of fields, and headings whose fields are left out.
    """

    def decorate(command: Decorated) -> Decorated:
        for field, kind, info in reversed([found for config in configs for found in describe(config)]):
            if not {field.name, info.group} & {*without} and (not only or field.name in only):
                command = _field_option(field.name, kind, info, defaults.get(field.name, field.default))(command)
        return command

    return decorate


def _field_option(name: str, kind: Any, info: OptionInfo, default: Any) -> Decorator:
    def parse(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        try:
            return default if info.parse is None or value in (None, ()) else info.parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    unset = default is None or default is False or isinstance(default, tuple)
    plain = kind if kind in (bool, int, float) and not info.parse else str
    return command_option(
        info.group,
        info.flags or f"--{name.replace('_', '-')}",
        name,
        help=info.help,
        unset=info.unset if unset else "",
        default=default if kind is bool or not unset else None,
        type=click.Choice(info.choices) if info.choices else plain,
        is_flag=kind is bool or None,
        metavar=info.metavar,
        multiple=info.multiple,
        callback=parse if info.parse else None,
    )


data_argument = click.argument("data", nargs=-1, required=True)
data_option = command_option(
    DATA,
    "--data",
    multiple=True,
    metavar="FILE",
    help="Where a file that was scored lies now; once for each, in the order in which they were scored.",
    unset="where they were",
)
run_option = output_option("RUN", "The run directory.")
file_option = output_option(
    "FILE",
    "File for the kept records, its kind by its suffix: .jsonl, .json (also with .gz, .zst), .parquet, .arrow, .csv or "
    ".tsv. A path that ends in / is a folder for datasets.load_from_disk; hf://datasets/ORG/NAME/FILE is on the hub.",
)
fresh_option = flag(OUTPUT, "--fresh", "Discard what an earlier run left in RUN.")
strict_option = flag(DATA, "--strict", "Stop at the first record that can't be scored.")
no_limit_option = flag(SELECTION, "--no-max-ifd", "Keep records of any ifd.")


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="ifd-scorer")
def cli() -> None:
    """Score instruction-tuning data with a weak language model, and select the samples worth training on."""


@cli.command()
@data_argument
@options_of(Part, ScoreConfig)
@strict_option
@options_of(Cluster, address=None)
@run_option
@fresh_option
def score(data: tuple[str, ...], output: str, **options: Any) -> None:
    """Score DATA into the directory RUN.

    DATA is files of JSON, JSON Lines, CSV, Parquet or Arrow, patterns or folders of them, ORG/NAME on the Hugging Face
    hub, or - for standard input. DATA and RUN may be s3:// URLs. The same command again resumes an unfinished run.
    """
    from scorer.console import show_run
    from scorer.runs.run import score as score_data

    show_run(score_data(data, output, cluster=_cluster(options), progress=True, **options))


@cli.command()
@click.argument("run")
@data_option
@options_of(SelectConfig)
@no_limit_option
@file_option
def select(run: str, output: str, data: tuple[str, ...], **options: Any) -> None:
    """Keep the best records of the finished run RUN, as they came."""
    selection = _selection(options)
    from scorer.console import show_selection
    from scorer.selection.export import select as select_records

    show_selection(select_records(run, output, data=data, **selection), output)


@cli.command(name="filter")
@data_argument
@options_of(Part, ScoreConfig)
@strict_option
@options_of(Cluster, address=None)
@options_of(SelectConfig)
@no_limit_option
@file_option
@command_option(OUTPUT, "--run", metavar="RUN", help="Keep the scores in this run directory.", unset="FILE.run")
@fresh_option
def filter_(data: tuple[str, ...], output: str, run: str | None, **options: Any) -> None:
    """Score DATA and select from it in one go.

    What needs clusters (--per-cluster, --diverse) is for scorer select, after scorer cluster.
    """
    from scorer.console import show_run, show_selection
    from scorer.runs.directory import Run
    from scorer.selection.filtering import filter as filter_data
    from scorer.selection.filtering import run_beside

    directory = run_beside(output) if run is None else run
    cluster = _cluster(options)
    selection = _selection(options)
    found = filter_data(data, output, directory, cluster=cluster, progress=True, **options, **selection)
    show_run(Run(directory))
    show_selection(found, output)


@cli.command()
@data_argument
@flag(DATA, "--runs", "DATA are scores: before training, and after each epoch.")
@options_of(Training)
@options_of(Part, ScoreConfig, without=("protocol",))
@strict_option
@run_option
@fresh_option
@flag(OUTPUT, "--keep-checkpoints", "Keep the model of each epoch.")
def lp(data: tuple[str, ...], output: str, runs: bool, fresh: bool, **options: Any) -> None:
    """Fine-tune the model on DATA, and score how it learns each record, into the directory RUN.

    With --runs nothing is trained: DATA are run directories, or Parquet, CSV or JSON Lines files with record_id and
    ppl_conditioned. The score table gets ppl_0 .. ppl_n, lp1 (with two epochs or more) and lp1_approx; low is hard, and
    worth keeping. On a CPU a dtype of auto is float32, and no server (--engine URL) can train. The same command again
    resumes.
    """
    if runs:
        _check_not_given(options, "--runs computes nothing")
    training = Training(**take(Training, options))
    from scorer.console import show_run
    from scorer.learning.join import join_runs
    from scorer.learning.learn import learn

    if runs:
        run = join_runs(data, output, fresh=fresh, progress=True)
    else:
        run = learn(data, output, training=training, fresh=fresh, progress=True, **options)
    show_run(run)


@cli.command()
@click.argument("run")
@options_of(ClusterConfig)
@flag(OUTPUT, "--fresh", "Discard embeddings that an earlier command left in RUN.")
def cluster(run: str, **options: Any) -> None:
    """Embed the records of the run RUN, and cluster them: RUN/clusters.parquet.

    The same command again resumes the embedding.
    """
    if options["clusters"] is not None:
        _check_not_given(["min_mean_size"], "--clusters sets the number of clusters")
    if not options["flags"]:
        _check_not_given(["far_below", "duplicate_above"], "without --flags nothing is flagged")
    from scorer.clusters.cluster import cluster as cluster_records

    cluster_records(run, progress=True, **options)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@options_of(CompareConfig)
@command_option(OUTPUT, "--json", "output", metavar="FILE", help="Write the figures there, too.", unset="not written")
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
@options_of(SelectConfig, only=("by", "keep"), keep="10%")
@command_option(
    EVALUATION,
    "--validation",
    metavar="OUT",
    help="Show what scorer validate found, which wrote the folder OUT.",
    unset="not shown",
)
@output_option("FILE", "The page, an .html file.")
@command_option(
    OUTPUT,
    "--pictures",
    metavar="FOLDER",
    help="Write the pictures there, too, as PNG and SVG.",
    unset="not written",
)
def report(runs: tuple[str, ...], output: str, pictures: str | None, **options: Any) -> None:
    """A web page about finished runs: distributions, length, clusters, samples; it opens offline.

    Each further RUN must have the same data, and is compared with the first.
    """
    from scorer.console import line
    from scorer.reporting.report import report as write_report

    path = write_report(runs, output, pictures_folder=pictures, **options)
    line(f"report: {path}, {path.stat().st_size:,} bytes")


@cli.command()
@click.argument("run")
@data_option
@options_of(ValidateConfig)
@options_of(SelectConfig, only=CHOICES)
@no_limit_option
@output_option("FOLDER", "The folder of the validation.")
@flag(OUTPUT, "--fresh", "Discard what an earlier validation left in FOLDER.")
def validate(run: str, output: str, data: tuple[str, ...], fresh: bool, **options: Any) -> None:
    """Fine-tune a model on what is selected of the run RUN and on baselines, and compare them on held-out records.

    The same command again goes on after the last training that is done. See docs/validation.md for what the figures
    can tell.
    """
    selection = _selection(options)
    from scorer.console import show_validation
    from scorer.validation.validate import validate as validate_run

    show_validation(validate_run(run, output, data=data, fresh=fresh, progress=True, **options, **selection))


@cli.command()
@options_of(ScoreConfig, without=("engine", "shard_rows", DATA))
@command_option("Options", "--host", default="127.0.0.1", help="Address to listen on.")
@command_option("Options", "--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on.")
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
    find = partial(find_model, config.model, revision=config.revision, allow_pickle=config.allow_pickle)
    resolve_config(config, find(weights=False))  # refuses what can't run before weights are fetched
    files = find()
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
@options_of(ScoreConfig, only=("revision", "allow_pickle"))
def fetch(name: str, **options: Any) -> None:
    """Fetch the model NAME, so that a later run needs no network."""
    from scorer.models.find import find_model

    ScoreConfig(model=name, **options)  # checks them
    files = find_model(name, report=lambda message: click.echo(printable(message), err=True), **options)
    click.echo(printable(str(files.path)))


def _cluster(options: dict[str, Any]) -> Cluster | None:
    """The options of Ray, out of `options`; None where it is not asked for."""
    on = take(Cluster, options)
    if on["address"] is None:
        _check_not_given(on, "without --ray no workers are started")
    return None if on["address"] is None else Cluster(**on)


def _selection(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the selection, out of `options`: --no-max-ifd is a limit of None in the library."""
    selection = take(SelectConfig, options)
    if options.pop("no_max_ifd"):
        _check_not_given(["max_ifd"], "--no-max-ifd keeps every ifd")
        selection["max_ifd"] = None
    return selection


def _check_not_given(names: Iterable[str], why: str) -> None:
    """Raise UsageError if one of the options was given on the command line: none is ignored silently."""
    context = click.get_current_context()
    given = {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if flags := [parameter.opts[0] for parameter in context.command.params if parameter.name in given]:
        raise click.UsageError(f"{why}: leave out {', '.join(flags)}")
