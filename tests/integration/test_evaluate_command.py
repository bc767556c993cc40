"""aer evaluate on a model of seconds: killed and resumed, on several ranks, of a run, of running servers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT, environment, run_command, train, write_run_file
from tests.support.sglang_double import SGLangDouble

SETS = """
[model]
path = "replaced by the command"
dtype = "fp32"
[data]
template = "plain"
train = { task = "countdown" }
[rollout]
max_new_tokens = 8
max_batch_size = 8
[eval.sets.small]
source = { task = "countdown", size = 60, options = { split = "eval" } }
num_prompts = 60
num_samples = 4
k = [1, 4]
"""
NUM_LINES = 60 + 60


def command(policy: Path, output: Path, *arguments: str, ranks: int = 1) -> list[str]:
    """Returns the command that evaluates ``policy``."""
    run_file = output.parent / "sets.toml"
    run_file.write_text(SETS, encoding="utf-8")
    launch = ["launch", "--nproc", str(ranks)] if ranks > 1 else []
    program = [sys.executable, "-m", "aer_megatron.cli", *launch, "evaluate", str(policy), f"--output={output}"]
    return [*program, *arguments]


def problems(output: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Returns the counts and the digests of the token ids of every set, by temperature and problem."""
    sets = json.loads(output.read_text(encoding="utf-8"))["sets"]
    return {name: [answers["problems"] for answers in found["answers"]] for name, found in sets.items()}


def test_killed_and_resumed_it_ends_as_the_one_that_never_stopped(tmp_path: Path, random_policy: Path) -> None:
    options = ("--config", str(tmp_path / "sets.toml"), "--temperatures", "0", "0.6")
    whole = run_command(command(random_policy, tmp_path / "whole.json", *options, ranks=2))
    assert whole.returncode == 0, whole.stderr
    assert "small  0.6        60  4" in whole.stdout

    killed, samples = command(random_policy, tmp_path / "killed.json", *options), tmp_path / "killed.samples.jsonl"
    process = subprocess.Popen(
        killed, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if samples.is_file() and samples.stat().st_size:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    num_before = samples.read_bytes().count(b"\n")
    assert 0 < num_before < NUM_LINES
    assert not (tmp_path / "killed.json").exists()

    resumed = run_command(killed)
    assert resumed.returncode == 0, resumed.stderr
    assert f"60 problems x 1 samples, {min(num_before, 60)} problems done" in resumed.stderr
    assert samples.read_bytes().count(b"\n") == NUM_LINES
    assert problems(tmp_path / "killed.json") == problems(tmp_path / "whole.json")


def test_a_run_is_evaluated_at_a_checkpoint_with_its_own_options(tmp_path: Path, random_policy: Path) -> None:
    run_file = write_run_file(tmp_path, base=random_policy)
    trained = train(run_file, "--run.num_steps=2", "--run.checkpoint_every=1", "--eval.sets={}")
    assert trained.returncode == 0, trained.stderr
    source = "--eval.sets.held.source={task = 'countdown', size = 50, options = {split = 'eval'}}"
    run, sets = tmp_path / "out", (source, "--eval.sets.held.num_prompts=3")
    results = {}
    for name, arguments in (("newest", ()), ("first", ("--checkpoint=step_00000001",))):
        more = (*sets, "--eval.sets.held.num_samples=2", "--eval.sets.held.k=[1,2]", *arguments)
        done = run_command(command(run, tmp_path / f"{name}.json", *more))
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    newest, first = results["newest"]["policy"], results["first"]["policy"]
    assert (newest["checkpoint"], newest["step"], first["step"]) == ("step_00000002", 2, 1)
    assert newest["weights"] != first["weights"]
    assert results["newest"]["sets"]["held"]["settings"]["template"] == "plain"  # the run's
    wrong = run_command(command(run, tmp_path / "x.json", *sets, "--checkpoint=step_9"))
    assert wrong.returncode == 2
    assert "it has step_00000001, step_00000002" in wrong.stderr


def test_servers_are_asked_and_given_nothing(tmp_path: Path, random_policy: Path) -> None:
    with SGLangDouble(random_policy, vocab_size=20) as server:
        server.weight_version = "mine"
        options = ("--config", str(tmp_path / "sets.toml"), "--eval.sets.small.num_prompts=5", "--urls", server.url)
        done = run_command(command(random_policy, tmp_path / "served.json", *options))
        assert done.returncode == 0, done.stderr
        assert server.num_completed == 5 * 4 and server.weight_version == "mine" and not server.loaded
    policy = json.loads((tmp_path / "served.json").read_text(encoding="utf-8"))["policy"]
    assert (policy["kind"], policy["weight_version"]) == ("servers", "mine")
