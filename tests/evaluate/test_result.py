"""The JSON of an evaluation: its sums, and that a hostile one is refused."""

from __future__ import annotations

import json

import pytest

from aer_megatron.algo.passk import pass_interval
from aer_megatron.evaluate.result import counts, read_result, sum_up
from aer_megatron.evaluate.tables import render, result_rows
from tests.support.evaluations import problem, result, written


def test_read_back_as_written(tmp_path):
    made = result([0, 4, 8])
    assert read_result(written(tmp_path / "a.json", made)) == made


def test_sums():
    answers = result([0, 4, 8]).sets["gsm8k"].answers[0]
    found = sum_up(answers)
    assert found["pass@1"].value == 0.5
    assert (found["pass@1"].low, found["pass@1"].high) == pass_interval(*counts(answers.problems), k=1)
    # 4 right and 4 wrong alike, 4 samples: right and wrong win equally often
    assert found["maj@4"].value == pytest.approx((0 + 0.5 + 1) / 3)
    assert "maj@1" not in found
    assert (found["avg@8"].value, found["response_length_mean"].value, found["truncated"].value) == (0.5, 10, 0)
    silent = answers.model_copy(update={"problems": [problem(0, 4, classes=None, right=None)]})
    assert "maj@4" not in sum_up(silent)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("more",), 1),
        (("sets",), {}),
        (("sets", "gsm8k", "answers", 0, "problems", 0, "correct"), 9),
        (("sets", "gsm8k", "answers", 0, "problems", 0, "samples"), -1),
        (("sets", "gsm8k", "answers", 0, "problems", 0, "id"), "../../etc"),
        (("sets", "gsm8k", "answers", 0, "problems", 0, "right"), 7),
        (("sets", "gsm8k", "answers", 0, "problems", 0, "reward"), "1"),
        (("sets", "gsm8k", "answers", 0, "problems"), []),
        (("sets", "gsm8k", "answers", 0, "k"), [9]),
    ],
)
def test_what_does_not_fit_the_form_is_refused(tmp_path, path, value):
    file = written(tmp_path / "a.json", result([1, 2]))
    table = json.loads(file.read_text())
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"a\.json is no result of aer evaluate: "):
        read_result(file)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_result(tmp_path / "a.json")


def test_tables_are_inert():
    head, rows = result_rows(result([4]))
    assert head[:4] == ("set", "T", "problems", "n")
    assert head[4:7] == ("pass@1", "pass@4", "maj@4")
    hostile = [["\x1b[31mred\u202e_100%|[bold]"]]
    assert "·[31mred·_100%|[bold]" in render(["a"], hostile, "table")
    assert render(["a"], hostile, "markdown").splitlines()[-1] == r"| ·[31mred·_100%\|[bold] |"
    assert r"·[31mred·\_100\%|[bold] \\" in render(["a"], hostile, "latex")
    assert render(head, rows, "latex").startswith(r"\begin{tabular}{lrrrrrrrrr}")
