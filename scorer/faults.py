"""What goes wrong in a library that is given a file from elsewhere, as one error of one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scorer.types import ScorerError


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """In the block, raise any exception of a library as ScorerError: `what` and its first line.

    For the few places where a library reads what nobody has checked: it may raise anything. A panic in Rust is no
    Exception, although the process can go on.
    """
    try:
        yield
    except ScorerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ScorerError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The error's class and its `first_line`."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not blank, up to 200 characters of it."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "")
