"""`scorer validate` as a whole: real trainings by TRL, killed and resumed; and what is refused before any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import scorer
from bench import validation as bench_validation
from bench.lib.families import byte_tokenizer
from bench.lib.readme import validation_table
from bench.lib.report import machine
from scorer.models.find import ModelFiles, find_model
from scorer.runs.directory import Run
from scorer.runs.progress import Silent
from scorer.types import ScorerError
from scorer.validation.comparison import Comparison
from scorer.validation.config import ValidateConfig
from scorer.validation.recipes import Lora, Recipe
from scorer.validation.samples import open_encoder, samples, training_row
from scorer.validation.target import open_target
from scorer.validation.trainer import Training, as_dataset, fine_tune
from tests.lib.command import Commands, alpaca, wait
from tests.lib.runs import make_run, write_clusters
from tests.lib.web import WebServer, http

Tiny = Callable[[str], ModelFiles]
ROOT = Path(__file__).parents[2]
RECIPE = "learning_rate = 1e-3\nepochs = 1\nbatch_size = 4\nsave_steps = 1\nmax_length = 512\nlora = true\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """60 records; `ifd` falls with their number, from below 1."""
    rows = alpaca(60, words=12)
    return make_run(tmp_path_factory.mktemp("validate") / "run", rows, ifd=[0.99 - i / 100 for i in range(60)])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def asked(tiny: Tiny, recipe: str) -> dict[str, Any]:
    """Options under which all is well."""
    return {"target": str(tiny("llama").path), "recipe": recipe, "keep": 8, "holdout": 12, "seeds": 1, "resamples": 50}


@pytest.fixture
def command(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def trained(folder: Path) -> dict[str, int]:
    """When each arm was finished, by its name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("arms/*/nll.parquet")}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Lines(Silent):
    """What a user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_the_embedded_model_on_forty_rows(tmp_path: Path) -> None:
    """From the data to the verdict, with the real model: both arms learn the form of the responses."""
    rows = json.loads((ROOT / "examples/alpaca.json").read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: abs(len(row["output"] or "") - 40))[:40]
    run = make_run(tmp_path / "run", rows, ifd=[0.5 + (i * 7 % 40) / 100 for i in range(40)])
    (tmp_path / "recipe.toml").write_text("epochs = 1\nlearning_rate = 1e-3\nbatch_size = 1\nlora = true\n")
    found = scorer.validate(
        run,
        tmp_path / "out",
        target="smollm2-135m",
        recipe=str(tmp_path / "recipe.toml"),
        keep=8,
        holdout=10,
        seeds=1,
        progress=False,
    )
    untrained, selected, random = found.arms
    assert (untrained.arm, selected.arm, random.arm) == ("untrained", "selected", "random")
    assert selected.records == random.records == 8
    for arm in (selected, random):
        assert arm.mean_of_rows.value is not None
        assert untrained.mean_of_rows.value is not None
        assert arm.mean_of_rows.value < untrained.mean_of_rows.value
    held_out = rows_of(tmp_path / "out/holdout.jsonl")
    for name in ("selected-42", "random-42"):
        train = rows_of(tmp_path / f"out/arms/{name}/train.jsonl")
        assert len(train) == 8
        assert not [row for row in train if row in held_out]
        assert not (tmp_path / f"out/arms/{name}/model").exists()


def test_the_same_twice_and_more_seeds_and_arms_later(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """What is done is not done again, and the figures are those of a validation that did all at once."""
    first = scorer.validate(run, tmp_path / "a", **asked)
    before = trained(tmp_path / "a")
    assert before.keys() == {"untrained", "selected-42", "random-42"}
    assert scorer.validate(run, tmp_path / "a", **asked) == first
    assert trained(tmp_path / "a") == before
    more = asked | {"seeds": 2, "arms": ("selected", "random", "length")}
    found = scorer.validate(run, tmp_path / "a", **more)
    after = trained(tmp_path / "a")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"selected-43", "random-43", "length-42", "length-43"}
    assert scorer.validate(run, tmp_path / "b", **more) == found
    train = {seed: rows_of(tmp_path / f"a/arms/random-{seed}/train.jsonl") for seed in (42, 43)}
    assert train[42] != train[43]
    content = json.loads((tmp_path / "a/validation.json").read_text())
    assert Comparison.from_dict(content["results"]) == found
    assert content["seeds"] == [42, 43]
    report = bench_validation.run(str(tmp_path / "a"), "data.jsonl")
    table = validation_table({**report, "machine": machine(), "command": "c"}).splitlines()
    assert [line.split(" | ")[0] for line in table if line.startswith("| ")] == [
        "| arm",
        "| ---",
        *(f"| {arm.arm}" for arm in found.arms),
        "| against random",
        "| ---",
        "| selected",
        "| length",
    ]


def test_a_killed_validation_goes_on(run: Run, asked: dict[str, Any], command: Commands, tmp_path: Path) -> None:
    """Killed in the training of the second arm, after a checkpoint: the first arm stays, and the table is the same."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    arguments = ("validate", run.path, "-o", tmp_path / "b", *options)
    command(*("validate", run.path, "-o", tmp_path / "a", *options)).done()
    process = command.start(*arguments)
    wait(lambda: list((tmp_path / "b/arms/random-42").glob("checkpoints/checkpoint-*/trainer_state.json")))
    process.kill()
    before = trained(tmp_path / "b")
    assert before.keys() == {"untrained", "selected-42"}
    shown = command(*arguments)
    assert "training goes on after step" in shown.done()
    assert "random" in shown.out
    after = trained(tmp_path / "b")
    assert {name: after[name] for name in before} == before
    results = [json.loads((tmp_path / name / "validation.json").read_text())["results"] for name in "ab"]
    assert results[0] == results[1]
    assert len(results[0]["pairs"]) == 2


