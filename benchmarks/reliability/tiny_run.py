"""A run whose steps take tenths of a second: its model, its data, its run file, and the command that launches it.

The verifier is a function of benchmarks/reliability/verifiers.py, so that every answer goes to a worker process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aer_megatron.data import countdown
from aer_megatron.options.data import DataSection
from tests.support.double_runs import double_python
from tests.support.real_router import free_port
from tests.support.real_servers import LAUNCH, SERVER_ENVIRONMENT, inline_table
from tests.support.runs import ROOT, random_base

NUM_PROBLEMS = 20_000
PROMPTS, GROUP_SIZE = 8, 4  # of a step
SERVER_PYTHON = ".venv-sglang/bin/python"
_RUN_FILE = """\
[run]
name = "{name}"
output_dir = "{folder}/run"
[model]
path = "{folder}/base"
dtype = "fp32"
[parallel]
micro_batch_size = 64
[data]
template = "plain"
max_prompt_tokens = 14
{verifier}
[data.train]
path = "{folder}/problems.jsonl"
[rollout]
prompts_per_step = {prompts}
group_size = {group_size}
max_new_tokens = 6
[optimizer]
lr = 1e-4
[algo]
num_minibatches = 2
[algo.entropy]
update = "pi"
k_p = 2.0
tau = 1.0
alpha_max = 0.5
normalize = "mean"
difficulty = "complement"
[report]
sinks = ["tensorboard"]
picture = false
"""
# for real_server_options (which adds what every CPU server needs), and for a run file
SERVER_LAUNCH: dict[str, Any] = {
    "mem_fraction_static": 0.3,
    "max_total_tokens": 8192,
    "max_running_requests": 32,
    "sleep_on_idle": True,
}
SERVER_SECTIONS = (
    f"[sglang]\nlaunch = {inline_table({**LAUNCH, **SERVER_LAUNCH})}\n"
    f"environment = {inline_table(dict(SERVER_ENVIRONMENT))}\n"
)


def write_run(folder: Path, *, name: str, verifier: str, problems: int = NUM_PROBLEMS, more: str = "") -> Path:
    """Returns the run file in ``folder``, with base model and problems beside it; what is there is kept.

    ``verifier`` is a function of benchmarks.reliability.verifiers; ``more`` are further TOML sections.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    if not path.exists():
        random_base(folder / "base")
        items = countdown.generate(size=problems, seed=0, options={"split": "train"})
        records = [{"problem": problem, "answer": answer} for problem, answer in zip(*items.texts(), strict=True)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        function = f"benchmarks.reliability.verifiers:{verifier}"
        named = f'verifier = "{function}"'
        if "verifiers" in DataSection.model_fields:
            named += f'\nverifiers = ["{function}"]'
        text = _RUN_FILE.format(folder=folder, name=name, verifier=named, prompts=PROMPTS, group_size=GROUP_SIZE)
        path.write_text(text + more, "utf-8")  # last: a folder with it is whole
    return path


def launch_command(run_file: Path, options: Mapping[str, Any], *, ranks: int) -> list[str]:
    """Returns the command line of a launcher with ``ranks`` training processes; ``options`` by dotted name."""
    arguments = [str(run_file), *(f"--{name}={_word(value)}" for name, value in options.items())]
    if importlib.util.find_spec("aer_megatron.launch.command") is not None:
        return [sys.executable, "-m", "aer_megatron.cli", "launch", "--nproc", str(ranks), *arguments]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0"]
    port = str(free_port("127.0.0.1"))
    return [
        *agent, "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", port,
        "-m", "aer_megatron.train", *arguments,
    ]  # fmt: skip


def servers_python(kind: str, folder: Path) -> str:
    """Returns the interpreter that runs ``kind`` ("real" or "double") servers of a run in ``folder``.

    Raises:
        SystemExit: the environment of real servers is not installed.
    """
    if kind == "double":
        return str(double_python(folder, "--token-s", "0.005"))
    path = ROOT / SERVER_PYTHON
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run tools/install_sglang_cpu.sh first")
    return str(path)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
