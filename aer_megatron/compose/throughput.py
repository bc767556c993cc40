"""What a run's throughput is measured against: its GPUs' data sheet and the plan of its memory."""

from __future__ import annotations

import functools

import torch

from aer_megatron.compose.common import architecture
from aer_megatron.compose.step_plan import StepPlan
from aer_megatron.config import Config
from aer_megatron.costs.hardware import gpu_of_device
from aer_megatron.costs.memory import peak_bytes
from aer_megatron.parallel.exchange import all_max
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.throughput import RunThroughput


def run_throughput(config: Config, platform: Platform) -> RunThroughput:
    """Returns what gives a run's ``perf/*``."""
    arch = architecture(config.model.path)
    measured = functools.partial(RunThroughput, arch, platform.world_size, config.rollout.staleness > 0)
    if platform.device_type != "cuda":
        return measured()
    plan = StepPlan(config, arch)
    layout = plan.own_layout(platform.world_size)
    _, training = plan.training_memory(layout, plan.own_micro_batch_size(layout))
    return measured(
        gpu=gpu_of_device(torch.cuda.get_device_name(platform.device)),
        planned_bytes=peak_bytes(training, plan.engine_memory(layout)),
        peak_bytes=lambda: all_max(torch.cuda.max_memory_allocated(platform.device), device=platform.device),
    )
