"""The policy that is evaluated: a Hugging Face folder, a checkpoint of a run, or what running servers serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.checkpoint.folder import CheckpointFolder
from aer_megatron.checkpoint.weights import RunCheckpoint
from aer_megatron.compose.common import architecture, checked_weights
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config, parse_overrides
from aer_megatron.config_section import refuse_recorded_code
from aer_megatron.console.command_line import Given
from aer_megatron.convert.mapping import hf_names
from aer_megatron.report.writer import MANIFEST_FILE, read_run_manifest

_NOT_TRAINED = "--data.train.task=countdown"  # a configuration has training data, and an evaluation never reads them


@dataclass(frozen=True, slots=True)
class Policy:
    """What is evaluated, and under which options: ``config.model.path`` is its config.json and tokenizer."""

    place: Path
    kind: Literal["folder", "run", "servers"]
    config: Config
    checkpoint: Path | None = None  # of a run
    step: int = 0

    def with_config(self, config: Config) -> Policy:
        """Returns the same policy under other options."""
        return replace(self, config=config)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields its weights as Hugging Face tensors in the dtype of ``model.dtype``.

        Raises:
            ValueError: they are damaged, or do not fit config.json.
        """
        path, dtype = self.config.model.path, TORCH_DTYPES[self.config.model.dtype]
        arch = architecture(path)
        if self.checkpoint is not None:
            for name, tensor in RunCheckpoint(self.checkpoint).tensors(arch):
                yield name, tensor.to(dtype)
            return
        get = checked_weights(path)
        for name in hf_names(arch):
            yield name, get(name).to(dtype)


def find_policy(given: Given) -> Policy:
    """Returns the policy that the command names.

    Raises:
        ValueError: the place is none, the run has no such checkpoint, or its options are wrong.
    """
    place, run_file = Path(given.place), given["config"]
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; give a Hugging Face folder or the folder of a run")
    is_run = (place / MANIFEST_FILE).is_file()
    if given["checkpoint"] and not is_run:
        raise ValueError(f"--checkpoint={given['checkpoint']} is of a run, and {place} has no {MANIFEST_FILE}")
    if is_run and not run_file:
        config = _recorded(place, given)
    else:
        model = [] if is_run else [f"--model.path={place}", *([] if run_file else [_NOT_TRAINED])]
        config = load_config(run_file, [*model, *given.overrides])
    if given["urls"]:
        if is_run:
            raise ValueError(
                f"--urls: the servers hold the policy; give the Hugging Face folder of its tokenizer, not {place}"
            )
        changes = {"rollout.engine": "sglang", "sglang.urls": given["urls"], "sglang.num_servers": 0}
        return Policy(place, "servers", config.with_options(changes))
    if not is_run:
        return Policy(place, "folder", config)
    step, checkpoint = _checkpoint(place, given["checkpoint"])
    return Policy(place, "run", config, checkpoint, step)


def _recorded(place: Path, given: Given) -> Config:
    """Returns the options that the run was trained with, under the overrides."""
    table: Any = read_run_manifest(place).get("config")
    if not isinstance(table, dict):
        raise ValueError(f"{place / MANIFEST_FILE} holds no configuration; name a run file with --config")
    refuse_recorded_code(table, place / MANIFEST_FILE, trusted=given["trust-code"])
    return Config.from_table(table).with_options(parse_overrides(given.overrides))


def _checkpoint(place: Path, name: str | None) -> tuple[int, Path]:
    """Returns (step, folder) of the run's checkpoint ``name``, None for the newest."""
    finished = CheckpointFolder(place / "checkpoints", 1).finished()
    if not finished:
        raise ValueError(f"{place} holds no finished checkpoint; run.checkpoint_every writes some")
    step = max(finished) if name is None else int(name.removeprefix("step_"))
    if step not in finished:
        raise ValueError(
            f"--checkpoint={name} is none of {place}: it has {', '.join(p.name for p in finished.values())}"
        )
    return step, finished[step]
