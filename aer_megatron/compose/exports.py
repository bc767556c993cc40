"""The policy as Hugging Face folders, RUN/export/step_N (``run.export_every``): for transformers, SGLang, the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.config import Config
from aer_megatron.convert.hf_folder import read_hf_config
from aer_megatron.convert.hf_writer import config_with_dtype, copy_extra_files, fill_hf_folder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.files.new_folder import new_folder, remove_folder
from aer_megatron.files.whole_files import replace_file
from aer_megatron.parallel.agreement import on_all_ranks
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.model_card import CARD_FILE, model_card
from aer_megatron.report.timer import PhaseTimer
from aer_megatron.report.writer import METRICS_FILE, package_versions, read_metrics

_LOG = logging.getLogger(__name__)
EXPORT_FOLDER = "export"  # below run.output_dir
_GENERATION_FILE = "generation_config.json"


class Exports:
    """Writes the policy of one run; what cannot be written is said and costs the folder, never the run."""

    def __init__(self, config: Config, actor: Actor, platform: Platform, timer: PhaseTimer) -> None:
        self._config = config
        self._actor = actor
        self._platform = platform
        self._timer = timer
        self._written: dict[int, Path] = {}

    def write(self, step: int) -> None:
        """Writes the policy after ``step`` steps, in the place of what an earlier launch left there; on every rank.

        Nothing is written but at steps that ``run.export_every`` divides, and at the last one.
        """
        run = self._config.run
        if not run.export_every or (step % run.export_every and step != run.num_steps):
            return
        target = Path(self._config.run.output_dir) / EXPORT_FOLDER / f"step_{step:08d}"
        try:
            with self._timer.phase("checkpoint"):
                on_all_ranks(partial(self._write, target, step), device=self._platform.device)
        except (ValueError, RuntimeError) as failure:
            if self._platform.rank == 0:
                _LOG.error("EXPORT OF STEP %d NOT WRITTEN: %s; training goes on", step, failure)
        else:
            self._written[step] = target
            self.write_cards()

    def write_cards(self) -> None:
        """Writes the model cards anew: the evaluation of a policy comes after its weights."""
        if self._platform.rank != 0:
            return
        try:
            for step, folder in self._written.items():
                if folder.is_dir():
                    replace_file(folder / CARD_FILE, self._card(step))
        except (OSError, ValueError) as failure:
            _LOG.warning("the model cards could not be written: %s", failure)

    def _write(self, target: Path, step: int) -> None:
        weights = self._actor.hf_weights()
        try:
            if self._platform.rank == 0:
                self._fill(target, weights, step)
        finally:
            for _ in weights:  # the ranks hand them over together, to the end, whatever the disk says
                pass

    def _fill(self, target: Path, weights: Iterator[tuple[str, Tensor]], step: int) -> None:
        base, dtype = Path(self._config.model.path), TORCH_DTYPES[self._config.model.dtype]
        hf_config = config_with_dtype(read_hf_config(base), dtype)
        if target.exists():
            remove_folder(target)
        with new_folder(target) as work:
            fill_hf_folder(work, weights, hf_specs(self._actor.arch, dtype), config=hf_config)
            copy_extra_files(base, work)
            if not (work / _GENERATION_FILE).exists():
                (work / _GENERATION_FILE).write_text(json.dumps(self._generation(hf_config), indent=2) + "\n")
            (work / CARD_FILE).write_text(self._card(step), encoding="utf-8")

    def _generation(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """Returns how rollouts were sampled, for a base model that does not say how it wants to be."""
        rollout = self._config.rollout
        sampling = {name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k")}
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return (
            {"do_sample": True} | sampling | {name: hf_config[name] for name in ids if hf_config.get(name) is not None}
        )

    def _card(self, step: int) -> str:
        records = read_metrics(Path(self._config.run.output_dir) / METRICS_FILE)
        version = package_versions(["aer-megatron"])["aer-megatron"] or "from source"
        return model_card(self._config, records, step=step, version=version)
