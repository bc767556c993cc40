"""What counts as the same run: lines, tables, files; which layouts are tried; what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.verify_resume.command import COMMAND, _request
from aer_megatron.verify_resume.comparison import Row, compare_files, compare_lines, compare_tables, table_text
from aer_megatron.verify_resume.short_run import ShortRunRequest, shorten
from tests.support.runs import MODEL, write_run_file

LINE = {"step": 2, "train/grad_norm": 0.5, "aer/held": False, "aer/reason": "alpha 0.1", "time/step_s": 3.0}


@pytest.mark.parametrize(
    ("changes", "bound", "expected"),
    [
        ({}, 0.0, 0.0),
        ({"time/step_s": 4.0}, 0.0, 0.0),  # of the machine, not of the run
        ({"train/grad_norm": 0.5000001}, 0.0, 1e-7),
        ({"train/grad_norm": 0.5001}, 1e-5, 1e-4),
        ({"train/grad_norm": None}, 1e-5, math.inf),
        ({"aer/held": True}, 1e-5, math.inf),
        ({"aer/reason": "alpha 0.10001"}, 1e-5, 0.0),  # a text spells numbers
        ({"aer/reason": "alpha 0.10001"}, 0.0, math.inf),
        ({"step": 3}, 1e-5, math.inf),
    ],
)
def test_lines_are_compared_by_value(changes: dict[str, Any], bound: float, expected: float) -> None:
    found, where = compare_lines([LINE], [LINE | changes], bound=bound)
    assert found == pytest.approx(expected, rel=1e-3)
    assert bool(where) == bool(expected)


def test_missing_and_additional_metrics_and_steps_are_differences() -> None:
    assert compare_lines([LINE], [{**LINE, "train/lr": 1.0}], bound=1e-5)[0] == math.inf
    assert compare_lines([LINE, LINE], [LINE], bound=1e-5)[0] == math.inf
    assert compare_lines([], [], bound=1e-5)[0] == math.inf


def test_tables_are_compared_to_their_depth() -> None:
    one = {"cursor": {"epoch": 1, "place": 10**8}, "controller": {"alpha": 0.1}, "pending": [{"step": 3}]}
    assert compare_tables(one, one) == (0.0, "")
    near = {**one, "controller": {"alpha": 0.100001}}
    assert compare_tables(one, near)[0] == pytest.approx(1e-6, rel=1e-3)
    found, where = compare_tables(one, {**one, "cursor": {"epoch": 1, "place": 10**8 + 1}})
    assert (found, where) == (math.inf, "cursor.place is 100000000 and 100000001")
    assert compare_tables(one, {**one, "pending": []})[0] == math.inf
    assert compare_tables({"a": True}, {"a": 1})[0] == math.inf
    assert compare_tables({"a": 1.0}, {"a": None})[0] == math.inf


def test_files_are_compared_by_digest() -> None:
    assert compare_files({"a": "1"}, {"a": "1"}) == (0.0, "")
    assert compare_files({"a": "1"}, {"a": "2"})[1] == "a differs"
    assert compare_files({"a": "1"}, {"a": "1", "b": "2"})[1] == "b is in one of the two alone"
    assert compare_files({}, {})[0] == math.inf


def test_the_table_says_what_fails_and_why() -> None:
    text = table_text([Row("one", 0.0, 0.0), Row("two", 0.5, 0.1, "x is 1 and 2"), Row("three", math.nan, 0.1)])
    lines = text.splitlines()
    assert lines[2].endswith("OK")
    assert lines[3].endswith("FAILED")
    assert lines[4].strip() == "x is 1 and 2"
    assert lines[5].endswith("FAILED")  # not a number is within no bound


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "base")
    return write_run_file(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "nproc", "num_ranks", "layouts"),
    [
        ((), None, 1, []),
        (("--parallel.tp=2",), None, 2, ["pp 2", "dp 2"]),
        ((), 2, 2, ["pp 2", "tp 2"]),
        (("--parallel.pp=2",), 4, 4, ["tp 4", "dp 4"]),  # two layers: no pipeline of four
    ],
)
def test_other_layouts_fit_ranks_and_model(
    overrides: tuple[str, ...], nproc: int | None, num_ranks: int, layouts: list[str], run_file: Path
) -> None:
    short = shorten(ShortRunRequest(str(run_file), overrides, nproc))
    assert short.num_ranks == num_ranks
    assert list(short.layouts) == layouts


def test_the_run_is_shortened_and_has_a_gradient(run_file: Path) -> None:
    short = shorten(ShortRunRequest(str(run_file), ("--run.num_steps=900", "--rollout.prompts_per_step=64"), steps=3))
    config = short.config
    assert (config.run.num_steps, config.run.checkpoint_every, config.eval.sets) == (6, 3, {})
    assert config.rollout.prompts_per_step * config.rollout.group_size <= 32
    assert config.algo.entropy.tau > 1


def test_servers_give_way_to_the_embedded_engine_unless_kept(run_file: Path) -> None:
    servers = (
        "--rollout.engine=sglang", '--sglang.urls=["http://h:1"]', "--rollout.staleness=2",
    )  # fmt: skip
    short = shorten(ShortRunRequest(str(run_file), servers))
    assert (short.config.rollout.engine, short.config.rollout.staleness) == ("embedded", 0)
    kept = shorten(ShortRunRequest(str(run_file), servers, keep_engine=True)).config
    assert (kept.rollout.engine, kept.rollout.staleness) == ("sglang", 2)


def test_a_layout_that_does_not_fit_is_named(run_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--to tp=3: .*must divide the number of ranks 2"):
        shorten(ShortRunRequest(str(run_file), nproc=2, to=({"tp": "3"},)))


@pytest.mark.parametrize(
    "arguments",
    [[], ["a.toml", "b.toml"], ["a.toml", "--nproc"], ["a.toml", "--nproc=0"], ["a.toml", "--steps=x"],
     ["a.toml", "--to=dp=2"], ["a.toml", "--to=tp"], ["a.toml", "--to=tp=-1"], ["a.toml", "--to", "tp=2;rm"]],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--|run file"):
        COMMAND.parse(arguments)


def test_arguments_are_understood() -> None:
    words = "a.toml --to tp=1,pp=2 --to=tp=2 --nproc=2 --run.seed=1 --steps 3"
    found = _request(COMMAND.parse(words.split()))
    assert found == ShortRunRequest("a.toml", ("--run.seed=1",), 2, ({"tp": "1", "pp": "2"}, {"tp": "2"}), 3)
