"""What the console is told of work that has several parts, one after another."""

from __future__ import annotations

from scorer.runs.progress import ConsoleProgress


def test_a_later_part_of_the_work_has_rates_of_its_own() -> None:
    with ConsoleProgress() as progress:
        progress.begin(1000, 0)
        progress.advance(1000, 5000)
        progress.begin(10, 4)
        progress.began -= 2  # seconds
        progress.advance(2, 0)
        (task,) = progress.bar.tasks
        assert (task.completed, task.total) == (6, 10)
        assert task.fields["rates"] == "1.0 records/s"
        progress.advance(2, 40)
        assert task.fields["rates"].endswith(" tokens/s")
