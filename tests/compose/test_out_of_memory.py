"""Out of device memory: the message names the option of the phase, and a snapshot is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.compose.out_of_memory import MemoryGuard, remedies
from aer_megatron.parallel.platform import Platform
from tests.support.policies import policy_config

TORCH_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB.\nmore"


def raised(folder: Path, phase: str) -> str:
    config = policy_config(run={"output_dir": str(folder)}, parallel={"micro_batch_size": 4})
    with (
        pytest.raises(RuntimeError) as caught,
        MemoryGuard(config, Platform("cuda", "nccl", rank=3, world_size=4, local_rank=3)) as guard,
    ):
        guard.enter_phase(phase, 7)
        guard.enter_phase("between phases", 7)  # the timer leaves the phase before the error is out
        raise torch.OutOfMemoryError(TORCH_SAYS)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert type(caught.value) is RuntimeError
    return str(caught.value)


def test_the_message_names_phase_rank_option_and_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    text = raised(tmp_path, "train")
    assert "out of memory in phase train of step 7 on rank 3: CUDA out of memory. Tried to allocate 2.00" in text
    assert "more" not in text.partition("Change")[0]
    assert "Change, in this order: lower parallel.micro_batch_size=4; megatron.recompute_granularity=" in text
    snapshot = tmp_path / "memory" / "rank3.pickle"
    assert str(snapshot) in text and snapshot.read_bytes() == b"snapshot"


def test_without_a_snapshot_the_remedy_is_said_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", refuse)
    text = raised(tmp_path, "train")
    assert "lower parallel.micro_batch_size=4" in text
    assert "no snapshot of the memory could be written: [Errno 28] No space left on device" in text


def test_other_errors_pass(tmp_path: Path) -> None:
    config = policy_config(run={"output_dir": str(tmp_path)})
    with (
        pytest.raises(KeyError, match="x"),
        MemoryGuard(config, Platform("cpu", "gloo", rank=0, world_size=1, local_rank=0)),
    ):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


LONG = {"data": {"max_prompt_tokens": 40}, "rollout": {"max_new_tokens": 60}}


@pytest.mark.parametrize(
    ("phase", "sections", "first"),
    [
        (
            "train",
            {"parallel": {"tokens_per_micro_batch": 512}},
            "lower parallel.tokens_per_micro_batch=512 (least: 100)",
        ),
        ("score", {"parallel": {"tokens_per_micro_batch": 100}, "model": {"head": "logits"}}, "model.head='fused'"),
        ("train", {"parallel": {"micro_batch_size": 1}}, "megatron.recompute_granularity='selective', then 'full'"),
        (
            "train",
            {"parallel": {"micro_batch_size": 1}, "megatron": {"recompute_granularity": "selective"}},
            "megatron.recompute_granularity='full'",
        ),
        (
            "train",
            {"parallel": {"micro_batch_size": 1}, "megatron": {"recompute_granularity": "full"}},
            "raise parallel.tp=1, parallel.pp=1 or parallel.cp=1",
        ),
        ("rollout", {}, "lower rollout.max_batch_size=256"),
        ("eval", {}, "lower rollout.max_batch_size=256"),
        ("sync", {"parallel": {"weight_bucket_mb": 64}}, "lower parallel.weight_bucket_mb=64"),
        ("start", {}, "raise parallel.tp=1, parallel.pp=1"),
    ],
)
def test_the_first_remedy_is_that_of_the_phase(phase: str, sections: dict[str, Any], first: str) -> None:
    assert remedies(policy_config(**LONG | sections), phase)[0] == first


def test_servers_beside_the_trainer_give_their_memory_back(tmp_path: Path) -> None:
    shared = {"rollout": {"engine": "sglang"}, "sglang": {"num_servers": 1}}
    assert remedies(policy_config(**shared), "train")[-1] == "sglang.release_memory=true where servers share the GPUs"
    shared["sglang"] |= {"release_memory": True}
    assert not any("release_memory" in text for text in remedies(policy_config(**shared), "train"))
