"""`scorer report`: what is on the page, and what a real browser makes of it, hostile texts included."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread

from scorer.agreement.compare import compare
from scorer.agreement.statistics import Bootstrap
from scorer.reporting.report import report
from scorer.runs.directory import Run
from scorer.validation.comparison import Comparison
from scorer.validation.statistics import compare_arms
from tests.lib.browser import open_page
from tests.lib.command import Commands
from tests.lib.runs import make_run, write_clusters

BLUE = np.array([0x3D, 0x85, 0xC6]) / 255  # of the first run's lines
HOSTILE = (
    "<script>document.title='owned';console.error('ran')</script>",
    '"><img src=x onerror="document.title=\'owned\'"><img src=http://example.invalid/x.png>',
    "</pre></details></main></body><style>@import url(http://example.invalid/x.css);</style>",
    "<iframe src=http://example.invalid/></iframe><svg onload=document.title='owned'>",
)
ROWS = [
    {"instruction": f"q{i} {HOSTILE[i % 4]}", "input": "", "output": f"a{i} {HOSTILE[(i + 1) % 4]}"} for i in range(20)
]
STATUS = ["ok"] * 18 + ["empty_response", "oom"]


def column(values: list[float]) -> list[Any]:
    """Runs of 20 records, the last two without scores."""
    return [*values, None, None]


def scores(ifd: list[float]) -> dict[str, list[Any]]:
    alone = [5.0 + i for i in range(18)]
    return {
        "status": STATUS,
        "ifd": column(ifd),
        "ppl_alone": column(alone),
        "ppl_conditioned": column([a * b for a, b in zip(ifd, alone, strict=True)]),
        "response_tokens": column([3 + 2 * i for i in range(18)]),
    }


WEAK = [0.3 + 0.05 * i for i in range(18)]  # 0.3 to 1.15: fourteen lie below 1
STRONG = [*WEAK[:14], *WEAK[:13:-1]]  # the last four turned round


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    weak, strong = tmp_path / "weak", tmp_path / "strong $x^2$ <b>"
    run = make_run(weak, ROWS, **scores(WEAK))
    make_run(strong, ROWS, **scores(STRONG))
    # 12 and 8 records; the four best below 1 are records 10 to 13
    write_clusters(run, {"record_id": range(20), "cluster": [0] * 12 + [1] * 8})
    return weak, strong


def rows_of(page: str) -> list[list[str]]:
    """The cells of all tables, row by row."""
    return [
        [unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]


def test_a_browser_that_is_told_to_run_and_fetch_does(tmp_path: Path) -> None:
    """The instrument of the tests below sees scripts, errors and requests."""
    page = tmp_path / "control.html"
    page.write_text(f"<title>mine</title><body>{HOSTILE[0]}<img src=http://example.invalid/x.png>")
    seen = open_page(page, tmp_path)
    assert "<title>owned</title>" in seen.document
    assert any('"ran"' in line for line in seen.console)
    assert any("example.invalid/x.png" in line for line in seen.requests)


def test_the_page_in_a_browser(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = report(runs, tmp_path / "report.html")
    seen = open_page(page, tmp_path)
    assert seen.console == []
    assert seen.requests == []
    assert "<title>scorer: " in seen.document
    assert "owned" not in re.findall(r"<title>(.*?)</title>", seen.document)[0]
    assert not re.search(r"<(script|iframe|link rel=.stylesheet|img)\b", seen.document)
    # ifd, ppl_conditioned, ppl_alone, length, weak against strong, agreement, clusters
    assert len(re.findall(r"<figure>.*?<svg .*?</svg></figure>", seen.document, re.DOTALL)) == 7
    assert seen.document.rstrip().endswith("</html>")
    assert len(re.findall("</main>", seen.document)) == 1
    drawn = imread(seen.screenshot)[:, :, :3]
    for colour in (BLUE, 0.75 * BLUE + 0.25):  # lines, and the points of images in the pictures
        assert (np.abs(drawn - colour).max(axis=2) < 0.03).sum() > 300


def validated(folder: Path, results: Any, **facts: Any) -> Path:
    """The folder of a validation of the run `weak` beside it, with these results."""
    folder.mkdir()
    identity = {"data": Run(folder.parent / "weak").manifest.identity["inputs"]}
    content = {"version": 1, "identity": identity, "results": results, **facts}
    (folder / "validation.json").write_text(json.dumps(content))
    return folder


def two_arms(names: tuple[str, str] = ("selected", "random")) -> Comparison:
    """Two records, of which the first arm has the one 0.5 and the other 1.5 nats a token lower; two equal seeds."""
    nlls = {names[0]: [1.0, 2.0], names[1]: [1.5, 3.5]}
    results = pl.DataFrame(
        [(arm, seed, row, 10 * nlls[arm][row], 10) for arm in names for seed in (1, 2) for row in (0, 1)],
        ["arm", "seed", "row", "nll", "tokens"],
        orient="row",
    )
    rows = pl.DataFrame({"row": [0, 1], "cluster": [3, 3], "group": ["x", HOSTILE[1]]})
    return compare_arms(results, rows, pl.DataFrame({"arm": names, "records": 7, "tokens": 70}), Bootstrap(200))


def test_what_it_says_of_a_validation(runs: tuple[Path, Path], command: Commands, tmp_path: Path) -> None:
    judged = {"arm": "selected", "against": "random", "wins": 4, "ties": 0, "losses": 2, "disagreed": 1}
    found = two_arms().to_dict() | {"verdicts": [judged | {"failed": {}, "winning_score": 1.286}]}
    validated(tmp_path / "out", found, target=HOSTILE[0], recipe="lora", seeds=[1, 2])
    command("report", "weak", "-o", "r.html", "--validation", "out", "--pictures", "p").done()
    text = (tmp_path / "r.html").read_text()
    assert "<h2>Does the selection help?</h2>" in text
    assert f'<p class="note">target: {HOSTILE[0]}; recipe: lora; seeds: 1, 2</p>' in unescape(text)
    assert HOSTILE[0] not in text
    assert "selected against random: better by the mean of rows, better by NLL a token<br>" in text
    rows = rows_of(text)
    assert ["selected", "7", "70", *["1.5000 (1.0000 to 2.0000)"] * 2, "none", "none"] in rows
    less = "-1.0000 (-1.5000 to -0.5000)"
    assert ["selected", less, less, "100.0% (100.0 to 100.0)", "none", "none"] in rows
    assert ["selected", "random", "4", "0", "2", "1", "0", "1.286"] in rows
    assert ["3", "2", "1.5000 (1.0000 to 2.0000)", "2.5000 (1.5000 to 3.5000)"] in rows
    assert [HOSTILE[1], "1", *["2.0000 (2.0000 to 2.0000)", "3.5000 (3.5000 to 3.5000)"]] in rows
    assert imread(tmp_path / "p" / "validation.png").std() > 0.01
    assert "Does the selection help?" not in report(runs[:1], tmp_path / "without.html").read_text()


def test_a_validation_in_a_browser(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = validated(tmp_path / "out", two_arms(("\x00LONE" + HOSTILE[3], HOSTILE[0])).to_dict(), target=HOSTILE[2])
    path = out / "validation.json"
    path.write_text(path.read_text().replace("LONE", "\\ud800"))
    seen = open_page(report(runs[:1], tmp_path / "report.html", validation=out), tmp_path)
    assert (seen.console, seen.requests) == ([], [])
    assert "Does the selection help?" in seen.document
    assert not re.search(r"<(script|iframe|link rel=.stylesheet|img)\b", seen.document)
    assert re.search(r'<figure>.*?id="title-validation".*?<svg .*?</svg></figure>', seen.document, re.DOTALL)


@pytest.mark.usefixtures("runs")
def test_a_validation_that_is_none(command: Commands, tmp_path: Path) -> None:
    def line(results: Any, **facts: Any) -> str:
        folder = validated(tmp_path / f"out-{len(list(tmp_path.iterdir()))}", results, **facts)
        return command("report", "weak", "-o", "r.html", "--validation", folder).line()

    found = two_arms().to_dict()
    assert "is unfinished: run the same command" in line(None)
    assert "can be read; restore it: ValueError: Comparison lacks arms, left_out" in line({"records": 1})
    assert "'many' is not int" in line(found | {"records": "many"})
    assert "KeyError: 'cluster'" in line(
        found | {"sizes": {"cluster": {"3": 2}}, "arms": [found["arms"][0] | {"by": {}}]}
    )
    assert "'3' is not Verdicts" in line(found | {"verdicts": [3]})
    assert "has no results that can be read" in line(found | {"verdicts": 3})
    assert "other data than weak" in line(found, identity={"data": []})
    assert "is no folder of a validation" in command("report", "weak", "-o", "r.html", "--validation", "weak").line()
    assert not (tmp_path / "r.html").exists()


def test_its_policy_holds_even_where_nothing_is_escaped(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = report(runs[:1], tmp_path / "report.html")
    page.write_text(page.read_text().replace("<main>", f"<main>{''.join(HOSTILE)}"))
    seen = open_page(page, tmp_path)
    assert "<title>owned</title>" not in seen.document
    assert not any(seen.requests)  # it may open a connection ahead of a request that is then refused
    assert any("Content Security Policy" in line for line in seen.console)


def test_what_it_says(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = report(runs, tmp_path / "report.html", keep=4).read_text()
    rows = rows_of(text)
    assert ["records", "20", "20"] in rows
    assert ["rows ok", "18", "18"] in rows
    assert ["rows oom", "1", "1"] in rows
    assert ["Spearman of ifd with length", "+1.000", "+0.979"] in rows  # 1 - 6 (9 + 1 + 1 + 9) / (18 * 323)
    assert ["ifd", "0.3", "0.385", "0.725", "1.065", "1.15"] in rows
    assert "Spearman 0.979, Kendall tau-b 0.922" in text  # 6 of 153 pairs turned round
    (pair,) = compare(runs)
    assert f"{pair.agreement.kendall.value:.3f}" == "0.922"  # type: ignore[union-attr]
    assert "18 records have both values, 2 have not" in text
    assert ["0", "12", "2", "2", "16.7%"] in rows  # by rank 10 and 11
    assert ["1", "8", "2", "2", "25.0%"] in rows
    heads = [unescape(re.sub("<.*?>", "", head)) for head in re.findall(r'<p class="head">(.*?)</p>', text)]
    assert [int(re.findall(r"record (\d+)", head)[0]) for head in heads] == [
        *(13, 12, 11, 10),
        *(17, 16, 15, 14, 13),
        *(0, 1, 2, 3, 4),
    ]
    assert heads[0].endswith("; kept")
    assert heads[4].endswith("; ifd_too_high")
    assert heads[9].endswith("; below_cut")
    assert "weak.jsonl:14)" in heads[0]
    shown = [unescape(text) for text in re.findall(r'<pre dir="auto">(.*?)</pre>', text, re.DOTALL)]
    assert shown[:2] == [ROWS[13]["instruction"], ROWS[13]["output"]]
    manifests = re.findall(r"<details>.*?<pre>(.*?)</pre>", text, re.DOTALL)
    assert [json.loads(unescape(m)) for m in manifests] == [Run(run).manifest.to_dict() for run in runs]


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [{"instruction": "x" * 1600, "output": "&" * 1507}], ifd=[0.5])
    text = report([tmp_path / "run"], tmp_path / "report.html", keep="100%").read_text()
    assert f"{'x' * 1500}<i> … 100 more characters are cut</i>" in text
    assert f"{'&amp;' * 1500}<i> … 7 more characters are cut</i>" in text


def test_pictures_as_files_for_a_measure_of_learning(command: Commands, tmp_path: Path) -> None:
    """Without an alone view, ranked by lp1, from the command line."""
    lp1 = [0.1 * i - 0.4 for i in range(20)]
    ppls = {f"ppl_{i}": [9.0 - i + 0.1 * j for j in range(20)] for i in range(3)}
    make_run(tmp_path / "run", ROWS, lp1=lp1, response_tokens=list(range(1, 21)), **ppls)
    said = command("report", "run", "-o", "r.html", "--pictures", "a/b", "--by", "lp1", "--keep", "10%").done()
    assert said.startswith("report: r.html, ")
    files = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert files == [f"{name}.{suffix}" for name in ("epochs-1", "length", "lp1") for suffix in ("png", "svg")]
    for path in (tmp_path / "a" / "b").iterdir():
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert imread(path).std() > 0.01
    heads = re.findall(r"<b>record (\d+)</b>.*?<b>(\w+)</b>", (tmp_path / "r.html").read_text())
    assert heads[:2] == [("0", "kept"), ("1", "kept")]  # the lowest are kept


def test_many_records_make_no_large_page(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    ifd, length = draw.uniform(0.1, 1, 50_000), draw.integers(1, 900, 50_000)
    run = make_run(
        tmp_path / "run", [{"instruction": "q", "output": "a"}] * 50_000, ifd=[*ifd], response_tokens=[*length]
    )
    write_clusters(run, {"record_id": range(50_000), "cluster": draw.integers(0, 5_000, 50_000)})
    assert report([run, run], tmp_path / "report.html").stat().st_size < 600_000


def test_the_same_scores_give_the_same_bytes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert report(runs, tmp_path / "a.html").read_bytes() == report(runs, tmp_path / "b.html").read_bytes()


def test_data_that_changed_since_is_not_shown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "weak.jsonl").write_text('{"instruction": "other", "output": "other"}\n' * 20)
    text = report(runs, tmp_path / "report.html").read_text()
    assert "weak.jsonl changed since it was scored" in text
    assert '<pre dir="auto">' not in text


def test_nothing_was_scored(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ROWS, status=["oom"] * 20)
    assert ["rows oom", "20"] in rows_of(report([tmp_path / "run"], tmp_path / "r.html").read_text())
    text = report([tmp_path / "run", tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "<svg" not in text


@pytest.mark.usefixtures("runs")
def test_what_is_refused(command: Commands, tmp_path: Path) -> None:
    assert "name it .html" in command("report", "weak", "-o", "weak.jsonl").line()
    assert "is not a run directory" in command("report", "none", "-o", "r.html").line()
    assert "luck" in command("report", "weak", "-o", "r.html", "--by", "luck").line()
    assert "keep" in command("report", "weak", "-o", "r.html", "--keep", "0%").line()
    make_run(tmp_path / "other", ROWS[:5], ifd=[0.5] * 5)
    assert "15 of the 20 rows" in command("report", "weak", "other", "-o", "r.html").line()
    assert not (tmp_path / "r.html").exists()


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)
