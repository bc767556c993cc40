"""The multi-node launch script on two nodes of one machine: a node is lost, and the run goes on from its checkpoint.

The nodes are network namespaces with a cable between them where the machine permits, else two loopback addresses; the
first test's output says which. `make test-multinode` runs this file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.runs import MODEL, ROOT, environment, metric_lines
from tests.support.two_nodes import Cluster, Node, two_nodes

pytestmark = [pytest.mark.multinode, pytest.mark.integration]

LAUNCH = ROOT / "examples" / "multinode_torchrun" / "launch.sh"
RUN_FILE = ROOT / "examples" / "multinode_torchrun" / "rehearsal.toml"
HANG_TIMEOUT_S = 60.0  # importing takes half a minute on a busy machine
WATCHDOG_END_S = HANG_TIMEOUT_S + 60.0  # the second line 15 s behind it, the launcher's 10 s for the other ranks
RUN_S = 400.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick start's model with random weights."""
    folder = tmp_path_factory.mktemp("model") / "base"
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=torch.float32).save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


class Launch:
    """launch.sh on both nodes, each with its log; rank 0's files lie in ``folder``, which the nodes share."""

    def __init__(self, cluster: Cluster, model: Path, folder: Path, *arguments: str) -> None:
        first = cluster.nodes[0]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.logs = [folder / f"node-{node.address}.log" for node in cluster.nodes]
        self.processes = []
        for node, log in zip(cluster.nodes, self.logs, strict=True):
            with log.open("w") as stream:
                self.processes.append(node.start(
                    ["bash", str(LAUNCH), str(RUN_FILE), f"--model.path={model}", f"--run.output_dir={folder}",
                     f"--run.hang_timeout_s={HANG_TIMEOUT_S}", *arguments],
                    self._environment(first, node, cluster), stream))  # fmt: skip

    @staticmethod
    def _environment(first: Node, node: Node, cluster: Cluster) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {"MASTER_ADDR": first.address, "MASTER_PORT": "29411", "NNODES": "2", "GPUS_PER_NODE": "2"}
        loopback = {} if cluster.kind == "namespaces" else {"LOCAL_ADDR": node.address}
        return {**environment(), "PATH": path, "JOIN_TIMEOUT_S": "120", **given, **loopback}

    def wait(self, place: int, timeout_s: float) -> int:
        try:
            return self.processes[place].wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"node {place} still runs after {timeout_s} s:\n{self.text(place)[-6000:]}")

    def text(self, place: int) -> str:
        return self.logs[place].read_text(encoding="utf-8", errors="replace")

    def await_steps(self, steps: int) -> None:
        """Returns when ``steps`` steps are in the metrics file."""
        metrics = self.folder / "metrics.jsonl"
        deadline = time.monotonic() + RUN_S
        while not metrics.exists() or metrics.read_text().count("\n") < steps:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"no step {steps}:\n{self.text(0)[-3000:]}\n{self.text(1)[-3000:]}")
            time.sleep(0.02)


def assert_done(launch: Launch) -> None:
    for place in (0, 1):
        assert launch.wait(place, RUN_S) == 0, launch.text(place)[-6000:]


@pytest.fixture(scope="module")
def straight(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a run that nothing happens to."""
    launch = Launch(cluster, model, tmp_path_factory.mktemp("straight") / "out")
    assert_done(launch)
    assert not any(node.pids() for node in cluster.nodes)
    interface = "cable" if cluster.kind == "namespaces" else "lo"
    assert f"({interface})" in launch.text(0)
    assert "rendezvous at " in launch.text(1)
    return metric_lines(launch.folder)


def test_two_nodes_train(cluster: Cluster, straight: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nmultinode: two nodes as {cluster.kind}: {', '.join(node.address for node in cluster.nodes)}")
    assert [line["step"] for line in straight] == list(range(8))
    assert any(line["aer/coefficient"] > 0 for line in straight)
    assert len({line["train/grad_norm"] for line in straight}) == 8


def test_a_lost_node_ends_the_run_and_the_same_command_goes_on(
    cluster: Cluster, model: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    survivor, lost = cluster.nodes
    launch = Launch(cluster, model, tmp_path / "out")
    launch.await_steps(3)  # past the save of step 2
    lost.lose_power()
    began = time.monotonic()
    code = launch.wait(0, WATCHDOG_END_S)
    seconds = time.monotonic() - began
    said = launch.text(0)
    assert code != 0
    assert launch.processes[1].wait(10) != 0
    assert not survivor.pids(), "the surviving node's processes outlived the run"
    if cluster.kind == "namespaces":
        assert lost.address in said, said[-6000:]
    checkpoints = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step_*"))
    print(f"node lost: the other one ended after {seconds:.1f} s; checkpoints {checkpoints}")
    resumed = Launch(cluster, model, tmp_path / "out")
    assert_done(resumed)
    assert metric_lines(tmp_path / "out") == straight
    assert json.loads((tmp_path / "out" / "run.json").read_text())


def test_a_node_off_the_network_ends_the_run_on_both_sides(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    """No connection is closed: only the watchdog can notice, and it says which ranks no longer answer."""
    if cluster.kind != "namespaces":
        pytest.skip("a loopback address has no cable to pull")
    survivor, lost = cluster.nodes
    launch = Launch(cluster, model, tmp_path / "out", "--run.num_steps=1000")
    launch.await_steps(3)
    lost.pull_cable()
    began = time.monotonic()
    try:
        assert launch.wait(0, WATCHDOG_END_S) != 0
        seconds = time.monotonic() - began
        said = launch.text(0)
        assert not survivor.pids(), "the surviving node's processes outlived the run"
        assert "hang watchdog: phase" in said
        assert "no word from ranks 2, 3" in said, said[-6000:]
        while lost.ranks():  # the processes that hold GPUs must go
            assert time.monotonic() - began < WATCHDOG_END_S, launch.text(1)[-6000:]
            time.sleep(0.2)
        print(f"off the network: the other node ended after {seconds:.1f} s")
    finally:
        lost.lose_power()
        lost.plug_cable()
