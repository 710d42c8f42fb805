"""Lines that a run prints: truncated and dropped rows, and evaluations."""

import pytest

from dpo_jax.reporting import console

REPORT = {"prompts_cut": 2, "answers_cut": 3, "boundary_split": 0, "dropped": []}


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ({}, "2 prompts and 3 answers truncated; no rows dropped"),
        (
            {"boundary_split": 4, "dropped": [{"rows": 5, "reason": "empty"}, {"rows": 1, "reason": "equal answers"}]},
            "2 prompts and 3 answers truncated; 4 pairs with prompt and answer tokenized separately; "
            "5 rows dropped: empty; 1 rows dropped: equal answers",
        ),
    ],
)
def test_truncation_is_one_line(report, line):
    assert console.truncation(REPORT | report) == line


def test_the_table_has_the_metrics_of_the_first_and_the_last_evaluation(capsys):
    rows = [{"step": step, "eval/loss": loss, "eval/pairs": 8} for step, loss in ((0, 0.6931), (2, 0.6), (4, 0.5))]
    console.before_and_after(rows[:1])
    assert capsys.readouterr().err == ""
    console.before_and_after(rows)
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["before", "after"],
        ["eval/loss", "0.6931", "0.5000"],
    ]


def test_an_evaluation_is_one_line_of_its_main_metrics():
    row = {"eval/loss": 0.5, "eval/rewards/margins": -1.0, "eval/pairs": 8}
    assert console.one_line(row) == "eval/loss 0.5000, eval/rewards/margins -1.0000"
