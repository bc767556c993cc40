"""Makes optimizer updates, and no update that is not finite.

    micro-batches, loss --forward, backward--> sums, gradient norm --finite?--> the weights move
                                                     |
                                                     +--no--> the pass again under probes --> Diagnosis --> report

What is looked at is added over the ranks for its own sake: a good update costs no further collective and no further
synchronisation per micro-batch. This file does NOT know what the loss is or what becomes of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aer_megatron.actor.batching import MicroBatch
from aer_megatron.actor.forward import MicroBatchRunner
from aer_megatron.actor.nonfinite import Probe, uncounted_gradients
from aer_megatron.actor.nonfinite_findings import Diagnosis, Finding, nonfinite_sums, ordered
from aer_megatron.actor.optimizer import apply_gradients, gradient_norm
from aer_megatron.algo.loss import LossOutput
from aer_megatron.algo.statistics import LOSS_STATISTICS
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.parallel.exchange import all_sum
from aer_megatron.parallel.topology import Topology
from aer_megatron.types import PackedSequences, StepStats

# maps one micro-batch's scores [2, t] to its loss; tensors of the micro-batch are looked up by its packed places
LossFunction = Callable[[Tensor, Tensor, MicroBatch], LossOutput]
# hears of an update that is not finite, on every rank and before anything moves; returns to skip it, or raises
Report = Callable[[Diagnosis], None]
Sums = dict[str, tuple[float, float]]

POLICY_STATISTICS = ("policy_loss", "entropy_bonus", "token_entropy", "ratio", "clip_low", "clip_high", "approx_kl")


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer update that is about to be made."""

    minibatch: int
    micros: list[MicroBatch]
    loss: LossFunction
    bad_inputs: tuple[Finding, ...] = ()  # what makes it hopeless from the start
    reports: tuple[str, ...] = ()  # statistics of the loss beyond LOSS_STATISTICS


def stop(diagnosis: Diagnosis) -> None:
    """Raises RuntimeError with the diagnosis."""
    raise RuntimeError(f"optimizer update {diagnosis.update} is not finite and was not applied: {diagnosis.text()}")


