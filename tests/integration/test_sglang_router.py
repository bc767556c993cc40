"""A run whose launched servers generate behind a router: servers killed at random moments cost no sample."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.double_runs import double_python
from tests.support.real_router import real_router
from tests.support.real_servers import launch_arguments
from tests.support.runs import metric_lines, random_base, train_command, write_run_file
from tests.support.server_kills import KillPlan, run_with_kills
from tests.support.sglang_router_double import RouterDouble
from tests.support.traces import Traces

REAL = [pytest.mark.sglang, pytest.mark.timeout(1800)]
NUM_STEPS = 10
REQUESTS_PER_STEP = 8 * 4  # of the miniature run
READY_S = 30.0


@contextmanager
def a_router(kind: str, log: Path) -> Iterator[str]:
    """Yields the address of a router without workers."""
    if kind == "double":
        with RouterDouble() as double:
            yield double.url
            assert double.refused == []
            assert double.workers == {}, "the run's servers stayed in it"
        return
    with real_router(log) as url:
        deadline = time.monotonic() + READY_S
        while not (_workers(url) or "").startswith('{"workers":[]'):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
        assert '"status":"ready"' not in (_workers(url) or "")


def _workers(url: str) -> str | None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5.0)
    try:
        connection.request("GET", "/workers")
        return connection.getresponse().read().decode()
    except OSError:
        return None
    finally:
        connection.close()


def _arguments(kind: str, folder: Path) -> list[str]:
    if kind == "real":
        return launch_arguments()
    double = double_python(folder, "--token-s", "0.01")
    return ["--rollout.engine=sglang", f"--sglang.python={double}", "--rollout.logprob_gate=0"]  # it has no model


@pytest.mark.parametrize(("kind", "num_kills", "num_ranks"), [("double", 4, 2), pytest.param("real", 2, 1, marks=REAL)])
def test_servers_killed_behind_a_router_cost_no_sample(
    kind: str, num_kills: int, num_ranks: int, tmp_path: Path
) -> None:
    random_base(tmp_path / "base")
    output = tmp_path / "out"
    with a_router(kind, tmp_path / "router.log") as url, Traces(tmp_path / "tmp") as traces:
        command = train_command(
            write_run_file(tmp_path),
            *_arguments(kind, tmp_path),
            "--sglang.num_servers=2",
            f"--sglang.router_url={url}",
            "--sglang.max_restarts=20",
            f"--run.num_steps={NUM_STEPS}",
            "--eval.sets={}",
            "--run.checkpoint_every=0",
            '--report.sinks=["console"]',
            f"--run.output_dir={output}",
            ranks=num_ranks,
        )
        plan = KillPlan(2, num_kills, num_requests=NUM_STEPS * REQUESTS_PER_STEP, seed=3)
        killed = run_with_kills(command, output, plan, variables=traces.variables, limit_s=1500.0)
        print(killed.summary())
        print(killed.stderr)
    lines = metric_lines(output)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:  # every sample is judged, and once
        assert sum(count for name, count in line.items() if name.startswith("rewards/reason/")) == REQUESTS_PER_STEP
        assert kind == "double" or line["rollout/logprob_diff_max"] < 1e-3
    assert killed.attempts == NUM_STEPS * REQUESTS_PER_STEP
    assert "restart 1 of 20" in killed.stderr
    assert traces.left() == {}
