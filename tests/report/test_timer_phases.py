"""The phase timer tells the watchdog where the run is."""

from __future__ import annotations

import pytest

from aer_megatron.report.timer import PhaseTimer


def test_phases_and_steps_are_announced() -> None:
    seen: list[tuple[str, int | None]] = []
    timer = PhaseTimer(on_phase=lambda phase, step: seen.append((phase, step)), first_step=5)
    with timer.phase("rollout"):
        pass
    timer.take()
    with pytest.raises(KeyError), timer.phase("train"):
        raise KeyError
    assert seen == [("rollout", 5), ("between phases", 5), ("train", 6), ("between phases", 6)]
