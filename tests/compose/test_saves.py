"""A checkpoint that cannot be written is said and tried again; the last one must be there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.checkpoint.store import SaveError
from aer_megatron.compose.saves import RunSaves, best_step, check_best
from aer_megatron.config import Config
from aer_megatron.loop.parts import Progress
from tests.support.policies import policy_config


class Store:
    """Fails at the steps in ``refused`` when a save begins, at those in ``broken`` while it is written."""

    def __init__(self, refused: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.refused, self.broken = refused, broken
        self.written: list[int] = []
        self.begun: int | None = None
        self.given_up: list[float] = []

    def begin(self, actor: Any, *, step: int, state: Any, files: Any, beside: bool) -> None:
        assert self.begun is None, "only one save is in flight"
        if step in self.refused:
            raise SaveError("no room")
        self.begun = step

    def wait(self) -> None:
        step, self.begun = self.begun, None
        if step in self.broken:
            raise SaveError("the disk is full")
        if step is not None:
            self.written.append(step)

    def give_up(self, timeout_s: float) -> None:
        self.given_up.append(timeout_s)

    def newest(self) -> str:
        return f"step_{self.written[-1]:08d}" if self.written else "none"


def saves(store: Store, *, beside: bool = True) -> RunSaves:
    anything: Any = store
    return RunSaves(anything, anything, lambda progress: {}, dict, beside=beside, speaks=True)


def progress(step: int) -> Progress:
    anything: Any = None
    return Progress(step, step, anything, {})


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("how", ["refused", "broken"])
def test_a_failed_save_is_said_and_the_run_goes_on(how: str, beside: bool, caplog: pytest.LogCaptureFixture) -> None:
    failing: dict[str, Any] = {how: (2,)}
    store = Store(**failing)
    run = saves(store, beside=beside)
    for step in (1, 2, 3):
        run.save(progress(step))
    run.finish()
    assert store.written == [1, 3] and run.num_failed == 1
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "STEP 2 NOT WRITTEN" in errors[0] and "the newest is step_00000001" in errors[0]


@pytest.mark.parametrize("how", ["refused", "broken"])
def test_without_the_last_checkpoint_the_run_ends_in_an_error(how: str) -> None:
    failing: dict[str, Any] = {how: (2,)}
    run = saves(Store(**failing))
    run.save(progress(1))
    run.save(progress(2))
    with pytest.raises(RuntimeError, match=r"step 2, the last .* is not written: .*newest is step_00000001"):
        run.finish()


def test_an_asynchronous_save_is_under_way_until_the_next_or_the_end() -> None:
    store = Store()
    run = saves(store)
    run.save(progress(1))
    assert store.written == []
    run.save(progress(2))
    assert store.written == [1]
    run.finish()
    assert store.written == [1, 2]


def test_a_run_that_ends_in_an_error_gives_the_save_a_bounded_time() -> None:
    store = Store()
    with pytest.raises(KeyError), saves(store) as run:
        run.save(progress(1))
        raise KeyError
    assert store.given_up == [60.0]


def test_the_best_step_is_that_of_the_highest_score_and_of_equals_the_latest(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    scores = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.5, 8: None}
    lines = [{"step": step, **({"eval/a/pass@1": scores[step]} if step in scores else {})} for step in range(10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    choose = best_step(file, "eval/a/pass@1")
    assert choose([2, 4, 6, 8, 9]) == 6
    assert choose([2]) == 2
    assert choose([3, 8]) is None
    file.write_text(json.dumps({"step": 2, "eval/a/pass@1": 1.0}) + "\n")  # it is read anew: a run goes on
    assert choose([2, 6]) == 2


def with_set(keep_best: str, **options: Any) -> Config:
    sets = {"a": {"source": {"task": "countdown"}, "num_samples": 16, "k": [1, 4], **options}}
    return policy_config(run={"keep_best": keep_best, "checkpoint_every": 50}, eval={"sets": sets})


def test_what_is_kept_must_be_a_score_of_a_set() -> None:
    for name in ("eval/a/pass@1", "eval/a/maj@4", "eval/a/avg@16", ""):
        check_best(with_set(name))
    for name in ("eval/a/pass@2", "eval/b/pass@1", "eval/a/truncated", "reward/mean"):
        with pytest.raises(ValueError, match=f"'{name}' is no score of an evaluation set; use one of eval/a/pass@1, "):
            check_best(with_set(name))
    with pytest.raises(ValueError, match=r"is no score of an evaluation set; add a set to \[eval.sets\]"):
        check_best(with_set("eval/a/pass@1", every=0))


def test_the_best_is_chosen_among_several() -> None:
    with pytest.raises(ValueError, match=r"run\.checkpoint_every=0 writes the last one alone; set it"):
        policy_config(run={"keep_best": "eval/a/pass@1"})
