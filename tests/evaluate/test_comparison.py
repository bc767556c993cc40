"""aer compare: differences by hand, p-values by enumeration, what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from aer_megatron.evaluate.compare_command import main
from aer_megatron.evaluate.comparison import compare, sign_flip_p_value
from tests.support.evaluations import result, written

FILES = Path("a.json"), Path("b.json")


def test_differences_by_hand():
    differences, changes = compare(result([0, 4, 8, 2]), result([4, 4, 8, 6]), FILES)
    first = differences[0]
    assert (first.name, first.temperature, first.measure) == ("gsm8k", 0.6, "pass@1")
    np.testing.assert_allclose((first.first, first.second, first.value), (14 / 32, 22 / 32, 0.25))
    # differences 1/2, 0, 0, 1/2: standard deviation sqrt(1/12), Student's t with 3 degrees of freedom
    half = 3.182446 * (1 / 12 / 4) ** 0.5
    np.testing.assert_allclose((first.low, first.high), (0.25 - half, 0.25 + half), rtol=1e-6)
    assert first.p_value == 0.5  # of the 4 choices of signs, 2 are as far from 0
    assert [each.measure for each in differences] == ["pass@1", "pass@4", "maj@4"]
    assert [(each.first.id[-1], each.gained) for each in changes] == [("0", True), ("3", True)]


def test_a_result_against_itself_has_no_difference():
    differences, changes = compare(result([1, 5]), result([1, 5]), FILES)
    assert {(each.value, each.low, each.high, each.p_value) for each in differences} == {(0.0, 0.0, 0.0, 1.0)}
    assert not changes


def test_p_value_equals_enumeration_and_is_seeded_beyond():
    random = np.random.default_rng(0)
    difference_P = np.round(random.normal(0.3, 1, 9), 2)
    sums = [abs(np.dot(signs, difference_P)) for signs in product((-1, 1), repeat=9)]
    expected = np.mean([total >= abs(difference_P.sum()) - 1e-12 for total in sums])
    assert sign_flip_p_value(np.concatenate([difference_P, np.zeros(30)])) == expected
    many_P = random.normal(0.25, 1, 40)
    p_value = sign_flip_p_value(many_P)
    assert p_value == sign_flip_p_value(many_P)
    # near that of the t test, two-sided
    t = many_P.mean() / (many_P.std(ddof=1) / 40**0.5)
    draws = np.abs(np.random.default_rng(1).standard_t(39, 200_000))
    assert abs(p_value - (draws >= abs(t)).mean()) < 0.01


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (result([1, 5], name="aime24"), "differ in the sets: ['gsm8k'] and ['aime24']"),
        (result([1, 5], grader="math_verify"), "differ in the graders of gsm8k"),
        (result([1, 5], first=1), "hold different problems of gsm8k: 2 and 2, of which 1 and 1 are not in the other"),
        (result([1, 5, 3]), "2 and 3, of which 0 and 1"),
    ],
)
def test_what_is_not_of_the_same_is_refused(second, words):
    with pytest.raises(ValueError) as caught:
        compare(result([1, 5]), second, FILES)
    assert words in str(caught.value)


def test_the_command_prints_a_table_and_the_problems(tmp_path, capsys):
    files = [str(written(tmp_path / name, result(counts))) for name, counts in (("a.json", [0, 8]), ("b.json", [8, 8]))]
    assert main([*files, "--format=markdown"]) == 0
    text = capsys.readouterr().out
    assert "| gsm8k | 0.6 | pass@1 | 0.500 | 1.000 | +0.500 |" in text
    assert "1 problems gained and 0 lost" in text
    assert "| gsm8k | 0.6 | 0000000000000000 | 0/8 | 8/8 | problem 0 |" in text
    assert main([*files, "--problems=0"]) == 0
    assert "problem 0" not in capsys.readouterr().out


def test_the_command_says_what_is_wrong_with_a_file(tmp_path, capsys):
    good = str(written(tmp_path / "a.json", result([1])))
    (tmp_path / "b.json").write_text("{}")
    assert main([good, str(tmp_path / "b.json")]) == 2
    assert "b.json is no result of aer evaluate" in capsys.readouterr().err
