"""The hang watchdog of the training command: a start that takes longer than the limit ends with a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import MODEL, train, write_run_file


@pytest.mark.integration
def test_the_training_command_is_watched(tmp_path: Path) -> None:
    """Half a second is not enough to import Megatron-Core, so the run stops before it looks for weights."""
    done = train(write_run_file(tmp_path), f"--model.path={MODEL}", "--run.hang_timeout_s=0.5")
    assert done.returncode == 124, done.stderr
    for part in ("[rank 0] hang watchdog: phase start", "run.hang_timeout_s=0.5", "there is none yet", "train.py"):
        assert part in done.stderr
