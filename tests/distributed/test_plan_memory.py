"""The plan's activation and head terms against the live storages of real updates (fp32, CPU)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.costs.memory import BatchShape, StageMemory, TrainingForm, chunk_rows, stage_memory
from aer_megatron.costs.model_size import Layout, rank_parameters
from aer_megatron.parallel import fused_head, vocab, vocab_shard
from tests.support.policies import policy_config
from tests.support.spawn import run_distributed
from tests.support.storage_tracker import StorageTracker
from tests.support.updates import live_tensors, textbook, uniform_batch

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 192, "vocab_size": 1000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}

# model, sequences, length, head, [megatron]
CASES: dict[str, tuple[dict[str, Any], int, int, str, dict[str, Any]]] = {
    "fused head": ({}, 4, 64, "fused", {}),
    "whole logits": ({"vocab_size": 4000}, 4, 64, "logits", {}),
    "textbook": ({"vocab_size": 4000}, 4, 64, "textbook", {}),
    "long sequence": ({"num_hidden_layers": 3}, 1, 320, "fused", {}),
    "wide and deep": ({"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}, 2, 64, "fused", {}),
    "whole heads": ({"num_attention_heads": 8, "num_key_value_heads": 8}, 4, 64, "fused", {}),
    "no norm of q and k": (LLAMA, 4, 64, "fused", {}),
    "tied": ({"tie_word_embeddings": True, "vocab_size": 8000}, 4, 64, "fused", {}),
    "full recomputation": ({"num_hidden_layers": 6}, 4, 96, "fused", FULL),
    "selective recomputation": ({"num_hidden_layers": 3}, 1, 192, "fused", SELECTIVE),
}


def measure(rank: int, world_size: int, names: list[str], tp: int, sequence_parallel: bool) -> list[tuple[int, ...]]:
    """Returns for every case the peak that an update adds, this rank's parameters, and its checkpoint buffer."""
    from megatron.core import parallel_state

    from aer_megatron.actor.actor import Actor
    from aer_megatron.checkpoint.buffer import HostBuffer, tensor_file
    from aer_megatron.checkpoint.tensors import own_files
    from aer_megatron.convert.random_weights import random_hf_weights
    from aer_megatron.parallel import platform
    from aer_megatron.parallel.topology import initialize_topology, leave_layout

    platform.install_platform()
    results = []
    for name in names:
        changes, sequences, length, form, megatron = CASES[name]
        table = {**QWEN3, **changes}
        leave_layout()
        config = policy_config(
            model={"head": "fused" if form == "fused" else "logits"},
            parallel={"micro_batch_size": sequences, "tp": tp, "sequence_parallel": sequence_parallel},
            megatron=megatron,
        )
        actor = Actor(
            architecture_from_hf_config(table),
            config,
            initialize_topology(tp=tp, pp=1, seed=0),
            device=torch.device("cpu"),
            optimizer=config.optimizer,
            num_updates_planned=2,
        )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(table), encoding="utf-8")
            actor.load_hf_weights(random_hf_weights(folder, 0))
        given = uniform_batch(sequences, length, vocab_size=table["vocab_size"], old_logprob=-7.0)
        patch = mock.patch("aer_megatron.actor.model.vocab_parallel_logprob_entropy", textbook)
        if form == "textbook":
            patch.start()
        actor.train(given, seed=0, entropy_gradient=True)  # makes the optimizer's state
        reused = {t.untyped_storage()._cdata for t in parallel_state.get_global_memory_buffer().buffer.values()}
        tensors = live_tensors()
        with StorageTracker(*(t for t in tensors if t.untyped_storage()._cdata not in reused)) as tracker:
            actor.train(given, seed=0, entropy_gradient=True)
        if form == "textbook":
            patch.stop()
        buffer = HostBuffer(torch.device("cpu"))
        files = {name: tensor_file(part, tensors) for name, (part, tensors) in own_files(actor).items()}
        buffer.copy({name: file for name, file in files.items() if file.part != "rng"})  # kilobytes, not in a plan
        parameters = sum(parameter.numel() for parameter in actor.model.parameters())
        results.append((tracker.peak_bytes, parameters, buffer.nbytes))
        del actor, tensors
    return results


def planned(name: str, tp: int = 1, sequence_parallel: bool = False) -> tuple[StageMemory, int]:
    """Returns the plan of a case and the parameters that it gives a rank."""
    changes, sequences, length, form, megatron = CASES[name]
    arch = architecture_from_hf_config({**QWEN3, **changes})
    layout = Layout(tp, 1, 1, 1, sequence_parallel, megatron.get("recompute_granularity", "none"))
    chunk = fused_head._CPU_CHUNK_BYTES if form == "fused" else vocab._CPU_CHUNK_BYTES
    rows = arch.vocab_size
    training = TrainingForm(4, "local", form, rows, chunk, on_cpu=True)  # type: ignore[arg-type]
    responses = sequences * (length - length // 4)
    memory = stage_memory(
        arch, layout, BatchShape(sequences, length, responses), training, stage=0, num_micro_batches=1
    )
    return memory, rank_parameters(arch, layout, stage=0, vocab_rows=rows).total


def check(names: list[str], tp: int = 1, sequence_parallel: bool = False) -> None:
    for name, (peak, parameters, buffer) in zip(
        names, run_distributed(measure, tp, names, tp, sequence_parallel, timeout_s=300)[0], strict=True
    ):
        memory, held = planned(name, tp, sequence_parallel)
        assert held == parameters, name
        assert memory.transient == pytest.approx(peak, rel=0.1), name
        assert memory.checkpoint <= buffer < memory.checkpoint + 128, name  # two files, aligned


def test_one_rank() -> None:
    check(list(CASES))


def test_sequence_parallel_ranks() -> None:
    check(["fused head", "wide and deep"], tp=2, sequence_parallel=True)


@pytest.mark.parametrize("responses", [1, 40, 3000])
@pytest.mark.parametrize("columns", [50, 5000, 151_936])
def test_chunks_are_the_kernels_own(responses: int, columns: int) -> None:
    wanted = vocab_shard.rows_per_chunk(torch.empty(responses, 0), columns, None, fused_head._CPU_CHUNK_BYTES)
    assert chunk_rows(columns, responses, fused_head._CPU_CHUNK_BYTES) == wanted
