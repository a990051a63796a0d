"""Loading with transformers, without its log and progress bars, and with its errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scorer.faults import faults_of


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
def loading(path: Path, what: str = "model") -> Iterator[None]:
    """Load `path` in the block: quietly, and with a library's exception as ScorerError."""
    with faults_of(f"{path}: the {what} does not load"), quiet():
        yield
