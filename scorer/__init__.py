"""scorer: scores instruction-tuning data with a weak language model, and selects the samples worth training on.

    run = scorer.score("data.json", model="gpt2")
    run.scores()                                    # a Polars frame, one row a response
    scorer.select(run, "best.json", keep=0.1)

The public names are loaded when they are first used: `import scorer` imports neither torch nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorer.agreement.compare import compare as compare
    from scorer.clusters.cluster import cluster as cluster
    from scorer.config import Cluster as Cluster
    from scorer.config import ScoreConfig as ScoreConfig
    from scorer.config import Training as Training
    from scorer.learning.join import join_runs as join_runs
    from scorer.learning.learn import learn as learn
    from scorer.reporting.report import report as report
    from scorer.runs.directory import Run as Run
    from scorer.runs.run import score as score
    from scorer.selection.config import SelectConfig as SelectConfig
    from scorer.selection.export import select as select
    from scorer.selection.filtering import filter as filter
    from scorer.selection.selection import Selection as Selection
    from scorer.types import EngineError as EngineError
    from scorer.types import RowStatus as RowStatus
    from scorer.types import ScorerError as ScorerError
    from scorer.validation.validate import validate as validate

    __version__: str

HOMES = {
    "Cluster": "scorer.config",
    "EngineError": "scorer.types",
    "RowStatus": "scorer.types",
    "Run": "scorer.runs.directory",
    "ScoreConfig": "scorer.config",
    "ScorerError": "scorer.types",
    "SelectConfig": "scorer.selection.config",
    "Selection": "scorer.selection.selection",
    "Training": "scorer.config",
    "cluster": "scorer.clusters.cluster",
    "compare": "scorer.agreement.compare",
    "filter": "scorer.selection.filtering",
    "join_runs": "scorer.learning.join",
    "learn": "scorer.learning.learn",
    "report": "scorer.reporting.report",
    "score": "scorer.runs.run",
    "select": "scorer.selection.export",
    "validate": "scorer.validation.validate",
}
__all__ = ["__version__", *HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ifd-scorer")
    if name not in HOMES:
        raise AttributeError(f"module 'scorer' has no attribute '{name}'")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
