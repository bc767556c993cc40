"""AER steps of the command line with real SGLang servers on the CPU: marker ``sglang``, run by make test-sglang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aer_megatron.convert.architecture import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.sglang_weights import ServedChecksums, first_difference
from aer_megatron.rollout.fleet import FleetOptions, ServerFleet
from aer_megatron.rollout.server import LaunchOptions, ServerGroup, command_line
from tests.support.runs import ROOT, environment, metric_lines, train, train_command, write_run_file

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

NUM_STEPS = 5
SERVER_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
LAUNCH = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 4096,
    "max_running_requests": 32,
}
SERVER_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def inline_table(table: dict[str, object]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and a supervised base model."""
    folder = tmp_path_factory.mktemp("sglang")
    run_file = write_run_file(folder)
    made = train(run_file, "--stage=sft")
    assert made.returncode == 0, made.stderr
    return folder


def sglang_arguments(folder: Path, output: str) -> list[str]:
    return [
        f"--run.output_dir={folder / output}",
        f"--run.num_steps={NUM_STEPS}",
        "--rollout.engine=sglang",
        f"--sglang.python={SERVER_PYTHON}",
        f"--sglang.launch={inline_table(LAUNCH)}",
        f"--sglang.environment={inline_table(SERVER_ENVIRONMENT)}",
    ]


def servers_of(output: Path) -> list[int]:
    """Returns the processes whose standard output is one of the run's server logs: all that its servers started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                target = os.readlink(entry / "fd" / "1")
            except OSError:
                continue
            if target.startswith(str(output)):
                found.append(int(entry.name))
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def check_metrics(output: Path) -> None:
    lines = metric_lines(output)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:  # step 0 and after every update
        assert line["rollout/logprob_diff_max"] < 1e-3
        assert line["rollout/prompt_tokens"] > 0


def test_launched_servers_train_a_tensor_parallel_policy_and_leave_nothing(base: Path) -> None:
    output = base / "launched"
    options = [*sglang_arguments(base, "launched"), "--sglang.num_servers=2", "--parallel.tp=2"]
    run(train_command(base / "run.toml", *options, ranks=2))
    check_metrics(output)
    assert servers_of(output) == []
    assert not (output / "weights").exists()
    assert sorted(path.name for path in (output / "sglang").iterdir()) == ["server-0.log", "server-1.log"]
    for log in (output / "sglang").iterdir():  # both generated
        assert "POST /generate HTTP/1.1\" 200" in log.read_text()


def test_served_weights_are_the_final_checkpoint_bit_for_bit(base: Path) -> None:
    """Servers that outlive two runs; each one's last checkpoint, converted by the tool, has the served checksums."""
    model = base / "base"
    options = LaunchOptions(
        python=str(SERVER_PYTHON),
        model_path=str(model),
        host="127.0.0.1",
        arguments={"dtype": "float32", **LAUNCH},
        environment={**os.environ, **SERVER_ENVIRONMENT},
        log_folder=base / "logs",
        start_timeout_s=900.0,
        max_restarts=0,
        api_key=None,
    )
    with ServerGroup(2, options, command=command_line) as group:
        urls = group.start()
        for transport in ("disk", "distributed"):
            arguments = [*sglang_arguments(base, transport), f"--sglang.urls={json.dumps(urls)}"]
            run(train_command(base / "run.toml", *arguments, f"--sglang.transport={transport}"))
            check_metrics(base / transport)
            check_served(urls, base / transport, model)


def check_served(urls: list[str], output: Path, model: Path) -> None:
    limits = FleetOptions(max_concurrency=1, connect_timeout_s=5.0, control_timeout_s=60.0, api_key=None)
    with ServerFleet(urls, limits) as fleet:
        reported = [fleet.control(i, "/weights_checker", {"action": "checksum"}).json()["ranks"] for i in (0, 1)]
        versions = [fleet.control(i, "/model_info").json()["weight_version"] for i in (0, 1)]
    assert versions == [str(NUM_STEPS)] * 2
    checkpoint = max((output / "checkpoints").glob("step_*"))
    tool, target = str(ROOT / "tools" / "convert_megatron_to_hf.py"), output / "final"
    run([sys.executable, tool, str(checkpoint), str(target), "--hf", str(model)])
    final, start = HFFolder(target), HFFolder(model)
    expected = ServedChecksums(architecture_from_hf_config(final.config), tp_size=1)
    for name in final.names():
        expected.add(name, final.get(name))
    assert [first_difference(expected.result(), ranks) for ranks in reported] == ["", ""]
    assert any(not final.get(name).equal(start.get(name)) for name in final.names())  # it did train


def test_a_server_killed_in_mid_run_costs_no_sample(base: Path) -> None:
    output = base / "killed"
    process = subprocess.Popen(
        train_command(base / "run.toml", *sglang_arguments(base, "killed"), "--sglang.num_servers=2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    log = output / "sglang" / "server-0.log"
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        # a /generate before the first transfer is the server's own warm-up
        if log.exists() and "/generate" in log.read_text().partition("/update_weight_version")[2]:
            for victim in processes_writing(log):
                os.kill(victim, signal.SIGKILL)
            break
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    assert "server 0" in stderr and "out of service" in stderr
    check_metrics(output)
    for line in metric_lines(output):  # every sample is judged, and once
        assert sum(count for name, count in line.items() if name.startswith("rewards/reason/")) == 8 * 4
    assert servers_of(output) == []


def processes_writing(log: Path) -> list[int]:
    return [process for process in servers_of(log) if os.readlink(f"/proc/{process}/fd/1") == str(log)]
