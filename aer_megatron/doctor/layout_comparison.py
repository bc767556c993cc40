"""The batch that the doctor measures with, and the comparison of what different layouts made of it.

Shape suffixes: B sequences, T packed sampled tokens, L packed prompt + response tokens, C buckets of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aer_megatron.actor.batching import offsets, sampled_positions
from aer_megatron.algo.experience import pack_groups
from aer_megatron.doctor.diagnosis import Check, PositionProfile, bounded, compared
from aer_megatron.types import (
    Completion,
    Experience,
    Float32Array,
    Float64Array,
    Int64Array,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    TrainBatch,
    Verdict,
    VersionSpan,
)

_BUCKETS = 256
_SIGNS = 65_537  # a prime, so that signs and buckets do not repeat together
_CHUNK = 1 << 24
_OFFSET = 0.09  # old log-probabilities differ from the policy's by less: inside every usual clip range


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far apart two numbers may be, by the training dtype; docs/doctor.md says why."""

    layout: float  # relative: loss, entropy and gradient norm of two layouts
    layout_logprob: float  # nats, the largest difference of a token
    step: float  # relative to the length of the step: the difference of two steps
    model: float  # relative: loss and entropy against fp32 transformers
    model_gradient: float  # relative
    model_logprob: float  # nats, mean over tokens
    rollout_max: float  # nats
    rollout_mean: float  # nats


