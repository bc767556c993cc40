from __future__ import annotations

import time
from collections import Counter
from itertools import combinations_with_replacement, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.data import countdown
from aer_megatron.data.sources import load_records
from aer_megatron.options.data import SourceSection
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.types import Prompt, Verdict

TRAIN = {"split": "train"}
EVAL = {"split": "eval"}


def solutions_by_brute_force(problem: str) -> set[str]:
    numbers, target = problem.rstrip(">").split("=")
    found = set()
    for order in permutations(numbers.split(",")):
        for operators in product("+-*", repeat=3):
            text = "".join(a + b for a, b in zip(order, (*operators, ""), strict=True))
            if eval(text) == int(target):  # of texts made right here
                found.add(text)
    return found


def test_texts_and_ranges() -> None:
    items = countdown.generate(size=2000, seed=0, options=TRAIN)
    problems, answers = items.texts()
    assert len(items) == len(set(problems)) == 2000
    assert items.number_N4.min() >= 1 and items.number_N4.max() <= 9
    assert items.target_N.min() >= 0 and items.target_N.max() <= 99
    a, b, c, d = items.number_N4[0]
    assert problems[0] == f"{a},{b},{c},{d}={items.target_N[0]}>"
    assert answers[0] == str(items.target_N[0])


@pytest.mark.parametrize("options", [TRAIN, EVAL])
def test_every_problem_is_solvable(options: dict[str, str]) -> None:
    problems, _ = countdown.generate(size=60, seed=5, options=options).texts()
    assert all(solutions_by_brute_force(problem) for problem in problems)


def test_seeds() -> None:
    same = [countdown.generate(size=100, seed=seed, options=TRAIN).texts() for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def pairs_of_split(split: str) -> tuple[int, set[tuple[tuple[int, ...], int]]]:
    """(number of problems, their different (sorted numbers, target) pairs) of a whole split."""
    with pytest.raises(ValueError, match=r"size=1000000 is more than the \d+ problems") as caught:
        countdown.generate(size=1_000_000, seed=0, options={"split": split})
    size = int(str(caught.value).split("than the ")[1].split()[0])
    items = countdown.generate(size=size, seed=0, options={"split": split})
    numbers = [tuple(sorted(row)) for row in items.number_N4.tolist()]
    return size, set(zip(numbers, items.target_N.tolist(), strict=True))


def test_splits_are_disjoint_in_any_order_and_hold_every_solvable_problem() -> None:
    num_solvable, solvable = 0, set()
    expressions = ["{}" + a + "{}" + b + "{}" + c + "{}" for a, b, c in product("+-*", repeat=3)]
    for numbers in combinations_with_replacement(range(1, 10), 4):
        orders = set(permutations(numbers))
        values = {eval(text.format(*order)) for order in orders for text in expressions} & set(range(100))
        num_solvable += len(orders) * len(values)
        solvable |= {(numbers, value) for value in values}
    num_train, train = pairs_of_split("train")
    num_eval, held_out = pairs_of_split("eval")
    assert not train & held_out
    assert train | held_out == solvable
    assert num_train + num_eval == num_solvable
    assert 0.04 < num_eval / num_solvable < 0.09  # one pair in 16 is held out


def test_random_solutions_are_all_solutions_equally_often() -> None:
    items = countdown.generate(size=20_000, seed=1, options=TRAIN)
    problems, _ = items.texts()
    rng = np.random.default_rng(0)
    # equal numbers make several table columns spell one solution: they must not count double
    index = next(
        i for i, p in enumerate(problems) if len(set(p[:8:2])) == 2 and 3 <= len(solutions_by_brute_force(p)) <= 8
    )
    expected = solutions_by_brute_force(problems[index])
    draws = countdown.random_solutions(items, np.full(4000, index), rng)
    counts = Counter(bytes(row).decode() for row in draws.tolist())
    assert set(counts) == expected
    mean = 4000 / len(expected)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())


def test_random_solution_of_one_item_verifies() -> None:
    items = countdown.generate(size=50, seed=2, options=EVAL)
    problems, answers = items.texts()
    rng = np.random.default_rng(0)
    for index, problem in enumerate(problems):
        prompt = Prompt(1, problem, (1,), answers[index], "countdown")
        assert verify_countdown(countdown.random_solution(items, index, rng), prompt) == Verdict(1.0, "correct")


def test_fifty_thousand_records_load_fast() -> None:
    source = SourceSection(task="countdown", size=50_000, options=TRAIN)
    start = time.process_time()
    records, _ = load_records(source, on_bad_record="error", default_verifier="math", may_name=lambda name: False)
    assert time.process_time() - start < 4.0  # 0.6 s alone on one core; the margin is for a shared machine
    assert len({record.id for record in records}) == 50_000
    assert {record.verifier for record in records} == {"countdown"}


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "eval"]))
@settings(max_examples=15, deadline=None)
def test_sampled_solutions_verify(seed: int, split: str) -> None:
    items = countdown.generate(size=64, seed=seed, options={"split": split})
    problems, answers = items.texts()
    draws = countdown.random_solutions(items, np.arange(64), np.random.default_rng(seed))
    for problem, answer, row in zip(problems, answers, draws.tolist(), strict=True):
        prompt = Prompt(1, problem, (1,), answer, "countdown")
        assert verify_countdown(bytes(row).decode(), prompt).reason == "correct"
