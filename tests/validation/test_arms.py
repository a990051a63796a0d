"""Held-out records and arms: never the same, of the sizes that were asked for, and named by the user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scorer.types import ScorerError
from scorer.validation.arms import TOLERANCE, Arm, Plan, read_arms, training_sets
from scorer.validation.config import ValidateConfig
from scorer.validation.holdout import Texts, draw
from scorer.validation.recipes import RECIPES, Lora, Recipe, read_recipe

STORY = "Once upon a time a fox met a crow that held a large piece of cheese in its beak, high up in an old oak tree."


def pool(tokens: list[int]) -> pl.DataFrame:
    return pl.DataFrame({"record_id": range(10, 10 + len(tokens)), "tokens": tokens})


def selected(*options: str) -> list[Arm]:
    return read_arms(("selected", *options), {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=60, max_size=200), st.integers(1, 20), st.integers(0, 10**6))
def test_no_arm_trains_on_what_is_held_out(tokens: list[int], count: int, seed: int) -> None:
    table = pool(tokens).with_columns(cluster=pl.col("record_id") % 3)
    held_out = draw(table, count, seed)
    assert len(held_out) == count == len(set(held_out))
    rest = pool(tokens).filter(~pl.col("record_id").is_in(held_out))
    best = rest.sort("tokens", "record_id")["record_id"].to_list()[:7]
    assume(best != rest.sort("tokens", descending=True, maintain_order=True)["record_id"].to_list()[:7])
    arms = selected("random", "length", "all")
    sets = training_sets(arms, rest, lambda _: best, Plan((seed, seed + 1), "rows", 1, 1))
    assert [(one.arm, len(one.ids)) for one in sets] == [
        (name, size)
        for name, size in (("selected", 7), ("random", 7), ("length", 7), ("all", rest.height))
        for _ in "12"
    ]
    sizes = dict(rest.iter_rows())
    for one in sets:
        assert not set(one.ids) & set(held_out)
        assert one.tokens == sum(sizes[i] for i in one.ids)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_arms_of_equal_tokens(seed: int) -> None:
    draws = np.random.default_rng(seed)
    table = pool(np.exp(draws.normal(4, 1, 400)).astype(int).clip(1).tolist())
    best = table.sort("tokens", descending=True)["record_id"].to_list()[20:60]
    for one in training_sets(selected("random", "length"), table, lambda _: best, Plan((seed,), "tokens", 1, 1)):
        assert one.tokens == pytest.approx(
            sum(table.filter(pl.col("record_id").is_in(best))["tokens"]), rel=TOLERANCE / 2
        )


def test_the_held_out_records_look_like_the_data() -> None:
    """Each cluster has its share, 1 of 10, and within it each quarter by length."""
    table = pl.DataFrame({"record_id": range(800), "tokens": range(800), "cluster": [i % 2 for i in range(800)]})
    held_out = draw(table, 80, 7)
    assert held_out == sorted(held_out)
    assert np.bincount([i % 2 * 4 + i // 200 for i in held_out]).tolist() == [10] * 8
    assert draw(table, 80, 7) == held_out
    assert draw(table, 80, 8) != held_out
    with pytest.raises(ScorerError, match="more than half"):
        draw(table, 401, 7)


def test_random_draws_anew_for_each_seed_and_length_takes_the_longest() -> None:
    table = pool(list(range(1, 101)))
    sets = training_sets(read_arms(("random", "length"), {}), table, lambda _: (), Plan((1, 2), "rows", 5, 1))
    first, second, longest, again = (one.ids for one in sets)
    assert first != second
    assert longest == again == (105, 106, 107, 108, 109)


@pytest.mark.parametrize(
    ("text", "alike"),
    [
        (STORY, True),
        (STORY.upper().replace(",", " -- "), True),
        (STORY + " Indeed!", True),
        (STORY.replace("fox", "wolf").replace("crow", "raven").replace("cheese", "bread"), False),
        ("A fox met a crow.", False),
        ("", False),
    ],
)
def test_texts_that_are_nearly_the_same(text: str, alike: bool) -> None:
    texts = Texts({3: "Something else altogether, of other words.", 5: STORY})
    assert texts.like(text) == (5 if alike else None)


def test_what_many_texts_share_does_not_make_them_alike() -> None:
    """A long prompt that all have; texts without words; and in spite of both, a copy."""
    prompt = "Decide whether the review below is positive or negative, and answer with this one word alone. " * 5
    reviews = [f"{prompt} Review {i}: {STORY[i : i + 40]}" for i in range(40)]
    texts = Texts(dict(enumerate([*reviews, "!!!", "???"])))
    assert texts.like(f"{prompt} Review 99: I would not buy this again for any money.") is None
    assert texts.like(reviews[3].upper()) == 3
    assert texts.like("!!!") == 40
    assert texts.like("...") is None


def test_short_texts_and_scripts_without_spaces() -> None:
    texts = Texts({0: "Yes.", 1: "机器学习是人工智能的一个分支,它让计算机从数据中学习"})
    assert texts.like("yes") == 0
    assert texts.like("机器学习是人工智能的一个分支。它让计算机从数据中学习!") == 1
    assert texts.like("机器学习与统计学不同,它更重视预测") is None


@pytest.mark.parametrize(
    ("options", "sizes", "words"),
    [
        (("random",), {"keep": 40, "equal": "rows", "least": 41}, "40 records are too few"),
        (("all",), {"keep": 100, "equal": "rows", "least": 1}, "selected and all are the same 100 records"),
        (("length",), {"keep": 100, "equal": "rows", "least": 1}, "the same 100 records"),
    ],
)
def test_sets_that_can_not_be_compared(options: tuple[str, ...], sizes: dict[str, int], words: str) -> None:
    table = pool(list(range(1, 101)))
    chosen = table["record_id"].to_list()[: sizes["keep"]]
    with pytest.raises(ScorerError, match=words):
        training_sets(selected(*options), table, lambda _: chosen, Plan((1,), str(sizes["equal"]), 1, sizes["least"]))


def test_tokens_that_no_record_makes_up() -> None:
    with pytest.raises(ScorerError, match="no records make the 10 response tokens of the first arm"):
        training_sets(selected("length"), pool([7, 5, 5, 1000]), lambda _: [11, 12], Plan((1,), "tokens", 1, 1))


def test_arms_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "arms.toml"
    path.write_text('[ifd]\n[low]\nby = "ppl_conditioned"\nlowest = true\nkeep = "5%"\nrun = "other"\n[random]\n')
    ifd, low, random = read_arms((str(path),), {"keep": "20%"})
    assert (ifd.name, ifd.run, random) == ("ifd", None, Arm("random"))
    assert ifd.config is not None
    assert low.config is not None
    assert (ifd.config.keep, ifd.config.by) == ("20%", None)
    assert (low.config.keep, low.config.by, low.config.lowest, low.run) == ("5%", "ppl_conditioned", True, "other")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1", "a is no table"),
        ("[a]\nbest = 1", "a has unknown option best"),
        ("[a]\nrandom = true", "unknown option random"),
        ('[a]\nkeep = "most"', "a: keep"),
        ("[a]\nby = 3", "by: 3 is not text"),
        ("[a]\nrun = 3", "run, of a, is not"),
        ("[a]\ndrop_flagged = 3", "a: drop_flagged: 3 is not a tuple of names"),
        ("[random]\nkeep = 3", "random is a baseline"),
        ("[untrained]", "untrained is the target before training"),
        ('["../a"]', "an arm's name"),
        ("[a", "is no TOML file"),
        ("", "holds no arm"),
    ],
)
def test_files_that_are_no_arms(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "arms.toml"
    path.write_text(text)
    with pytest.raises(ScorerError, match=words):
        read_arms((str(path),), {})
    with pytest.raises(ScorerError, match="no such file"):
        read_arms((str(tmp_path / "none.toml"),), {})


def test_arms_that_there_are_not() -> None:
    with pytest.raises(ScorerError, match="arms: 'best' is not one of selected, random, length, all"):
        read_arms(("best",), {})
    with pytest.raises(ScorerError, match="each arm once"):
        ValidateConfig(target="x", arms=("random", "random"))
    with pytest.raises(ScorerError, match="--target"):
        ValidateConfig()
    with pytest.raises(ScorerError, match="--judge-model"):
        ValidateConfig(target="x", judge="http://127.0.0.1:1/v1")


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('learning_rate = 1e-4\ntemplate = "chatml"\n[lora]\nrank = 4\n')
    assert read_recipe(str(path)) == Recipe(learning_rate=1e-4, template="chatml", lora=Lora(rank=4))
    assert read_recipe(str(path), full=True) == Recipe(learning_rate=1e-4, template="chatml")
    assert read_recipe("lora") == RECIPES["lora"]
    paper = read_recipe("superfiltering")
    assert (paper.epochs, paper.learning_rate, paper.batch_size, paper.lora) == (3, 2e-5, 128, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown option epoch"),
        ("epochs = 0", "epochs: 0"),
        ("learning_rate = 2", "learning_rate"),
        ('batch_size = "8"', "batch_size"),
        ("lora = 3", "lora is true, false or a table"),
        ("lora = 1", "lora is true, false or a table"),
        ("[lora]\nrank = 0", "rank: 0"),
        ("[lora]\nr = 8", "unknown option r"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ScorerError, match=f"recipe.toml: .*{words}"):
        read_recipe(str(path))
    with pytest.raises(ScorerError, match="recipe: 'best' is not one of"):
        read_recipe("best")
