"""The acceptance run of a GPU machine, as far as a CPU can show it: what it would run, its report, its benchmarks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.runs import MODEL, ROOT, environment

SCRIPT = ROOT / "tools" / "gpu_acceptance.sh"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def accept(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**environment(), "PYTHON_BIN": sys.executable, **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.processes
def test_a_dry_run_lists_everything_and_runs_nothing(tmp_path: Path) -> None:
    done = accept("--dry-run", "--out", str(tmp_path / "out"), SGLANG_PYTHON="/opt/sglang/bin/python")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == [
        "tests", "head", "update-bf16-4b", "update-bf16-8b", "update-recompute-8b", "update-fp8-delayed",
        "update-fp8-tensorwise", "update-fp8-blockwise", "quickstart-base", "quickstart", "fp8-parity",
        "sglang-disk", "sglang-distributed", "report",
    ]  # fmt: skip
    assert "-m pytest -q -m gpu" in done.stdout
    assert "sglang" not in accept("--dry-run", SGLANG_PYTHON="").stdout


@pytest.mark.processes
def test_the_run_files_of_a_dry_run_load(tmp_path: Path) -> None:
    """Every command of the trainer gets options that exist."""
    from aer_megatron.config_loading import load_config

    printed = accept("--dry-run", SGLANG_PYTHON="/opt/python").stdout
    commands = [line.partition("aer_megatron.cli launch --nproc 1 ")[2] for line in printed.splitlines()]
    trained = [command.split() for command in commands if command]
    assert len(trained) == 4
    for run_file, *arguments in trained:
        load_config(ROOT / run_file, [argument for argument in arguments if not argument.startswith("--stage")])


@pytest.mark.processes
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a CUDA device is here: the script would run for an hour")
def test_it_stops_at_once_without_a_device(tmp_path: Path) -> None:
    done = accept("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert accept("--quick").returncode == 2


@pytest.mark.processes
@pytest.mark.parametrize("what", ["head", "update"])
def test_the_benchmark_runs_on_the_cpu_in_small(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out.json"
    sizes = {
        "head": ["--tokens", "8", "--hidden", "16", "--vocab", "64"],
        "update": ["--config", str(MODEL / "config.json"), "--layers", "1", "--sequences", "4", "--length", "16"],
    }
    command = [sys.executable, "-m", "benchmarks.bench_gpu", what, "--out", str(out), "--warmup", "1", "--repeats", "1"]
    done = subprocess.run(
        [*command, *sizes[what]], env=environment(), capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads(out.read_text())
    assert all(record["seconds"] > 0 and record["device"] == "cpu" for record in records)
    if what == "head":
        assert {record["form"] for record in records} == {"fused", "textbook"}
    else:
        assert records[0]["layers"] == 1
        assert records[0]["planned_peak_bytes"] > 0
        assert records[0]["tokens_per_second"] == pytest.approx(64 / records[0]["seconds"])


def test_the_two_forms_of_the_head_are_the_same_numbers() -> None:
    import torch

    from benchmarks.bench_gpu import fused, textbook

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=generator), torch.randn(50, 16, generator=generator)
    labels = torch.arange(7)
    for one, two in zip(fused(hidden, weight, labels), textbook(hidden, weight, labels), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_report_has_a_line_for_everything(tmp_path: Path) -> None:
    (tmp_path / "parts.txt").write_text("tests 0 12\nhead 1 3\n")
    head = {"what": "head", "tokens": 8, "vocab": 9}
    records = [
        {**head, "form": "fused", "seconds": 0.002, "peak_bytes": 3e9, "added_bytes": 1e9},
        {**head, "form": "textbook", "seconds": 0.006, "peak_bytes": 9e9, "added_bytes": 5e9},
        {**head, "form": "textbook, torch.compile", "error": "CUDA out of memory"},
    ]
    (tmp_path / "head.json").write_text(json.dumps(records))
    update = {"what": "update", "config": "c", "layers": 8, "tokens_per_second": 5e4, "mfu": 0.4, "peak_bytes": 60e9,
              "planned_peak_bytes": 50e9}  # fmt: skip
    (tmp_path / "update-bf16-8b.json").write_text(json.dumps([{**update, "seconds": 2.0}]))
    (tmp_path / "update-fp8-tensorwise.json").write_text(json.dumps([{**update, "seconds": 1.6}]))
    run = tmp_path / "sglang-disk"
    run.mkdir()
    steps = [{"time/sync_s": 9.0}, {"time/sync_s": 0.5, "rollout/logprob_diff_max": 0.02}, {"time/sync_s": 0.7}]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(step) for step in steps) + "\n")
    (tmp_path / "fp8-parity.log").write_text("entropy shift 0.01\n")
    assert tool("gpu_report").main([str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    for line in (
        "| tests | passed | 12 s |",
        "| head | FAILED (1), head.log | 3 s |",
        "| textbook | 6.00 | 5.00 | 3.00 | 5.00 |  |",
        "| textbook, torch.compile | - | - | - | - | CUDA out of memory |",
        "| update-fp8-tensorwise | 8 | 1.600 | 50,000 | 40.0% | 1.25 | 60.0 | 50.0 | 1.20 |",
        "| sglang-disk | 3 | sync 0.600 | 2.00e-02 |",
        "entropy shift 0.01",
    ):
        assert line in report, line
    assert tool("gpu_report").main([str(run)]) == 2


def test_every_package_of_the_image_is_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("check_image_pins").main(["--offline"]) == 0
    assert "apt and" in capsys.readouterr().out


def test_packages_without_a_pin_and_contradictions_are_found() -> None:
    check = tool("check_image_pins")
    line = "RUN apt-get install --yes git=1:2.* make && pip install --constraint /tmp/c.txt 'a[x]==1' b"
    assert list(check.packages(line)) == [("git", "1:2.*"), ("make", ""), ("a", "1"), ("b", "")]
    pins, problems = check.pins_of("FROM python:3.12-slim AS gpu\nRUN pip install \\\n  torch==2.13.0 nopin\n")
    assert [(pin.name, pin.python, pin.where) for pin in pins] == [("torch", "3.12", "gpu")]
    assert problems == ["gpu: nopin has no version"]
    pins = [check.Pin("pip", "a_b", "1", "stage", "3.12"), check.Pin("pip", "a-b", "2", "c.txt", "3.12")]
    assert "a_b==1" in check.disagreements(pins)[0]
