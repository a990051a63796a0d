"""Quiet loading: what transformers raises for files that it cannot load, as one line, and none of what it says.

It does not know what is loaded, or from where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scorer.types import ScorerError


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn what a library raises while it loads `path` into ScorerError; its progress bars and advice stay off."""
    import pickle

    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise ScorerError(f"{path}: the model does not load: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The error's kind and the first line of its text, at most 200 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