class Updates:
    """The optimizer updates of an actor. ``num_updates`` counts those applied, resumed ones included."""

    def __init__(
        self,
        ddp: Sequence[Any],
        optimizer: Any,
        runner: MicroBatchRunner,
        schedule: Callable[[int], float],
        *,
        arch: ModelArchitecture,
        topology: Topology,
        device: torch.device,
    ) -> None:
        self.num_updates = 0
        self._ddp = list(ddp)
        self._chunks = [wrapped.module for wrapped in ddp]
        self._optimizer = optimizer
        self._runner = runner
        self._schedule = schedule
        self._arch = arch
        self._topology = topology
        self._device = device

    def make(
        self, updates: Iterable[Update], sequences: PackedSequences, report: Report, *, always: tuple[str, ...]
    ) -> StepStats:
        """Returns the sums of the updates, made one after the other; every rank calls it.

        ``sequences`` is the batch that places are named in, ``always`` the statistics that a step has even if none of
        its updates could be made.
        """
        totals: Sums = {}
        norms, rate, skipped = [], 0.0, 0
        for update in updates:
            rate = self._schedule(self.num_updates)
            sums, norm, seen = self._gradients(update)
            if seen:
                report(self._diagnose(update, seen, sequences))
                skipped += 1
                continue
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            apply_gradients(self._optimizer, norm)
            self.num_updates += 1
            norms.append(norm)
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        if not norms:
            totals = dict.fromkeys(always, (0.0, 0.0))
        mean_norm = float(np.mean(norms)) if norms else math.nan
        return StepStats(sums=totals, grad_norm=mean_norm, learning_rate=rate, updates_skipped=skipped)

    def _gradients(self, update: Update) -> tuple[Sums, float, str]:
        """Returns (sums, gradient norm, "") with the gradients ready, or what is not finite in the last place.

        Every rank returns the same: what is looked at has been added over ranks for its own sake.
        """
        if update.bad_inputs:
            return {}, math.nan, "the batch has values that are not finite"
        sums, faults = self._forward_backward(update)
        if bad := nonfinite_sums(sums):
            return sums, math.nan, f"sums over the batch: {', '.join(bad)}"
        norm = gradient_norm(self._optimizer)
        if not math.isfinite(norm):
            return sums, norm, f"gradient norm {norm}"
        return sums, norm, "a rank's own copy of a gradient is not finite" if faults else ""

    def _diagnose(self, update: Update, seen: str, sequences: PackedSequences) -> Diagnosis:
        """Returns where ``update`` stops being finite, from a second pass; every rank calls it. Gradients are gone."""
        probe = Probe(self._chunks, self._arch, self._topology, sequences)
        findings = list(update.bad_inputs)
        if any(finding.kind == "scored" for finding in findings):  # the policy made them: a forward pass shows how
            probe.parameters()
            with torch.no_grad(), probe.watching(update.micros):
                self._runner.forward_only(update.micros, probe.scores)
        elif not findings:
            probe.parameters()
            probe.gradients("first_gradient")

            def probed(logprob_t: Tensor, entropy_t: Tensor, micro: MicroBatch) -> LossOutput:
                def of_tokens(mask_t: NDArray[np.bool_]) -> LossOutput:
                    here = torch.from_numpy(mask_t).to(logprob_t.device)
                    return update.loss(logprob_t[here], entropy_t[here], micro.some_tokens(mask_t))

                probe.loss(of_tokens, micro)
                return update.loss(logprob_t, entropy_t, micro)

            with probe.watching(update.micros):
                self._pass(update.micros, probed, on_output=probe.scores)
            probe.gradients("gradient")
        findings += probe.findings(self._device)
        self._clear_gradients()
        return Diagnosis(self.num_updates, update.minibatch, seen, ordered(findings))

    def _clear_gradients(self) -> None:
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _forward_backward(self, update: Update) -> tuple[Sums, int]:
        """Returns the loss's sums over all ranks, and how many ranks' own copies of gradients are not finite."""
        return self._sum_over_ranks(self._pass(update.micros, update.loss), names=(*LOSS_STATISTICS, *update.reports))

    def _pass(
        self,
        micros: list[MicroBatch],
        loss: LossFunction,
        *,
        on_output: Callable[[Tensor, MicroBatch], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns each micro-batch's sums, on last stages; gradients are in the buffers."""
        self._clear_gradients()

        def finish(output_2t: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
            if on_output is not None:
                on_output(output_2t, micro)
            result = loss(output_2t[0], output_2t[1], micro)
            num_tokens = torch.tensor(len(micro.row_t), dtype=torch.int, device=self._device)
            return result.loss, num_tokens, dict(result.sums)

        return self._runner.forward_backward(micros, finish)

    def _sum_over_ranks(self, collected: list[dict[str, Any]], names: Sequence[str]) -> tuple[Sums, int]:
        """Adds (sum, count) pairs of ``names`` over micro-batches and ranks; each token is spoken for by one rank.

        The same exchange counts the ranks on which a gradient that the global norm leaves out is not finite.
        """
        local = np.zeros((len(names) + 1, 2), dtype=np.float64)
        if self._topology.writes_results:
            for sums in collected:
                for name, (total, count) in sums.items():
                    local[names.index(name)] += (float(total), float(count))
        own = uncounted_gradients(self._chunks, self._topology)
        if own and not math.isfinite(float(torch.nn.utils.get_total_norm(own))):
            local[-1] = (1.0, 1.0)
        summed = all_sum(local, device=self._device).tolist()
        named = zip(names, summed[:-1], strict=True)
        return {name: (row[0], row[1]) for name, row in named if row[1]}, int(summed[-1][0])
