"""What a run's throughput is measured against: nothing on a CPU, data sheet and plan on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aer_megatron.compose import throughput
from aer_megatron.compose.common import architecture
from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.costs.hardware import gpu_named
from aer_megatron.parallel.platform import Platform
from aer_megatron.plan.search import Setting, own_candidate
from tests.support.runs import random_base, write_run_file


@pytest.fixture
def config(tmp_path: Path) -> Config:
    random_base(tmp_path / "base")
    write_run_file(tmp_path)
    return load_config(tmp_path / "run.toml", ["--parallel.tp=2"])


def test_a_cpu_has_neither_data_sheet_nor_plan(config: Config) -> None:
    measured = throughput.run_throughput(config, Platform("cpu", "gloo", rank=0, world_size=2, local_rank=0))
    assert (measured.gpu, measured.planned_bytes, measured.peak_bytes) == (None, None, None)
    assert (measured.num_ranks, measured.generates_beside) == (2, False)


def test_a_gpu_is_held_against_its_data_sheet_and_what_aer_plan_says(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(throughput, "all_max", lambda value, device: value + 1)  # another rank has more
    measured = throughput.run_throughput(config, Platform("cuda", "nccl", rank=0, world_size=4, local_rank=0))
    plan = StepPlan(config, architecture(config.model.path))
    planned = own_candidate(Setting(plan, gpu_named("h100"), 4, 0.1, 0.0)).peak_bytes
    assert measured.gpu == gpu_named("h100")
    assert measured.planned_bytes == planned > 0
    assert measured.peak_bytes is not None and measured.peak_bytes() == 8
