"""Real SGLang servers on the CPU: how they are launched, what they serve, and which processes are theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.served_weights import ServedChecksums, first_difference
from aer_megatron.sglang.server import LaunchOptions
from tests.support.runs import ROOT, environment

SERVER_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
LAUNCH: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.5,  # of the memory that is free at the start; other processes take of it too
    "max_total_tokens": 32768,
    "max_running_requests": 64,
}
SERVER_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def inline_table(table: dict[str, object]) -> str:
    """Returns a TOML inline table, for an override on the command line."""
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def launch_arguments() -> list[str]:
    """Returns the overrides with which a run launches real servers."""
    return [
        "--rollout.engine=sglang",
        f"--sglang.python={SERVER_PYTHON}",
        f"--sglang.launch={inline_table(LAUNCH)}",
        f"--sglang.environment={inline_table(dict(SERVER_ENVIRONMENT))}",
    ]


def real_server_options(model: Path, logs: Path, **more: Any) -> LaunchOptions:
    """Returns how to launch fp32 servers of a model folder; ``more`` are further server arguments."""
    return LaunchOptions(
        python=str(SERVER_PYTHON),
        model_path=str(model.absolute()),
        host="127.0.0.1",
        arguments={"dtype": "float32", **LAUNCH, **more},
        environment={**os.environ, **SERVER_ENVIRONMENT},
        log_folder=logs,
        start_timeout_s=900.0,
        max_restarts=0,
        api_key=None,
        reached_at="",
    )


def served(urls: list[str]) -> tuple[list[Any], list[str]]:
    """Returns (ranks of /weights_checker, weight version) of every server."""
    limits = ClientOptions(max_concurrency=1, connect_timeout_s=5.0, control_timeout_s=60.0, api_key=None)
    with ServerFleet(urls, limits) as fleet:
        places = range(len(urls))
        ranks = [fleet.control(i, "/weights_checker", {"action": "checksum"}).json()["ranks"] for i in places]
        return ranks, [fleet.control(i, "/model_info").json()["weight_version"] for i in places]


def export_last_checkpoint(output: Path, model: Path, target: Path) -> HFFolder:
    """Returns a run's last checkpoint as Hugging Face folder, made by the command-line tool."""
    checkpoint = max((output / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    command = [
        sys.executable,
        "-m",
        "aer_megatron.cli",
        "convert",
        "megatron-to-hf",
        str(checkpoint),
        str(target),
        "--hf",
        str(model),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return HFFolder(target)


def served_difference(exported: HFFolder, ranks: Any, *, tp_size: int = 1) -> str:
    """Returns the first parameter that a server does not hold bit for bit as ``exported`` has it; "" if none."""
    expected = ServedChecksums(architecture_from_hf_config(exported.config), tp_size=tp_size)
    for name in exported.names():
        expected.add(name, exported.get(name))
    return first_difference(expected.result(), ranks)


def processes_writing(folder: Path) -> list[int]:
    """Returns the processes whose standard output is a file under ``folder``: all that its servers started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                target = os.readlink(entry / "fd" / "1")
            except OSError:
                continue
            if target == str(folder) or target.startswith(f"{folder}/"):
                found.append(int(entry.name))
    return found
