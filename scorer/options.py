"""Options as fields of dataclasses: a field holds its option's name, type, default, help text, group and limits.

Knows neither the command line, which is built from these fields in scorer.commands, nor any single option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from scorer.types import ScorerError, one_of

# The headings of `--help`, in order.
GROUPS = (
    "Data",
    "Model",
    "Engine",
    "vLLM",
    "Ray",
    "Selection",
    "Training",
    "Clusters",
    "Evaluation",
    "Output",
    "Options",
)
DATA, MODEL, ENGINE, VLLM, RAY, SELECTION, TRAINING, CLUSTERS, EVALUATION, OUTPUT, OTHER = GROUPS
Config = TypeVar("Config")
Function = TypeVar("Function", bound=Callable[..., Any])


MAX = 2**31 - 1  # the largest whole number that all libraries take


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """What a field's metadata says about its option.

    unset: what `--help` shows as the default where that is None, False or empty. flags: the option's name, if it is not
    `--` and the field's. minimum, maximum: of a number; None is 1 for a whole one, and 0 for another. parse: the text
    of the command line (or with `multiple` the texts) to the field's value; raises ValueError.
    """

    group: str
    help: str
    unset: str = "no"
    flags: str | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    minimum: float | None = None
    maximum: float = MAX
    parse: Callable[[Any], Any] | None = None
    multiple: bool = False


def option(group: str, default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is an option; `details` are the other fields of OptionInfo."""
    return field(default=default, metadata={"option": OptionInfo(group, help, **details)})


def same_option(config: type[Any], name: str) -> Any:
    """A field with the default and the metadata of another dataclass's field."""
    return next(field(default=f.default, metadata=f.metadata) for f in fields(config) if f.name == name)


def describe(config: type[Any]) -> Iterator[tuple[Field[Any], Any, OptionInfo]]:
    """The fields of a dataclass of options, in order: the field, its type (the one beside None), its option."""
    hints = get_type_hints(config)
    for f in fields(config):
        kinds = get_args(hints[f.name])
        yield f, kinds[0] if len(kinds) == 2 and NoneType in kinds else hints[f.name], f.metadata["option"]


def check_fields(config: Any) -> None:
    """Raise ScorerError unless each choice, number and Boolean of a dataclass is valid, and no text is empty."""
    for f, kind, found in describe(type(config)):
        value = getattr(config, f.name)
        if value is None and f.default is None:
            continue
        if found.choices:
            one_of(f.name, value, found.choices)
        elif kind is bool and not isinstance(value, bool):
            raise ScorerError(f"{f.name}: {value!r} is not True or False")
        elif kind in (int, float):
            low = found.minimum if found.minimum is not None else 1 if kind is int else 0
            whole = isinstance(value, int) and not isinstance(value, bool)
            right = whole or (kind is float and isinstance(value, float))
            if not right or not low <= value <= found.maximum:  # as is NaN
                what = "a whole number" if kind is int else "a number"
                raise ScorerError(f"{f.name}: {value!r} is not {what} of at least {low} and at most {found.maximum}")
        elif kind is str and not isinstance(value, str):
            raise ScorerError(f"{f.name}: {value!r} is not text")
        elif value == "":
            raise ScorerError(f"{f.name}: is empty; give it a value, or leave it out")


def keywords(*sources: Any, without: Collection[str] = ()) -> Callable[[Function], Function]:
    """Show in the signature and the docstring of a function what it takes as `**options`.

    sources: dataclasses of options, whose fields it takes, and functions, whose keyword arguments it takes.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = [p for source in sources for p in _keywords(source) if p.name not in without]
        unique = {p.name: p for p in (*own, *taken)}
        function.__signature__ = signature.replace(parameters=[*unique.values()])  # type: ignore[attr-defined]
        helps = [
            f"        {f.name}: {info.help}"
            for source in sources
            if isinstance(source, type)
            for f, _, info in describe(source)
            if f.name not in without
        ]
        function.__doc__ = "\n".join([(function.__doc__ or "").rstrip(), "", "    Options:", *helps, "    "])
        return function

    return decorate


def _keywords(source: Any) -> list[inspect.Parameter]:
    if not isinstance(source, type):
        parameters = inspect.signature(source).parameters.values()
        return [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields(source)]


def take(config: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields of a dataclass from `options`, and return them."""
    return {f.name: options.pop(f.name) for f in fields(config) if f.name in options}


def from_options(config: type[Config], options: Mapping[str, Any]) -> Config:
    """A dataclass of options; an unknown name raises ScorerError."""
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        raise ScorerError(f"unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
    return config(**options)
