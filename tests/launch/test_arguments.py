"""The command line of ``aer launch``: what it makes of its arguments and of the machines' variables."""

from __future__ import annotations

import os

import pytest
import torch

from aer_megatron.launch.command import COMMAND, LaunchOptions, launch_options, main, number_of_ranks


def parse_command_line(arguments: list[str], environment: dict[str, str]) -> LaunchOptions:
    return launch_options(COMMAND.parse(arguments), environment)


TRAIN = ("-m", "aer_megatron.train", "run.toml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nproc", "2", "run.toml"], LaunchOptions(TRAIN, nproc="2")),
        (["run.toml", "--run.seed=1"], LaunchOptions((*TRAIN, "--run.seed=1"))),
        (["--nproc_per_node=4", "--standalone", "run.toml"], LaunchOptions(TRAIN, nproc="4")),
        (["--nproc-per-node", "gpu", "-m", "pkg.tool", "--nproc", "9"],
         LaunchOptions(("-m", "pkg.tool", "--nproc", "9"), nproc="gpu")),
        (["--nproc=2", "tool.py", "-x"], LaunchOptions(("tool.py", "-x"), nproc="2")),
        (["--nproc=2", "doctor", "run.toml", "--reference=never"],
         LaunchOptions(("-m", "aer_megatron.cli", "doctor", "run.toml", "--reference=never"), nproc="2")),
        (["--shutdown-timeout=0", "run.toml"], LaunchOptions(TRAIN, shutdown_timeout=0.0)),
        # an address is of no use to one machine, wherever it comes from
        (["--master-addr", "node7", "run.toml"], LaunchOptions(TRAIN)),
        (["--nnodes", "2", "--node_rank", "1", "--master_addr", "node0", "--master_port", "5", "--rdzv-id", "j1",
          "run.toml"],
         LaunchOptions(TRAIN, nnodes=2, node_rank=1, master_addr="node0", master_port=5, run_id="j1")),
    ],
)  # fmt: skip
def test_arguments(arguments: list[str], expected: LaunchOptions) -> None:
    assert parse_command_line(arguments, {"MASTER_ADDR": "node9", "MASTER_PORT": "7"}) == expected


def test_slurm_s_and_the_user_s_variables_describe_the_machines() -> None:
    variables = {"MASTER_ADDR": "node9", "MASTER_PORT": "700", "SLURM_NODEID": "3"}
    options = parse_command_line(["--nnodes=4", "run.toml"], variables)
    assert (options.node_rank, options.master_addr, options.master_port) == (3, "node9", 700)
    options = parse_command_line(["--nnodes=4", "--node-rank=0", "--master-port=8", "run.toml"], variables)
    assert (options.node_rank, options.master_addr, options.master_port) == (0, "node9", 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["the run file is missing"]),
        (["--nproc=2"], ["the run file is missing"]),
        (["--nproc"], ["--nproc needs a value"]),
        (["-m"], ["-m needs the name of a module"]),
        (["--nprox=2", "run.toml"], ["--nprox is no option", "--nproc?"]),
        (["--run.seed=1", "run.toml"], ["--run.seed", "after the run file"]),
        (["--dry-run", "run.toml"], ["--dry-run", "after the run file"]),
        (["--rdzv-backend=c10d", "run.toml"], ["--rdzv-backend", "--master-addr"]),
        (["--nnodes=1:4", "run.toml"], ["--nnodes=1:4", "whole number", "fixed"]),
        (["--nnodes=0", "run.toml"], ["--nnodes=0 must be at least 1"]),
        (["--node-rank=1", "run.toml"], ["--node-rank=1 needs --nnodes"]),
        (["--nnodes=2", "run.toml"], ["--nnodes=2 needs --master-addr"]),
        (["--nnodes=2", "--master-addr=n", "run.toml"], ["--nnodes=2 needs --node-rank", "SLURM_NODEID"]),
        (["--nnodes=2", "--master-addr=n", "--node-rank=2", "run.toml"], ["--node-rank=2 must be below --nnodes=2"]),
        (["--nnodes=2", "--master-addr=n", "--node-rank=0", "--master-port=70000", "r.toml"], ["--master-port=70000"]),
        (["--join-timeout=nan", "run.toml"], ["--join-timeout=nan", "seconds"]),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        parse_command_line(arguments, {})
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("nproc", "devices", "expected"),
    [("3", 0, 3), ("4", 4, 4), ("gpu", 8, 8), ("auto", 8, 8), ("cpu", 8, None), ("auto", 0, None)],
)
def test_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch, nproc: str, devices: int, expected: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert number_of_ranks(nproc) == (len(os.sched_getaffinity(0)) if expected is None else expected)


@pytest.mark.parametrize(
    ("nproc", "devices", "words"),
    [
        ("9", 8, "--nproc=9.* 8 CUDA devices"),
        ("gpu", 0, "no CUDA device"),
        ("0", 0, "--nproc=0"),
        ("two", 0, "--nproc=two"),
    ],
)
def test_a_number_of_ranks_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, nproc: str, devices: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError, match=words):
        number_of_ranks(nproc)


def test_a_wrong_argument_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc", "two", "run.toml"]) == 2
    assert capsys.readouterr().err == "aer_megatron: --nproc=two must be a whole number\n"