TOLERANCES: Mapping[str, Tolerances] = {
    "fp32": Tolerances(1e-5, 1e-4, 3e-5, 1e-4, 1e-4, 1e-4, 1e-3, 1e-4),
    "bf16": Tolerances(2e-2, 0.5, 0.1, 2e-2, 5e-2, 5e-2, 1.0, 5e-2),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one layout makes of the batch. ``step_C`` holds a sketch of every tensor's step, on rank 0 alone."""

    name: str
    axes: frozenset[str]
    logprob_T: Float32Array
    token_entropy_T: Float32Array
    loss: float
    token_entropy: float
    grad_norm: float
    step_C: Mapping[str, Float64Array]


@dataclass(frozen=True, slots=True)
class Truth:
    """What transformers makes of the same batch in fp32."""

    logprob_T: Float32Array
    token_entropy: float
    loss: float
    grad_norm: float


def probe_experience(*, num_sequences: int, vocab_size: int, longest: int, seed: int) -> Experience:
    """Returns ragged random tokens, two responses to a prompt; every second prompt has one token, the first response
    ends at ``longest``.

    After a prompt of one token the first response token is predicted by a position that sees nothing but itself.
    """
    rng = np.random.default_rng(seed)
    short = max(2, min(24, longest))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, count).tolist())

    groups = []
    for index in range(num_sequences // 2):
        prompt = tokens(1 if index % 2 == 0 else int(rng.integers(1, max(1, short // 3) + 1)))
        lengths = rng.integers(1, short - len(prompt) + 1, 2).tolist()
        responses = [tokens(longest - 1 if index == place == 0 else length) for place, length in enumerate(lengths)]
        completions = tuple(
            Completion(response, (0.0,) * len(response), "stop", (VersionSpan(0, 0, len(response)),))
            for response in responses
        )
        group = RolloutGroup(Prompt(index, "", prompt, "", ""), completions)
        groups.append(ScoredGroup(group, (Verdict(0.0, "unscored"),) * len(completions)))
    return pack_groups(groups)


def probe_batch(experience: Experience, logprob_T: Float32Array, *, seed: int) -> TrainBatch:
    """Returns ``experience`` with advantages and entropy weights, and old log-probabilities close to ``logprob_T``.

    Advantages are mostly positive, so that the loss is no small difference of large numbers.
    """
    rng = np.random.default_rng(seed + 1)
    offset_T = rng.uniform(-_OFFSET, _OFFSET, len(logprob_T))
    advantage_B = rng.uniform(0.5, 1.5, experience.num_sequences)
    advantage_B[3::4] *= -1.0
    return TrainBatch(
        experience=experience,
        advantage_B=advantage_B,
        entropy_weight_B=rng.uniform(0.0, 0.5, experience.num_sequences),
        old_logprob_T=(logprob_T + offset_T).astype(np.float32),
    )


def positions(experience: Experience) -> Int64Array:
    """Returns, for every sampled token, the position (from 0) that predicts it, [T]."""
    start_L = offsets(experience.length_B).tolist()
    return np.concatenate([sampled_positions(experience, index, start) - 1 for index, start in enumerate(start_L)])


def position_profile(experience: Experience, logprob_T: Float32Array, reference_T: Float32Array) -> PositionProfile:
    """Returns the mean |difference| on tokens predicted by the first position, and by later ones; NaN without any."""
    first_T = positions(experience) == 0
    error_T = np.abs(logprob_T.astype(np.float64) - reference_T)
    first = float(error_T[first_T].mean()) if first_T.any() else float("nan")
    return PositionProfile(first, float(error_T[~first_T].mean()) if (~first_T).any() else float("nan"))


def tensor_sketch(tensor: Tensor) -> Float64Array:
    """Returns float64 [C]: a linear map of the tensor whose squared length is, on average, the tensor's (count sketch).

    Two steps of a large model can so be compared without keeping either: the standard deviation of the squared length
    is sqrt(2 / C), 9 %.
    """
    flat = tensor.detach().reshape(-1)
    generator = torch.Generator().manual_seed(_SIGNS)
    sign = (torch.randint(0, 2, (_SIGNS,), generator=generator) * 2 - 1).to(device=flat.device, dtype=torch.float64)
    bucket = torch.randint(0, _BUCKETS, (_SIGNS,), generator=generator).to(flat.device)
    total = torch.zeros(_BUCKETS, dtype=torch.float64, device=flat.device)
    chunk = _CHUNK // _SIGNS * _SIGNS
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk].double()
        folded = torch.nn.functional.pad(part, (0, -part.numel() % _SIGNS)).view(-1, _SIGNS)
        first = start // _SIGNS
        row_sign = sign[(torch.arange(first, first + len(folded), device=flat.device) * 7919) % _SIGNS]
        total.index_add_(0, bucket, (row_sign @ folded) * sign)
    result: Float64Array = total.cpu().numpy()
    return result


def choose_anchor(measurements: Sequence[Measurement], truth: Truth | None) -> int:
    """Returns the index of the layout that the others are compared with.

    With ``truth`` the one closest to it, without it the one closest to all others (the majority is believed).
    """

    def numbers(item: Measurement | Truth) -> Float64Array:
        return np.array([item.loss, item.token_entropy, item.grad_norm])

    def distance(item: Measurement, other: Measurement | Truth) -> float:
        expected = numbers(other)
        return float((np.abs(numbers(item) - expected) / np.maximum(np.abs(expected), 1e-30)).sum())

    def cost(item: Measurement) -> float:
        return distance(item, truth) if truth else sum(min(distance(item, other), 1.0) for other in measurements)

    return min(range(len(measurements)), key=lambda index: cost(measurements[index]))


def compare_layouts(
    measurements: Sequence[Measurement], anchor: Measurement, tolerances: Tolerances
) -> tuple[list[Check], dict[str, tuple[str, ...]]]:
    """Returns (rows of every layout against ``anchor``, the tensors whose step differs by layout, worst first)."""
    rows: list[Check] = []
    moved: dict[str, tuple[str, ...]] = {}
    for item in measurements:
        for measure, value, expected in (
            ("loss", item.loss, anchor.loss),
            ("token entropy", item.token_entropy, anchor.token_entropy),
            ("gradient norm", item.grad_norm, anchor.grad_norm),
        ):
            rows.append(compared("layouts", measure, item.name, value, expected, tolerance=tolerances.layout))
        if item is anchor:
            continue
        largest = float(np.abs(item.logprob_T.astype(np.float64) - anchor.logprob_T).max())
        rows.append(bounded("layouts", "log-probability, max", item.name, largest, bound=tolerances.layout_logprob))
        difference, worst = _step_difference(item.step_C, anchor.step_C, tolerances.step)
        rows.append(bounded("layouts", "step", item.name, difference, bound=tolerances.step))
        if worst:
            moved[item.name] = worst
    return rows, moved


def compare_with_truth(item: Measurement, truth: Truth, tolerances: Tolerances) -> list[Check]:
    """Returns the rows of one layout against transformers."""
    error = float(np.abs(item.logprob_T.astype(np.float64) - truth.logprob_T).mean())
    return [
        bounded("transformers", "log-probability, mean", item.name, error, bound=tolerances.model_logprob),
        compared("transformers", "loss", item.name, item.loss, truth.loss, tolerance=tolerances.model),
        compared(
            "transformers", "token entropy", item.name, item.token_entropy, truth.token_entropy,
            tolerance=tolerances.model,
        ),
        compared(
            "transformers", "gradient norm", item.name, item.grad_norm, truth.grad_norm,
            tolerance=tolerances.model_gradient,
        ),
    ]  # fmt: skip


def _step_difference(
    step_C: Mapping[str, Float64Array], anchor_C: Mapping[str, Float64Array], tolerance: float
) -> tuple[float, tuple[str, ...]]:
    """Returns (|step - anchor's| / |anchor's|, tensors beyond ``tolerance`` of their own, worst first)."""
    if not anchor_C:  # only rank 0 keeps them
        return 0.0, ()
    distance = {name: float(np.linalg.norm(step_C[name] - anchor_C[name])) for name in anchor_C}
    length = {name: float(np.linalg.norm(anchor_C[name])) for name in anchor_C}
    total = float(np.linalg.norm(list(length.values())))
    beyond = [name for name in distance if distance[name] > tolerance * max(length[name], 1e-3 * total)]
    beyond.sort(key=lambda name: distance[name], reverse=True)
    return float(np.linalg.norm(list(distance.values()))) / max(total, 1e-30), tuple(beyond)
