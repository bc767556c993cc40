"""Converted checkpoints through Megatron-Core's own loader and saver on gloo ranks, and the weight stream."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from aer_megatron.convert import folders
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.megatron_folder import MegatronFolder
from aer_megatron.convert.stream import iter_stored_as_hf, stored_architecture, stored_hf_dtypes
from aer_megatron.parallel.platform import install_platform
from tests.support.spawn import run_distributed
from tests.support.tiny_models import FAMILIES, save_tiny_model

PROMPT = [3, 14, 1, 5, 9, 2, 6, 24]
NO_LIMIT = 10**9


class Case(NamedTuple):
    family: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    bucket_bytes: int = NO_LIMIT

    @property
    def world_size(self) -> int:
        return max(self.tp * self.pp, self.ep)


ALONE = [Case(family) for family in FAMILIES]
TOGETHER = [
    *(Case(family, tp=2) for family in FAMILIES),
    *(Case(family, pp=2) for family in FAMILIES),
    Case("qwen3_moe", ep=2),
    Case("qwen3_moe_raw", ep=2),
    Case("qwen3", tp=2, bucket_bytes=3000),
    Case("qwen3_moe", ep=2, bucket_bytes=3000),
]


SAVED = [Case("qwen2", tp=2), Case("llama", tp=2), Case("qwen3", pp=2), Case("qwen3_moe", ep=2)]


class Result(NamedTuple):
    weights: dict[str, Any]
    logits: Any  # None from a pipeline
    num_gathers: int
    num_broadcasts: int
    largest_collective: int  # bytes


def _saved(base: Path, case: Case) -> Path:
    return base / case.family / f"saved-{case.tp}{case.pp}{case.ep}"


def _run(rank: int, case: Case, base: Path) -> Result:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from aer_megatron.actor import weights
    from aer_megatron.conversion.logits import build_gpt, gpt_logits, load_distributed
    from aer_megatron.parallel.topology import initialize_topology, leave_layout

    leave_layout()
    topology = initialize_topology(tp=case.tp, pp=case.pp, ep=case.ep, seed=0)
    _, arch = folders.checked_hf_folder(base / case.family / "hf", 2)
    model = build_gpt(arch, topology)
    load_distributed(model, base / case.family / "megatron")
    logits = None
    if case.pp == 1:
        with torch.no_grad():
            logits = gpt_logits(model, PROMPT)[:, : arch.vocab_size].numpy()
    if case in SAVED:
        folder = _saved(base, case)
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # Megatron forks
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))

    calls: dict[str, list[int]] = {"gather": [], "broadcast": []}
    real_gather, real_broadcast = weights.all_gather_flat, dist.broadcast

    def gather(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls["gather"].append(output.nbytes)
        return real_gather(output, *args, **kwargs)

    def broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls["broadcast"].append(tensor.nbytes)
        return real_broadcast(tensor, *args, **kwargs)

    weights.all_gather_flat, dist.broadcast = gather, broadcast
    try:
        stream = weights.iter_hf_weights(model, arch, topology, bucket_bytes=case.bucket_bytes)
        collected = {name: tensor.numpy().copy() for name, tensor in stream}
    finally:
        weights.all_gather_flat, dist.broadcast = real_gather, real_broadcast
    sizes = calls["gather"] + calls["broadcast"]
    return Result(collected, logits, len(calls["gather"]), len(calls["broadcast"]), max(sizes, default=0))


def _run_all(rank: int, world_size: int, cases: Sequence[Case], base: Path) -> list[Result]:
    install_platform()
    return [_run(rank, case, base) for case in cases]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family as a Hugging Face folder and as the distributed checkpoint made from it, heads fit for TP 2."""
    root = tmp_path_factory.mktemp("layouts")
    for family in FAMILIES:
        folder, arch = folders.checked_hf_folder(save_tiny_model(family, root / family / "hf"), 2)
        target = root / family / "megatron"
        folders.hf_to_megatron(folder, arch, target, dtype=None, max_file_bytes=20_000, advance=lambda _: None)
    return root


@pytest.fixture(scope="module")
def results(base: Path) -> dict[Case, list[Result]]:
    """Case -> every rank's result."""
    found: dict[Case, list[Result]] = {}
    for world_size, cases in ((1, ALONE), (2, TOGETHER)):
        of_ranks = run_distributed(_run_all, world_size, cases, base, timeout_s=500)
        found |= {case: [ranks[i] for ranks in of_ranks] for i, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", ALONE + TOGETHER, ids=str)
def test_every_rank_streams_the_bits_of_the_checkpoint(
    case: Case, base: Path, results: dict[Case, list[Result]]
) -> None:
    folder = HFFolder(base / case.family / "hf")
    assert len(results[case]) == case.world_size
    for result in results[case]:
        assert sorted(result.weights) == sorted(folder.names())
        for name, array in result.weights.items():
            assert torch.equal(torch.from_numpy(array), folder.get(name)), name


@pytest.mark.parametrize("case", [c for c in ALONE + TOGETHER if c.pp == 1], ids=str)
def test_logits_are_those_of_transformers(case: Case, base: Path, results: dict[Case, list[Result]]) -> None:
    from aer_megatron.conversion.logits import transformers_logits

    (expected,) = transformers_logits(base / case.family / "hf", [PROMPT])
    assert expected.std() > 0.3  # far from uniform
    for result in results[case]:
        found = torch.from_numpy(result.logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_what_megatron_saves_converts_back(case: Case, base: Path, results: dict[Case, list[Result]]) -> None:
    assert results[case]
    source, arch = folders.checked_hf_folder(base / case.family / "hf", 1)
    stored = MegatronFolder(_saved(base, case))
    padded = stored_architecture(arch, stored)
    assert padded.num_padding_groups == (1 if case.family == "llama" else 0)
    dtypes = stored_hf_dtypes(padded, stored)
    assert folders.compare(source.get, dtypes, iter_stored_as_hf(padded, stored), lambda _: None) == len(source.names())


def test_few_large_collectives(results: dict[Case, list[Result]]) -> None:
    """One bucket per stage (dense, then experts): one collective per parallel axis for each."""
    expected = {
        Case("qwen3"): (0, 0),
        Case("qwen3", tp=2): (1, 0),
        Case("qwen3", pp=2): (0, 2),
        Case("qwen3_moe", tp=2): (2, 0),
        Case("qwen3_moe", pp=2): (0, 4),
        Case("qwen3_moe", ep=2): (1, 0),  # dense parameters are on every rank
    }
    for case, counts in expected.items():
        for result in results[case]:
            assert (result.num_gathers, result.num_broadcasts) == counts, case


def test_buckets_are_bounded(results: dict[Case, list[Result]]) -> None:
    for case in TOGETHER:
        if case.bucket_bytes == NO_LIMIT:
            continue
        whole = results[case._replace(bucket_bytes=NO_LIMIT)][0].largest_collective
        # tensors above the bound travel alone: linear_fc1 of 2 x 64 x 32 fp32, the same of 2 ranks' 16-wide experts
        largest = {"qwen3": 16384, "qwen3_moe": 8192}[case.family]
        for result in results[case]:
            assert result.num_gathers > 3
            assert result.largest_collective == largest < whole
