"""The command line: parses options, calls the library, and turns its errors into one line and an exit code.

Exit codes: 0 done; 1 the machine failed, and the same command resumes; 2 the input or an option has to be mended;
130 interrupted, and the same command resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from scorer.config import COLUMNS, DEVICES, DTYPES, ENGINES, PROTOCOLS, ScoreConfig
from scorer.types import ScorerError

DEFAULTS = ScoreConfig()
Command = Callable[..., None]


def main() -> None:
    """The console command `scorer`."""
    try:
        cli.main(sys.argv[1:] or ["--help"], standalone_mode=False)
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except ScorerError as error:
        _end(str(error), error.exit_code)
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
    """The options that are fields of ScoreConfig, and how data is taken."""
    for option in reversed(
        (
            click.argument("data", nargs=-1, required=True),
            click.option(
                "--model", default=DEFAULTS.model, help="An embedded name, a local folder, or a Hugging Face name."
            ),
            click.option("--revision", help="Revision of a Hugging Face model.  [default: its newest]"),
            click.option("--engine", type=click.Choice(ENGINES), default=DEFAULTS.engine, help="auto is packed."),
            click.option(
                "--protocol",
                type=click.Choice(tuple(PROTOCOLS)),
                default=DEFAULTS.protocol,
                help="How text becomes tokens.",
            ),
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
            click.option("--batch-tokens", type=int, help="Tokens in one batch.  [default: by device]"),
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
                "--trust-remote-code", is_flag=True, help="Run code that comes with the model.  [default: no]"
            ),
            click.option("--allow-pickle", is_flag=True, help="Load weights that may run code.  [default: no]"),
            click.option(
                "--strict", is_flag=True, help="Stop at the first record that can't be scored.  [default: no]"
            ),
        )
    ):
        command = option(command)
    return command


def select_options(command: Command) -> Command:
    """The options of a selection."""
    for option in reversed(
        (
            click.option("--keep", default="10%", help="A share of all records, or a number of records."),
            click.option("--by", help="Column to rank by.  [default: the protocol's own, mostly ifd]"),
            click.option(
                "--lowest/--highest",
                default=None,
                help="Which end to keep.  [default: the protocol's own, mostly highest]",
            ),
            click.option("--max-ifd", type=float, default=1.0, help="Drop records whose ifd is not below this."),
            click.option("--no-max-ifd", is_flag=True, help="Keep records of any ifd.  [default: no]"),
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


def parse_columns(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, str] | None:
    """`prompt=question,response=answer` as a dict."""
    if value is None:
        return None
    pairs = [part.partition("=") for part in value.split(",")]
    if any(not key or not name for key, _, name in pairs):
        raise click.BadParameter("write it as prompt=NAME,response=NAME")
    return {key.strip(): name.strip() for key, _, name in pairs}


@cli.command()
@score_options
@click.option("-o", "--output", required=True, metavar="RUN", help="The run directory.")
@click.option("--fresh", is_flag=True, help="Discard what an earlier run left in RUN.  [default: no]")
def score(data: tuple[str, ...], output: str, fresh: bool, strict: bool, **options: Any) -> None:
    """Score DATA (JSON, JSON Lines, Parquet; - is standard input) into the directory RUN.

    The same command again resumes an unfinished run.
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
@select_options
def filter_(data: tuple[str, ...], output: str, run: str | None, strict: bool, **options: Any) -> None:
    """Score DATA and select from it in one go."""
    from scorer.export import check_options

    selection = _selection({name: options.pop(name) for name in SELECT_NAMES})
    check_options(data, output, **selection)
    directory = run or f"{output}.run"
    _score(data, directory, False, strict, options)
    _select(directory, output, selection)


@cli.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the known models: where they come from, and what is on disk."""
    if context.invoked_subcommand is None:
        from scorer.console import show_models
        from scorer.models import model_table

        show_models(model_table())


@models.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Fetch the model NAME, so that a later run needs no network."""
    from scorer.models import find_model

    click.echo(find_model(name, report=lambda message: click.echo(message, err=True)).path)


SELECT_NAMES = tuple(parameter.name for parameter in select.params if parameter.name not in ("run", "output"))


def _score(data: tuple[str, ...], output: str, fresh: bool, strict: bool, options: dict[str, Any]) -> None:
    from scorer.console import ConsoleProgress, show_run
    from scorer.run import score as score_data

    with ConsoleProgress() as progress:
        run = score_data(data, output, fresh=fresh, strict=strict, progress=progress, **options)
    show_run(run)


def _selection(options: dict[str, Any]) -> dict[str, Any]:
    """The library's options: --no-max-ifd is a limit of None there."""
    return options | {"max_ifd": None} if options.pop("no_max_ifd") else options


def _select(run: str, output: str, options: dict[str, Any]) -> None:
    from scorer.console import show_selection
    from scorer.export import select as select_records

    show_selection(select_records(run, output, **options), output)
