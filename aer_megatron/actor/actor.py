"""The policy in training: scores batches, takes optimizer steps, hands out its weights.

    Experience --score--> PolicyScores          (forward only)
    Experience --score_reference--> logprob_T   (forward only, with the reference weights in place)
    TrainBatch --train--> StepStats             (num_minibatches optimizer steps)
    SupervisedBatch --train_supervised--> StepStats

Every rank calls every method with the same arguments and gets the same result. Micro-batches run through
Megatron-Core's own forward-backward schedules (forward.py). This file does NOT know where batches come from or where
weights go.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from numpy.typing import NDArray
from torch import Tensor

from aer_megatron.actor.batching import MicroBatch, minibatch_indices
from aer_megatron.actor.forward import MicroBatchRunner
from aer_megatron.actor.fp8_emulation import has_fresh_scales
from aer_megatron.actor.model import ModelOptions, build_chunks
from aer_megatron.actor.nonfinite_findings import nonfinite_inputs
from aer_megatron.actor.optimizer import build_optimizer, learning_rate, wrap_distributed
from aer_megatron.actor.reference import ReferenceWeights
from aer_megatron.actor.updates import POLICY_STATISTICS, LossFunction, Report, Update, Updates, stop
from aer_megatron.actor.weights import iter_hf_weights, load_hf_weights
from aer_megatron.algo.correction import Correction, correction
from aer_megatron.algo.loss import (
    LossOutput,
    TokenData,
    policy_loss,
    sequence_log_ratios,
    sequence_weights,
    supervised_loss,
)
from aer_megatron.config import Config
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.options.training import OptimizerSection
from aer_megatron.parallel.exchange import all_sum_disjoint, all_sum_within
from aer_megatron.parallel.topology import Topology
from aer_megatron.types import (
    BoolArray,
    Experience,
    Float32Array,
    Int64Array,
    PackedSequences,
    PolicyScores,
    StepStats,
    SupervisedBatch,
    TrainBatch,
)


class Actor:
    """A sharded policy with its optimizer. ``num_updates`` counts optimizer steps taken, resumed ones included.

    ``chunks`` are this rank's parts of the model, several where the pipeline is interleaved; ``ddp`` wraps them.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        config: Config,
        topology: Topology,
        *,
        device: torch.device,
        optimizer: OptimizerSection,
        num_updates_planned: int,
    ) -> None:
        self.arch = arch
        self.topology = topology
        self.device = device
        self._config = config
        self._reference: ReferenceWeights | None = None
        self.chunks = [chunk.to(device) for chunk in build_chunks(arch, model_options(config), topology)]
        self.ddp = wrap_distributed(self.chunks)
        self.optimizer = build_optimizer(self.ddp, optimizer, config.model.dtype)
        megatron_config = self.chunks[0].config  # the chunks' common one
        megatron_config.finalize_model_grads_func = _finalize_without_scaling
        megatron_config.grad_scale_func = self.optimizer.scale_loss if config.model.dtype == "bf16" else None
        self._runner = MicroBatchRunner(self.ddp, arch=arch, options=config.parallel, topology=topology, device=device)
        schedule = functools.partial(learning_rate, num_steps=num_updates_planned, options=optimizer)
        self._updates = Updates(
            self.ddp, self.optimizer, self._runner, schedule, arch=arch, topology=topology, device=device
        )

    @property
    def num_updates(self) -> int:
        return self._updates.num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._updates.num_updates = value

    @property
    def model(self) -> torch.nn.Module:
        """All of this rank's parameters as one module: the only chunk itself, or the list of several."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.nn.ModuleList(self.chunks)

    def load_hf_weights(self, get: Callable[[str], Tensor]) -> None:
        """Copies Hugging Face tensors in and resets the optimizer's main parameters to them."""
        load_hf_weights(self.chunks, self.arch, self.topology, get)
        self.optimizer.reload_model_params()

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, whole tensor) on every rank; all ranks must exhaust it together."""
        bucket_bytes = self._config.parallel.weight_bucket_mb * 10**6
        yield from iter_hf_weights(self.chunks, self.arch, self.topology, bucket_bytes=bucket_bytes)

    def hold_reference(self, get: Callable[[str], Tensor]) -> None:
        """Keeps a frozen copy of Hugging Face tensors for ``score_reference``; the policy's own weights stay."""
        load = functools.partial(load_hf_weights, self.chunks, self.arch, self.topology, get)
        self._reference = ReferenceWeights(self.model.parameters(), load)

    def score_reference(self, experience: Experience) -> Float32Array:
        """Returns the log-probability of every sampled token under the reference weights, fp32 [T]."""
        assert self._reference is not None, "hold_reference comes first"
        with self._reference.in_place():
            return self.score(experience).logprob_T

    def score(self, experience: Experience, *, seed: int | None = None) -> PolicyScores:
        """Returns log-probability and exact entropy of every sampled token under the current weights.

        With ``seed`` the batch is cut into micro-batches as ``train`` cuts it with that seed, so that the first
        update's probability ratios are 1 to the last bit: a kernel's rounding, and an FP8 scale even more, may depend
        on what else is in a micro-batch.
        """
        num_parts = self._config.algo.num_minibatches if seed is not None else 1
        parts = minibatch_indices(experience.num_sequences, num_parts, seed or 0)
        first, *others = (self._score(experience, part) for part in parts)
        return PolicyScores(*sum(others, start=first))

    @torch.no_grad()
    def _score(self, experience: Experience, indices_b: Int64Array) -> Float32Array:
        """Returns log-probability, entropy and, with a flight recorder, the gradients' geometry of ``indices_b``.

        The rows [2 or 5, T] are the fields of ``PolicyScores``; tokens of other sequences are 0.
        """
        num_rows = 5 if self._config.report.flight_recorder else 2
        scores_KT = torch.zeros(num_rows, experience.num_sampled_tokens, dtype=torch.float32, device=self.device)

        def collect(output_Kt: Tensor, micro: MicroBatch) -> None:
            if self.topology.writes_results:
                scores_KT[:, torch.from_numpy(micro.packed_t).to(self.device)] = output_Kt

        micros = self._micro_batches(experience, indices_b)
        self._calibrate_fp8(micros)
        self._runner.forward_only(micros, collect)
        result: Float32Array = all_sum_disjoint(scores_KT).cpu().numpy()
        return result

    def _calibrate_fp8(self, micros: list[MicroBatch]) -> None:
        """Has delayed FP8 scales found before anything is measured: the second pass runs under the first one's."""
        if has_fresh_scales(self.model, self.chunks[0].config):
            with torch.enable_grad():  # scales move only in passes with gradients
                for _ in range(2):
                    self._runner.forward_only(micros, lambda *_: None)

    def train(
        self,
        batch: TrainBatch,
        *,
        seed: int,
        entropy_gradient: bool,
        report: Report = stop,
        minibatch: int | None = None,
    ) -> StepStats:
        """Returns the sums of ``num_minibatches`` policy updates; the weights have moved when it returns.

        ``entropy_gradient`` says whether the rule in force ever needs the entropy's gradient; it is never inferred
        from a coefficient that happens to be zero. An update that is not finite goes to ``report`` and, if that
        returns, is left out: weights, optimizer and ``num_updates`` stay as they are. ``minibatch`` is the only one of
        the updates that is made, all of them without it.
        """
        updates = self._all_updates(batch, seed=seed, entropy_gradient=entropy_gradient)
        chosen = (update for update in updates if minibatch in (None, update.minibatch))
        return self._updates.make(chosen, batch.experience, report, always=POLICY_STATISTICS)

    def train_supervised(self, batch: SupervisedBatch, *, report: Report = stop) -> StepStats:
        """Returns the sums of one supervised update over the tokens that carry loss; ``report`` as in ``train``."""
        normalizer = float(batch.num_sampled_tokens)

        def loss(logprob_t: Tensor, entropy_t: Tensor, micro: MicroBatch) -> LossOutput:
            del entropy_t, micro
            return supervised_loss(logprob_t, normalizer=normalizer)

        indices = np.arange(batch.num_sequences, dtype=np.int64)
        update = Update(0, self._micro_batches(batch, indices), loss)
        return self._updates.make([update], batch, report, always=("supervised_loss",))

    def _all_updates(self, batch: TrainBatch, *, seed: int, entropy_gradient: bool) -> Iterator[Update]:
        """Yields the updates of a batch one by one: the selection of tokens sees the updates before its own."""
        parts = minibatch_indices(batch.experience.num_sequences, self._config.algo.num_minibatches, seed)
        experience = batch.experience
        corrected = correction(
            batch.old_logprob_T, experience.rollout_logprob_T, experience.sampled_length_B, self._config.correction
        )
        for index, indices in enumerate(parts):
            bad = tuple(nonfinite_inputs(batch, indices))
            selected_T = None if bad else self._select_tokens(batch, indices, seed=seed, moved=index > 0)
            micros, loss = self._policy_update(batch, indices, selected_T, corrected, entropy_gradient=entropy_gradient)
            yield Update(index, micros, loss, bad, self._config.algo.policy_loss.reports)

    def _select_tokens(self, batch: TrainBatch, indices_b: Int64Array, *, seed: int, moved: bool) -> BoolArray | None:
        """Returns bool [T], the tokens of a mini-batch that the policy loss selects, or None where it selects none.

        The rule needs the whole mini-batch's log-probabilities before the first micro-batch has a gradient: a forward
        pass of its own, except where the weights have not moved since ``old_logprob_T`` was scored.
        """
        experience, rule = batch.experience, self._config.algo.policy_loss
        if not rule.selects:
            return None
        logprob_T = self._score(experience, indices_b)[0] if moved else batch.old_logprob_T
        member_B = np.zeros(experience.num_sequences, dtype=np.bool_)
        member_B[indices_b] = True
        member_T = np.repeat(member_B, experience.sampled_length_B)
        selected_T = np.zeros_like(member_T)
        selected_T[member_T] = rule.select(
            np.repeat(batch.advantage_B, experience.sampled_length_B)[member_T],
            logprob_T[member_T],
            batch.old_logprob_T[member_T],
            key=(seed, self.num_updates),
        )
        return selected_T

    def _policy_update(
        self,
        batch: TrainBatch,
        indices_b: Int64Array,
        selected_T: BoolArray | None,
        corrected: Correction | None,
        *,
        entropy_gradient: bool,
    ) -> tuple[list[MicroBatch], LossFunction]:
        algo = self._config.algo
        length_b = (corrected.counted_length_B if corrected else batch.experience.sampled_length_B)[indices_b]
        weight_B = np.zeros(batch.experience.num_sequences)
        counted_b = length_b > 0  # a sequence that a correction left no token is none
        weight_B[indices_b[counted_b]] = sequence_weights(
            length_b[counted_b], rule=algo.normalizer, max_new_tokens=self._config.rollout.max_new_tokens
        )

        def loss(logprob_t: Tensor, entropy_t: Tensor, micro: MicroBatch) -> LossOutput:
            tokens = self._token_data(batch, micro, weight_B, selected_T, corrected)
            if algo.policy_loss.of_sequences:
                tokens = self._with_sequence_ratios(tokens, logprob_t, micro, batch.experience)
            return policy_loss(
                logprob_t,
                entropy_t if entropy_gradient else entropy_t.detach(),
                tokens=tokens,
                normalizer=max(float(length_b.sum()), 1.0),  # a correction may reject every token
                config=algo,
            )

        return self._micro_batches(batch.experience, indices_b), loss

    def _token_data(
        self,
        batch: TrainBatch,
        micro: MicroBatch,
        weight_B: NDArray[Any],
        selected_T: BoolArray | None,
        corrected: Correction | None,
    ) -> TokenData:
        def of_tokens(values_T: NDArray[Any]) -> Tensor:
            return self._float_tensor(values_T[micro.packed_t])

        def of_sequences(values_B: NDArray[Any]) -> Tensor:
            return self._float_tensor(values_B[micro.sequence_t])

        return TokenData(
            old_logprob_T=of_tokens(batch.old_logprob_T),
            advantage_T=of_sequences(batch.advantage_B),
            entropy_weight_T=of_sequences(batch.entropy_weight_B),
            mean_weight_T=of_sequences(weight_B) * (of_tokens(corrected.counted_T) if corrected else 1.0),
            importance_T=of_tokens(corrected.weight_T) if corrected else None,
            selected_T=None if selected_T is None else of_tokens(selected_T) > 0,
            ref_logprob_T=None if batch.ref_logprob_T is None else of_tokens(batch.ref_logprob_T),
        )

    def _with_sequence_ratios(
        self, tokens: TokenData, logprob_t: Tensor, micro: MicroBatch, sequences: PackedSequences
    ) -> TokenData:
        """Adds the ratios of whole sequences, which context-parallel ranks hold in parts; they call it together."""
        group = self.topology.cp_group if micro.is_whole else None
        ratio_t = sequence_log_ratios(
            logprob_t,
            tokens.old_logprob_T,
            sequence_T=torch.from_numpy(micro.sequence_t).to(self.device),
            length_B=torch.from_numpy(sequences.sampled_length_B).to(self.device),
            add=functools.partial(all_sum_within, group=group),
        )
        return dataclasses.replace(tokens, sequence_log_ratio_T=ratio_t)

    def _micro_batches(self, sequences: PackedSequences, indices_b: Int64Array) -> list[MicroBatch]:
        return self._runner.cut(sequences, indices_b)

    def _float_tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.device)


def _finalize_without_scaling(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by tokens: the loss carries the global normaliser."""
    del num_tokens
    finalize_model_grads(model, None, **kwargs)


def model_options(config: Config) -> ModelOptions:
    """Returns what the run file says of the policy's model."""
    return ModelOptions(
        dtype=config.model.dtype,
        sequence_parallel=config.parallel.sequence_parallel,
        vocab_multiple=config.model.vocab_multiple,
        megatron=config.megatron,
        head=config.model.head,
        temperature=config.rollout.temperature,
        score_statistics=config.report.flight_recorder,
    )
