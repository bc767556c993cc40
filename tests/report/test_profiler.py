"""The profile of some steps: what is in it, when it ends, and that it never costs the run."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.config import Config
from aer_megatron.report.profiler import StepProfiler
from tests.support.policies import policy_config


def work(profiler: StepProfiler, steps: range) -> None:
    """Does what a run does: every step multiplies matrices in the phase train."""
    for step in steps:
        profiler.enter_phase("train", step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.enter_phase("between phases", step)


def names_of(trace: Path) -> list[str]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [str(event.get("name")) for event in events]


def test_the_trace_has_the_steps_asked_for_and_no_other(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, (2, 3), rank=1) as profiler:
        work(profiler, range(6))
        written = sorted(path.name for path in (tmp_path / "profile").iterdir())
        assert written == ["steps_2-3.rank1.json.gz", "steps_2-3.rank1.txt"]  # while the run goes on
    names = names_of(tmp_path / "profile" / written[0])
    assert {name for name in names if name.startswith("step ")} == {
        f"step {step}: {phase}" for step in (2, 3) for phase in ("train", "between phases")
    }
    assert names.count("aten::matmul") == 2
    table = (tmp_path / "profile" / written[1]).read_text().splitlines()
    rows = [line.split()[0] for line in table if "%" in line and "Self CPU %" not in line]
    assert "aten::mm" in rows and len(rows) <= 10
    assert not any("step 2" in line for line in table)


def test_a_run_that_ends_in_the_last_step_writes_it_and_a_resumed_one_begins_within(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, (2, 9), rank=0) as profiler:
        work(profiler, range(4, 6))
    names = names_of(tmp_path / "profile" / "steps_2-9.rank0.json.gz")
    assert "step 4: train" in names and "step 5: train" in names


@pytest.mark.parametrize("steps", [(), (7, 8)])
def test_other_steps_leave_nothing(tmp_path: Path, steps: tuple[int, ...]) -> None:
    with StepProfiler(tmp_path, steps, rank=0) as profiler:
        work(profiler, range(4))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_run_is_not_delayed_by_a_profile(tmp_path: Path) -> None:
    with pytest.raises(KeyError), StepProfiler(tmp_path, (0, 1), rank=0) as profiler:
        work(profiler, range(1))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_costs_the_profile_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("no folder")
    with caplog.at_level(logging.WARNING), StepProfiler(tmp_path, (0, 0), rank=0) as profiler:
        work(profiler, range(3))
    assert "the profile could not be written" in caplog.text


def config(steps: list[int]) -> Config:
    return policy_config(run={"profile_steps": steps})


@pytest.mark.parametrize("steps", [[5], [7, 5], [1, 2, 3]])
def test_a_range_has_a_first_and_a_last_step(steps: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"run\.profile_steps=\[.*\] must be a first and a last step, such as \[5, 7\]"
    ):
        config(steps)
    assert config([5, 5]).run.profile_steps == (5, 5)
