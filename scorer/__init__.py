"""scorer: scores instruction-tuning data with a weak language model, and selects the samples worth training on.

    run = scorer.score("data.json", model="gpt2")
    run.scores()                                    # a Polars frame, one row a response
    scorer.select(run, "best.json", keep=0.1)

The public names are loaded when they are first used: `import scorer` imports neither torch nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorer.config import ScoreConfig as ScoreConfig
    from scorer.runs.directory import Run as Run
    from scorer.runs.run import score as score
    from scorer.selection.export import select as select
    from scorer.types import EngineError as EngineError
    from scorer.types import RowStatus as RowStatus
    from scorer.types import ScorerError as ScorerError

HOMES = {
    "score": "scorer.runs.run",
    "select": "scorer.selection.export",
    "Run": "scorer.runs.directory",
    "ScoreConfig": "scorer.config",
    "RowStatus": "scorer.types",
    "ScorerError": "scorer.types",
    "EngineError": "scorer.types",
}
__all__ = ["EngineError", "RowStatus", "Run", "ScoreConfig", "ScorerError", "score", "select"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'scorer' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
