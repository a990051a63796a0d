"""Loading with transformers, without its log and progress bars, and with its errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scorer.types import ScorerError


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and sentence-transformers."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    sentences = logging.getLogger("sentence_transformers")
    level = sentences.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sentences.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        sentences.setLevel(level)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Load `path` in the block: quietly, and with a library's exception as ScorerError."""
    import pickle

    from safetensors import SafetensorError

    faults = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
    try:
        with quiet():
            yield
    except (*faults, SafetensorError, pickle.UnpicklingError) as error:
        raise ScorerError(f"{path}: the model does not load: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The error's class and the first line of its text, up to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
