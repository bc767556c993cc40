"""Runs of the quick start with other settings, for the benchmarks that compare them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from aer_megatron.types import Float64Array

RUN_FILE = "examples/quickstart/countdown.toml"
WINDOW = 10  # steps of a moving mean
_FIXED = ("--parallel.tp=1", "--report.sinks=[]", "--run.checkpoint_every=0")


def finish_run(name: str, folder: Path, *, seed: int, num_steps: int, overrides: tuple[str, ...]) -> None:
    """Returns when the run ``folder / name`` is finished; a finished one is left as it is."""
    records = folder / name / "metrics.jsonl"
    if records.is_file() and len(records.read_text(encoding="utf-8").splitlines()) == num_steps + 1:
        return
    own = (
        f"--run.name={name}",
        f"--run.output_dir={folder / name}",
        f"--run.seed={seed}",
        f"--run.num_steps={num_steps}",
        "--eval.sets.countdown.source.size=200",
        "--eval.sets.countdown.num_prompts=200",
        f"--eval.sets.countdown.every={num_steps}",
        "--eval.sets.countdown_cold.every=0",
    )
    command = [sys.executable, "-m", "aer_megatron.train", RUN_FILE, *_FIXED, *own, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)


def moving_mean(values: Float64Array) -> Float64Array:
    """Returns the mean of every WINDOW consecutive values."""
    result: Float64Array = np.convolve(values, np.full(WINDOW, 1.0 / WINDOW), "valid")
    return result