def test_damage_is_trained_again(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """NLLs that are not what was written; an arm that does not say which it is; what a killed process left."""
    first = scorer.validate(run, tmp_path / "a", **asked)
    before = trained(tmp_path / "a")
    path = tmp_path / "a/arms/random-42/nll.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (tmp_path / "a/arms/selected-42/arm.json").write_bytes(b"\xff")
    (tmp_path / "a/arms/random-42/.model.0.tmp").mkdir()
    assert scorer.validate(run, tmp_path / "a", **asked) == first
    after = trained(tmp_path / "a")
    assert {name for name in before if before[name] != after[name]} == {"selected-42", "random-42"}
    assert not [*tmp_path.glob("a/arms/**/.*.tmp"), *tmp_path.glob("a/arms/.*")]


def test_the_records_of_each_arm(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """By ifd the first records of those that are not held out; by length the longest; by a file what it says."""
    (tmp_path / "arms.toml").write_text(
        "[best]\n[low]\nlowest = true\n[clustered]\nper_cluster = true\nmax_ifd = 0.985\n[length]\n"
    )
    write_clusters(run, {"record_id": range(60), "cluster": [i % 2 for i in range(60)]})
    scorer.validate(run, tmp_path / "a", **asked | {"arms": (str(tmp_path / "arms.toml"),)})
    numbers = {
        name: [int(row["prompt"][0]["content"].split(":")[0]) for row in rows_of(tmp_path / f"a/{path}.jsonl")]
        for name, path in {
            "held out": "holdout",
            **{arm: f"arms/{arm}-42/train" for arm in ("best", "low", "clustered", "length")},
        }.items()
    }
    rest = [i for i in range(60) if i not in numbers["held out"]]
    assert len(rest) == 48
    assert numbers["best"] == rest[:8]
    assert numbers["low"] == rest[-8:]
    clustered = [[i for i in rest if i % 2 == k and i > 0][:4] for k in (0, 1)]
    assert numbers["clustered"] == sorted(clustered[0] + clustered[1])
    sizes = {i: len(row["output"]) for i, row in enumerate(alpaca(60, words=12))}
    assert sorted(sizes[i] for i in numbers["length"]) == sorted(sizes[i] for i in rest)[-8:]
    assert np.bincount([i % 2 for i in numbers["held out"]]).tolist() == [6, 6]


KEYS = (  # writes the tools, the keys that a message has, and what it says and calls
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}"
    "{{ m.keys() | reject('eq', 'tool_calls') | list | tojson }}{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
)


def conversation(*said: str, **fields: Any) -> dict[str, Any]:
    """Messages of the user and the assistant in turn; `fields` are the last one's."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"messages": [*messages[:-1], messages[-1] | fields]}


def call(**arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": "find", "arguments": arguments}}]}


ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Sort:", "input": "b, a", "output": "a, b"},
    {"instruction": "  Spaces \n", "input": "", "output": " kept \n\n"},
    conversation("Who?", "Me.", "Why?", "Because."),
    {"messages": [{"role": "system", "content": "Be brief."}, *conversation("Who?", "Me.")["messages"]]},
    conversation("Think.", "Done.", reasoning_content="First this, then that."),
    conversation("Where?", "", **call(city="Rome")),
    conversation("When?", "", **call(city=3, hours=[1, 2]))
    | {"tools": [{"type": "function", "function": {"name": "a"}}]},
]


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chatml", "auto", "keys.jinja"])
@pytest.mark.usefixtures("smollm2")
def test_what_is_evaluated_is_what_trl_trains_on(template: str, tmp_path: Path) -> None:
    """The encoder's tokens begin those of TRL, and its spans begin where TRL's labels do, of every row."""
    import trl

    name = template
    if template.endswith(".jinja"):
        name = str(tmp_path / template)
        Path(name).write_text(KEYS)
    target = open_target(ValidateConfig(target="smollm2-135m"), Recipe(template=name), Silent())
    run = make_run(tmp_path / "run", ROWS, ifd=[0.5] * len(ROWS))
    encoder = open_encoder(target)
    with run.data as data:
        found = [sample for _, sample in samples(data.rows(), data.reading) if sample is not None]
    turns, batch = encoder.encode([sample.record for sample in found])
    assert len(turns) == len(batch) == len(ROWS)
    args = trl.SFTConfig(output_dir=str(tmp_path / "t"), report_to=[], use_cpu=True, bf16=False, max_length=1024)
    trainer = trl.SFTTrainer(
        model=_tiny_model(len(target.tokenizer)),
        args=args,
        train_dataset=as_dataset([training_row(sample, encoder) for sample in found]),
        processing_class=target.tokenizer,
    )
    for i, row in enumerate(trainer.train_dataset):
        ids, labels = row["input_ids"], row["labels"]
        ((start, end),) = batch.bounds(i).tolist()
        assert ids[:end] == batch.ids(i).tolist(), target.tokenizer.decode(ids)
        if template == "keys.jinja":  # without a generation prompt TRL takes the whole message for the response
            start = len(labels) - sum(label != -100 for label in labels)
        assert [k for k, label in enumerate(labels) if label != -100] == list(range(start, len(ids)))
        if "tools" not in found[i].value:
            assert len(ids) - end <= 2  # what ends the turn is trained on, and not compared by


def _tiny_model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
        )
    )


@pytest.mark.parametrize("lora", [Lora(rank=4), None])
def test_the_model_that_is_written_is_the_trained_one(tiny: Tiny, lora: Lora | None, tmp_path: Path) -> None:
    """It has learned the one response that it saw, an adapter is merged, and its template stays with it."""
    files = tiny("llama")
    recipe = Recipe(learning_rate=5e-2 if lora else 1e-2, epochs=20, batch_size=4, max_length=256, lora=lora)
    target = open_target(ValidateConfig(target=str(files.path)), recipe, Silent())
    row = {"prompt": [{"role": "user", "content": "Say it."}], "completion": [{"role": "assistant", "content": "abab"}]}
    fine_tune(target, Training([row] * 4, recipe, 1), tmp_path / "checkpoints", tmp_path / "model", Silent())
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
    said = model.generate(prompt["input_ids"], max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == "abab"
    assert not (tmp_path / "checkpoints").exists()
    assert find_model(str(tmp_path / "model")).path == tmp_path / "model"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few rows": ({"keep": 3}, "arm selected: 3 records are too few to train on, the recipe needs 5"),
    "equal arms": ({"keep": "100%", "arms": ("selected", "all")}, "the same"),
    "an encoder": ({"target": "bert"}, "no causal language model .BertForMaskedLM.: choose"),
    "no response": ({"recipe": "silent.toml"}, "0 records are too few .*60 chat_template_error"),
    "a judge of one arm": ({"judge": "http://127.0.0.1:9", "judge_model": "m", "arms": ("all",)}, "of two arms"),
    "text for arms": ({"arms": "random"}, "'random' is not a tuple"),
    "text for data": ({"data": "a.jsonl"}, "is not a list of paths"),
    "held out too much": ({"holdout": 40}, "more than half"),
    "held out too little": ({"holdout": 5}, "say nothing"),
    "no such target": ({"target": "no/such-model"}, "no/such-model"),
    "no such column": ({"by": "best"}, "by: 'best' is not one of"),
    "no clusters": ({"per_cluster": True}, "scorer cluster"),
    "long context": ({"recipe": "superfiltering"}, "arm selected: 8 records are too few"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_before_training(
    run: Run, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, words = WRONG[name]
    monkeypatch.chdir(tmp_path)
    if name == "an encoder":
        BertForMaskedLM(
            BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=1)
        ).save_pretrained("bert")
        byte_tokenizer().save_pretrained("bert")
    Path("silent.toml").write_text(RECIPE + 'template = "silent.jinja"')
    Path("silent.jinja").write_text("{{ messages[0].content }}")
    fresh = make_run(tmp_path / "run", alpaca(60, words=12), ifd=[0.9] * 60) if name == "no clusters" else run
    with pytest.raises(ScorerError, match=words):
        scorer.validate(fresh, tmp_path / "a", **asked | options)
    assert not (tmp_path / "a/arms").exists()


def test_a_template_whose_tokens_the_target_lacks(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    for name, text in (("a", 'template = "chatml"'), ("b", 'template = "own.jinja"')):
        (tmp_path / f"{name}.toml").write_text(RECIPE + text)
    with pytest.raises(ScorerError, match=r"has no token <\|im_start\|>, <\|im_end\|>, which the template \(chatml\)"):
        scorer.validate(run, tmp_path / "out", **asked | {"recipe": str(tmp_path / "a.toml")})
    with pytest.raises(ScorerError, match=r"own.jinja can't be read"):
        scorer.validate(run, tmp_path / "out", **asked | {"recipe": str(tmp_path / "b.toml")})


def test_near_duplicates_of_held_out_records(asked: dict[str, Any], tmp_path: Path) -> None:
    """Each record is there twice, once in capitals: what is like a held-out record is in no arm."""
    rows = alpaca(40, words=12)
    rows += [{**row, "output": row["output"].upper() + "!"} for row in rows]
    run = make_run(tmp_path / "run", rows, ifd=[0.99 - i / 100 for i in range(80)])
    lines = Lines()
    scorer.validate(run, tmp_path / "a", **asked | {"arms": ("selected", "all")}, progress=lines)
    assert "left out of every arm: 12 records that are nearly the same as a held-out one" in lines.lines
    train = rows_of(tmp_path / "a/arms/all-42/train.jsonl")
    assert len(train) == 80 - 12 - 12
    held_out = {row["prompt"][0]["content"] for row in rows_of(tmp_path / "a/holdout.jsonl")}
    assert not held_out & {row["prompt"][0]["content"] for row in train}


def test_records_of_a_file_to_compare_on(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """Other records are compared on; a copy of one that an arm trains on is an error, wherever it is no part of one."""
    other = alpaca(15, seed=5, words=12)
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*other, {"instruction": "x", "output": ""}]))
    lines = Lines()
    options = asked | {"eval_file": path, "arms": ("selected", "length")}
    found = scorer.validate(run, tmp_path / "a", **options, progress=lines)
    assert found.records == 15
    assert f"left out: 1 of 16 records of {path} can't be trained on (1 not_convertible)" in lines.lines
    best = {**alpaca(60, words=12)[0], "n": None}
    with path.open("a") as file:
        file.write(json.dumps(best) + "\n")
    with pytest.raises(
        ScorerError, match=r"eval.jsonl:17 is nearly the same as record 0, which arm selected trains on"
    ):
        scorer.validate(run, tmp_path / "b", **options)


def test_the_folder(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """Of another validation, not empty, a part of the run, broken: one error each, and nothing is lost."""
    scorer.validate(run, tmp_path / "a", **asked)
    before = trained(tmp_path / "a")
    with pytest.raises(ScorerError, match=r"holds another validation .*keep was 8, is 9"):
        scorer.validate(run, tmp_path / "a", **asked | {"keep": 9})
    with pytest.raises(ScorerError, match="held-out records changed"):
        scorer.validate(run, tmp_path / "a", **asked | {"holdout": 13})
    with pytest.raises(ScorerError, match="are too few"):
        scorer.validate(run, tmp_path / "a", **asked | {"keep": 3}, fresh=True)
    assert trained(tmp_path / "a") == before
    scorer.validate(run, tmp_path / "a", **asked | {"keep": 9}, fresh=True)
    assert trained(tmp_path / "a").keys() == before.keys()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").write_text("mine")
    with pytest.raises(ScorerError, match="no folder of a validation, and not empty"):
        scorer.validate(run, tmp_path / "b", **asked, fresh=True)
    with pytest.raises(ScorerError, match="would replace a part of the run"):
        scorer.validate(run, run.path / "scores", **asked)
    (tmp_path / "b/validation.json").write_text("[]")  # a split of a dataset, say
    with pytest.raises(ScorerError, match="no folder of a validation, and not empty"):
        scorer.validate(run, tmp_path / "b", **asked, fresh=True)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["file", "validation.json"]
    (tmp_path / "a/validation.json").write_text("{}")
    with pytest.raises(ScorerError, match=r"validation.json can't be read .*--fresh"):
        scorer.validate(run, tmp_path / "a", **asked)


def test_what_can_not_be_trained_on_is_said(asked: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        *alpaca(40, words=12),
        {"instruction": "Empty", "output": ""},
        {"instruction": "Long " * 600, "output": "x"},
    ]
    run = make_run(tmp_path / "run", rows, ifd=[0.9 - i / 100 for i in range(42)])
    lines = Lines()
    scorer.validate(run, tmp_path / "a", **asked | {"arms": ("all",)}, progress=lines)
    assert "left out: 2 of 42 records can't be trained on (1 not_convertible, 1 prompt_too_long)" in lines.lines
    assert len(rows_of(tmp_path / "a/arms/all-42/train.jsonl")) == 28


def test_a_judge_of_the_answers(run: Run, asked: dict[str, Any], tmp_path: Path) -> None:
    """One that always prefers the first answer has no verdict; what is answered and judged is not asked for again."""

    def reply(body: bytes) -> bytes:
        text = "Yes." if "1 to 10" not in json.loads(body)["messages"][0]["content"] else "9 3\nThe first is better."
        return http(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())

    server = WebServer(reply)
    try:
        scorer.validate(run, tmp_path / "a", **asked | {"keep_models": True})
        judged = {"judge": f"{server.url}/v1", "judge_model": "m", "judge_prompts": 4, "answer_tokens": 8}
        (verdicts,) = scorer.validate(run, tmp_path / "a", **asked | judged).verdicts
        same = (
            pl.read_parquet(tmp_path / "a/arms/selected-42/answers.parquet")["answer"].to_list()
            == pl.read_parquet(tmp_path / "a/arms/random-42/answers.parquet")["answer"].to_list()
        )
        assert not same
        assert (verdicts.arm, verdicts.against, verdicts.failed) == ("selected", "random", {})
        assert (verdicts.wins, verdicts.losses, verdicts.disagreed, verdicts.winning_score) == (0, 0, 4, 1.0)
        asked_for = server.requests
        assert asked_for >= 1 + 1 + 2 * 4
        assert scorer.validate(run, tmp_path / "a", **asked | judged).verdicts == (verdicts,)
        assert server.requests == asked_for + 1  # whether it is there
    finally:
        server.close()
    with pytest.raises(ScorerError, match="judge"):
        scorer.validate(run, tmp_path / "b", **asked | judged | {"judge": "http://127.0.0.1:9/v1"})
    assert not (tmp_path / "b/arms").exists()
