"""A miniature run of the real command line: the quick start's model folder with random weights, seconds long."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from aer_megatron.report.metrics import MACHINE_PREFIXES

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "quickstart" / "model"

RUN_FILE = """
[run]
name = "mini"
output_dir = "{folder}/out"
num_steps = 6
checkpoint_every = 2

[model]
path = "{base}"
dtype = "fp32"

[parallel]
micro_batch_size = 16

[data]
template = "plain"
max_prompt_tokens = 12
[data.train]
task = "countdown"
size = 50
options = {{ split = "train" }}

[rollout]
prompts_per_step = 8
group_size = 4
max_new_tokens = 10
logprob_gate = 1e-3

[optimizer]
lr = 1e-3

[algo]
num_minibatches = 2
[algo.entropy]
update = "pi"
k_p = 0.3
tau = 1.1
normalize = "mean"
difficulty = "complement"

[eval.sets.countdown]
source = {{ task = "countdown", size = 8, options = {{ split = "eval" }} }}
num_samples = 4
k = [1, 4]
every = 3

[sft]
init = "{model}"
num_steps = 20
batch_size = 32
[sft.source]
task = "countdown"
size = 100
options = {{ split = "train" }}

[report]
picture = false
"""


def write_run_file(folder: Path, *, base: Path | None = None) -> Path:
    """Returns the path of a run file whose outputs lie under ``folder``; its model is ``base``, or ``folder``/base."""
    path = folder / "run.toml"
    path.write_text(RUN_FILE.format(folder=folder, base=base or folder / "base", model=MODEL), encoding="utf-8")
    return path


def random_base(folder: Path) -> Path:
    """Returns a new folder with the quick start's model and random weights, the same ones every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds: conftest.py imports this file

    shutil.copytree(MODEL, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).float().save_pretrained(folder)
    return folder


def train_command(run_file: Path, *arguments: str, ranks: int = 1) -> list[str]:
    """Returns the command line of a training run; one rank needs no launcher."""
    command = ["aer_megatron.train"] if ranks == 1 else ["aer_megatron.cli", "launch", "--nproc", str(ranks)]
    return [sys.executable, "-m", *command, str(run_file), *arguments]


def environment() -> dict[str, str]:
    """Returns the environment of a training process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def train(run_file: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Returns the finished process, whatever its exit code."""
    return run_command(train_command(run_file, *arguments, ranks=ranks))


def run_command(command: list[str], *, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Returns the finished process of a command in the project's folder, with its output."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment(), cwd=ROOT, check=False
    )


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without what depends on the machine."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MACHINE_PREFIXES)} for line in lines]
