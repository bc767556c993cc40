"""A CUDA device that is out of memory: which options to change, and a snapshot of what lies where."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from aer_megatron.config import Config
from aer_megatron.parallel.platform import Platform

MEMORY_FOLDER = "memory"  # below run.output_dir


class MemoryGuard:
    """Ends the run with what would help, where PyTorch finds no device memory; told of phases by the phase timer."""

    def __init__(self, config: Config, platform: Platform) -> None:
        self._config = config
        self._platform = platform
        self._where = ("start", "the start")

    def enter_phase(self, phase: str, step: int | None) -> None:
        if phase != "between phases":  # where an error leaves the phase that it comes from
            self._where = (phase, f"phase {phase} of step {step}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises RuntimeError in the place of torch's own."""
        if not isinstance(error, torch.OutOfMemoryError):
            return
        phase, words = self._where
        raise RuntimeError(
            f"out of memory in {words} on rank {self._platform.rank}: {str(error).splitlines()[0]} Change, in "
            f"this order: {'; '.join(remedies(self._config, phase))}. aer plan says what each term of a layout takes; "
            f"{self._snapshot()}"
        ) from error

    def _snapshot(self) -> str:
        path = Path(self._config.run.output_dir) / MEMORY_FOLDER / f"rank{self._platform.rank}.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, RuntimeError, AttributeError) as failure:  # the last: a build of torch without CUDA
            return f"no snapshot of the memory could be written: {failure}"
        return f"what lay where is in {path} (https://docs.pytorch.org/memory_viz)"


def remedies(config: Config, phase: str) -> list[str]:
    """Returns the options that lower device memory in a phase of the step ("start": before the first), best first."""
    parallel, rollout = config.parallel, config.rollout
    layout = f"raise parallel.tp={parallel.tp}, parallel.pp={parallel.pp}"
    if phase in ("rollout", "eval") and not rollout.uses_servers:
        return [
            f"lower rollout.max_batch_size={rollout.max_batch_size}",
            f"lower rollout.max_new_tokens={rollout.max_new_tokens}",
            "rollout.engine='sglang' with servers on GPUs of their own",
        ]
    if phase == "sync":
        return [f"lower parallel.weight_bucket_mb={parallel.weight_bucket_mb}", layout]
    if phase == "start":
        return [layout, "more ranks: the optimizer's state is shared by replicas"]
    found = []
    longest = parallel.padded(config.data.max_prompt_tokens + rollout.max_new_tokens)
    if parallel.tokens_per_micro_batch > longest:
        found.append(f"lower parallel.tokens_per_micro_batch={parallel.tokens_per_micro_batch} (least: {longest})")
    elif not parallel.tokens_per_micro_batch and parallel.micro_batch_size > 1:
        found.append(f"lower parallel.micro_batch_size={parallel.micro_batch_size}")
    if config.model.head == "logits":
        found.append("model.head='fused'")
    recompute = config.megatron.get("recompute_granularity")
    if recompute != "full":
        more = "'full'" if recompute else "'selective', then 'full'"
        found.append(f"megatron.recompute_granularity={more}")
    found.append(f"{layout} or parallel.cp={parallel.cp}")
    if rollout.uses_servers and not config.sglang.release_memory:
        found.append("sglang.release_memory=true where servers share the GPUs")
    return found
