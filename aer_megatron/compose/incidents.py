"""What becomes of an update that is not finite: kept on disk, then skipped or the end of the run (run.on_nonfinite)."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aer_megatron.actor.actor import Actor
from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.actor.nonfinite_findings import Diagnosis
from aer_megatron.config import Config
from aer_megatron.convert.hf_folder import read_hf_config
from aer_megatron.convert.hf_writer import write_hf_folder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.costs.memory import DTYPE_BYTES
from aer_megatron.costs.model_size import parameter_count
from aer_megatron.parallel.agreement import on_all_ranks, on_first_rank
from aer_megatron.parallel.platform import Platform
from aer_megatron.report.reproducer import (
    WEIGHTS_FOLDER,
    KeptUpdate,
    prune_reproducers,
    write_reproducer,
)
from aer_megatron.types import Experience, Float32Array, PolicyScores, StepStats, TrainBatch

_LOG = logging.getLogger(__name__)


class GuardedPolicy:
    """The run's policy, whose updates that are not finite are kept and, by option, skipped. See parts.Policy."""

    def __init__(self, actor: Actor, config: Config, platform: Platform) -> None:
        self._actor = actor
        self._config = config
        self._platform = platform
        self._skipped_in_a_row = 0
        self._skipped_at = -1  # updates applied before the last one that was skipped

    def score(self, experience: Experience, *, seed: int) -> PolicyScores:
        return self._actor.score(experience, seed=seed)

    def score_reference(self, experience: Experience) -> Float32Array:
        return self._actor.score_reference(experience)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._actor.hf_weights()

    def train(self, batch: TrainBatch, *, seed: int, entropy_gradient: bool) -> StepStats:
        """Returns the step's sums, without the updates that were skipped; every rank calls it.

        Raises:
            RuntimeError: on every rank with one message, where an update is not finite and ``run.on_nonfinite`` is
                "stop", or more than ``run.max_skipped_updates`` in a row were skipped.
        """
        step = seed - self._config.run.seed  # loop/phases.py seeds a step so
        update = KeptUpdate(step, seed, None, self._actor.num_updates, entropy_gradient, batch)
        if step == self._config.run.record_batch:
            self._say(self._keep(update, "recorded", {"diagnosis": None}))
        return self._actor.train(
            batch, seed=seed, entropy_gradient=entropy_gradient, report=partial(self._handle, update)
        )

    def _handle(self, update: KeptUpdate, diagnosis: Diagnosis) -> None:
        """Keeps the update's reproducer; raises RuntimeError where the run must end, else the update is skipped."""
        again = self._skipped_at == diagnosis.update
        self._skipped_in_a_row, self._skipped_at = self._skipped_in_a_row + 1 if again else 1, diagnosis.update
        update = dataclasses.replace(update, minibatch=diagnosis.minibatch, num_updates=diagnosis.update)
        kept = ""
        if self._config.run.keep_reproducers:
            table = dataclasses.asdict(diagnosis) | {"text": diagnosis.text()}
            kept = self._keep(update, "nonfinite", {"diagnosis": table}) + "; "
        what = (
            f"step {update.step}, mini-batch {diagnosis.minibatch}: the optimizer update is not finite and was not "
            f"applied: {diagnosis.text()}; {kept}"
        )
        limit = self._config.run.max_skipped_updates
        if self._config.run.on_nonfinite == "stop":
            raise RuntimeError(
                f"{what}resume from the last checkpoint, with a lower optimizer.lr or algo.entropy.alpha_max where the "
                "policy diverged, or with run.on_nonfinite=skip"
            )
        if self._skipped_in_a_row > limit:
            raise RuntimeError(
                f"{what}it is number {self._skipped_in_a_row} in a row, more than run.max_skipped_updates={limit}: "
                "the policy itself is damaged; resume from the last checkpoint"
            )
        self._say(f"{what}skipped, {self._skipped_in_a_row} in a row (run.max_skipped_updates={limit})")

    def _keep(self, update: KeptUpdate, kind: str, more: dict[str, Any]) -> str:
        """Returns where the update was kept, in words, or why it was not; the same on every rank, all of them call it.

        No failure to write it is worth the run: it is said.
        """
        parent = Path(self._config.run.output_dir) / kind
        final = parent / update.folder_name
        fresh = final.with_name(f"{final.name}.tmp-new")
        megabytes = parameter_count(self._actor.arch) * DTYPE_BYTES[self._config.model.dtype] / 1e6
        whole = megabytes <= self._config.run.reproducer_gb * 1e3
        weights_from = WEIGHTS_FOLDER if whole else self._other_weights()
        more = {**more, "ranks": self._platform.world_size, "weights": weights_from}

        def prepare() -> None:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            write_reproducer(fresh, update, self._config, more)

        def finish() -> None:
            shutil.rmtree(final, ignore_errors=True)
            fresh.rename(final)
            prune_reproducers(parent, max(1, self._config.run.keep_reproducers))

        def write_weights() -> None:
            weights = self._actor.hf_weights()
            try:
                if self._platform.rank == 0:
                    self._write_weights(fresh / WEIGHTS_FOLDER, weights)
            finally:
                for _ in weights:  # the ranks hand them over together, to the end, whatever the disk says
                    pass

        # each phase ends on all ranks together, with the failure of any of them
        first = partial(on_first_rank, rank=self._platform.rank, device=self._platform.device)
        try:
            first(prepare)
            if whole:
                on_all_ranks(write_weights, device=self._platform.device)
            first(finish)
        except (ValueError, RuntimeError) as failure:
            return f"its batch could not be kept in {final}: {failure}"
        without = "" if whole else f", without its {megabytes:,.0f} MB of weights (run.reproducer_gb)"
        return f"batch, seed and weights are in {final}{without}: aer replay-batch {final}"

    def _write_weights(self, folder: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
        specs = hf_specs(self._actor.arch, TORCH_DTYPES[self._config.model.dtype])
        write_hf_folder(folder, weights, specs, config=read_hf_config(Path(self._config.model.path)), like=None)

    def _other_weights(self) -> str:
        """The newest checkpoint of the run, or the policy that it began with: near the weights that are not kept."""
        folder = Path(self._config.run.output_dir) / "checkpoints"
        finished = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
        return str(max(finished, default=Path(self._config.model.path)))

    def _say(self, text: str) -> None:
        if self._platform.rank == 0:
            _LOG.warning("%s", text)
