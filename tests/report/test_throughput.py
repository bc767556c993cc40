"""Throughput of a step by hand: who divides what by what, and what a CPU leaves out."""

from __future__ import annotations

import numpy as np
import pytest

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.costs.hardware import gpu_named, gpu_of_device
from aer_megatron.report.metrics import MACHINE_PREFIXES, Metric
from aer_megatron.report.throughput import RunThroughput
from tests.support.experiences import experience_of, with_mask

ARCH = ModelArchitecture(
    family="qwen2",
    num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, ffn_hidden_size=16, vocab_size=50,
    tied_embeddings=False, rope_theta=1e4, norm_eps=1e-6, qk_norm=False, qkv_bias=False, max_positions=64,
    rope_scaling=None, moe=None,
)  # fmt: skip
# prompts of 2 and 4 tokens with answers of 3 and 1: sequences of 5 each, of which 4 are sampled
EXPERIENCE = experience_of(np.array([2, 4]), np.array([3, 1]), np.arange(10))
TIMES = {"time/step_s": 10.0, "time/rollout_s": 4.0, "time/score_s": 1.0, "time/train_s": 2.0, "time/sync_s": 0.5}
# per layer: q 8 x 8, k and v 8 x 4 each, output 8 x 8, gate, up and down 3 x 8 x 16
MATRICES = 2 * (64 + 2 * 32 + 64 + 384)
FORWARD = 2 * MATRICES * 10 + 4 * 0.5 * 2 * 8 * (25 + 25) + 2 * 8 * 50 * 4


def test_a_step_on_two_cpu_ranks() -> None:
    found = RunThroughput(ARCH, num_ranks=2, generates_beside=False)(TIMES, EXPERIENCE, num_generated=12)
    assert found == {
        Metric.PERF_TOKENS_PER_S_PER_GPU: 10 / 10 / 2,
        Metric.PERF_IDLE_SHARE: pytest.approx(0.7),
        Metric.PERF_ROLLOUT_TOKENS_PER_S: 12 / 4,
    }
    assert all(name.startswith(MACHINE_PREFIXES) for name in found)


def test_a_step_on_two_gpus() -> None:
    gpu = gpu_named("h100")
    throughput = RunThroughput(ARCH, 2, False, gpu, planned_bytes=4e9, peak_bytes=lambda: 3 * 10**9)
    found = throughput(TIMES, EXPERIENCE, num_generated=12)
    assert found[Metric.PERF_MFU] == pytest.approx(3 * FORWARD / (2 * 2.0 * 989.4e12), rel=1e-12)
    assert (found[Metric.PERF_PEAK_MEMORY_GB], found[Metric.PERF_PEAK_MEMORY_OF_PLAN]) == (3.0, 0.75)
    # a token that the policy did not sample is fed to the layers, and not to the head
    masked = with_mask(EXPERIENCE, np.array([0, 0, 1, 0, 1, 0, 0, 0, 0, 1], dtype=bool))
    fewer = throughput(TIMES, masked, num_generated=12)[Metric.PERF_MFU]
    assert fewer / found[Metric.PERF_MFU] == pytest.approx((FORWARD - 2 * 8 * 50) / FORWARD)


def test_generation_beside_training_takes_the_whole_step() -> None:
    found = RunThroughput(ARCH, 1, generates_beside=True)(TIMES, EXPERIENCE, num_generated=12)
    assert found[Metric.PERF_ROLLOUT_TOKENS_PER_S] == 1.2


def test_what_cannot_be_divided_is_left_out() -> None:
    throughput = RunThroughput(ARCH, 1, False, None, planned_bytes=None, peak_bytes=lambda: 10**9)
    found = throughput({"time/step_s": 0.0}, EXPERIENCE, num_generated=0)
    assert found == {Metric.PERF_PEAK_MEMORY_GB: 1.0}


def test_the_data_sheet_of_a_device() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    sheets = {name: gpu_of_device(name) for name in names}
    assert {name: gpu and gpu.name for name, gpu in sheets.items()} == names
