"""Servers that a run launched: killed at random moments they cost no sample, and nothing of them outlives the run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.double_runs import double_python
from tests.support.real_servers import launch_arguments
from tests.support.runs import ROOT, environment, metric_lines, random_base, train_command, write_run_file
from tests.support.server_kills import KillPlan, run_with_kills
from tests.support.traces import Traces

REAL = [pytest.mark.sglang, pytest.mark.timeout(1800)]
NUM_SERVERS = 2
REQUESTS_PER_STEP = 8 * 4  # of the miniature run
LIMIT_S = 1500.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    random_base(made / "base")
    write_run_file(made)
    return made


def server_arguments(kind: str, folder: Path) -> list[str]:
    """Returns the overrides with which a run launches two servers."""
    common = [f"--sglang.num_servers={NUM_SERVERS}", '--report.sinks=["console"]', "--eval.sets={}"]
    if kind == "real":
        return [*launch_arguments(), *common]
    # the double's log-probabilities are made up
    double = double_python(folder, "--token-s", "0.01")
    return ["--rollout.engine=sglang", f"--sglang.python={double}", "--rollout.logprob_gate=0", *common]


# a real server takes the better part of a minute to start; benchmarks/bench_sglang_faults.py kills twenty
@pytest.mark.parametrize(("kind", "num_kills"), [("double", 20), pytest.param("real", 3, marks=REAL)])
def test_servers_killed_at_random_moments_cost_no_sample(
    kind: str, num_kills: int, folder: Path, tmp_path: Path
) -> None:
    output, num_steps = tmp_path / "out", 24
    options = [f"--run.num_steps={num_steps}", "--run.checkpoint_every=0", "--sglang.max_restarts=20"]
    command = train_command(
        folder / "run.toml", *server_arguments(kind, folder), *options, f"--run.output_dir={output}"
    )
    plan = KillPlan(NUM_SERVERS, num_kills, num_requests=num_steps * REQUESTS_PER_STEP, seed=7)
    with Traces(tmp_path / "tmp") as traces:
        killed = run_with_kills(command, output, plan, variables=traces.variables, limit_s=LIMIT_S)
    print(killed.summary())
    lines = metric_lines(output)
    assert [line["step"] for line in lines] == list(range(num_steps))
    for line in lines:  # every sample is judged, and once
        assert sum(count for name, count in line.items() if name.startswith("rewards/reason/")) == REQUESTS_PER_STEP
    assert killed.attempts == num_steps * REQUESTS_PER_STEP
    assert len(killed.kills) == num_kills
    assert traces.left() == {}  # nor after success


def interrupt_in_mid_run(process: subprocess.Popen[bytes], output: Path) -> None:
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    assert process.wait(120) != 0


def fails(process: subprocess.Popen[bytes], output: Path) -> None:
    assert process.wait(LIMIT_S) != 0


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("double", interrupt_in_mid_run),
        ("double", fails),
        pytest.param("real", interrupt_in_mid_run, marks=REAL),
    ],
)
def test_nothing_is_left_of_a_run_that_ends_early(
    kind: str, end: Callable[[subprocess.Popen[bytes], Path], None], folder: Path, tmp_path: Path
) -> None:
    """Two ranks, so that a launcher is in between."""
    output = tmp_path / "out"
    options = ["--run.num_steps=1000", "--parallel.tp=2", f"--run.output_dir={output}"]
    if end is fails:  # in the first step, when the servers have answered
        options.append("--rollout.logprob_gate=1e-12")
    with Traces(tmp_path / "tmp") as traces:
        process = subprocess.Popen(
            train_command(folder / "run.toml", *server_arguments(kind, folder), *options, ranks=2),
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "stderr").open("wb"),
            env=environment() | traces.variables,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            end(process, output)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert len(traces.seen_processes) >= 2 + 2 * NUM_SERVERS  # ranks, guards, servers
    assert len(traces.seen_ports) >= NUM_SERVERS
    assert traces.left() == {}
    assert not (output / "weights").exists()
    logs = [f"server-{index}.log" for index in range(NUM_SERVERS)]
    assert sorted(path.name for path in (output / "sglang").iterdir()) == logs
