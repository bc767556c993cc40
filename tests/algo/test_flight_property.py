"""Laws of the flight recorder: sums add over any cut of the batch, bins keep every token, norms obey Cauchy-Schwarz."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.advantage import group_advantages
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.experience import num_groups, select_groups
from aer_megatron.algo.flight import BUCKETS, BucketSums, bucket_means, profile_batch
from aer_megatron.types import Experience, PolicyScores


@st.composite
def batches(draw: st.DrawFn) -> tuple[Experience, PolicyScores]:
    seed = draw(st.integers(0, 2**32 - 1))
    prompts, group = draw(st.integers(1, 8)), draw(st.integers(2, 6))
    rng = np.random.default_rng(seed)
    group_B = np.repeat(np.arange(prompts), group)
    length_B = rng.integers(1, 40, prompts * group)
    num_tokens = int(length_B.sum())
    probability = rng.dirichlet(np.ones(5), num_tokens)
    label = rng.integers(0, 5, num_tokens)
    logp = np.log(probability)
    entropy = -(probability * logp).sum(-1)
    by_logprob = -probability
    by_logprob[np.arange(num_tokens), label] += 1
    by_entropy = -probability * (logp + entropy[:, None])
    columns = [logp[np.arange(num_tokens), label], entropy, (by_logprob**2).sum(-1), (by_entropy**2).sum(-1)]
    columns.append((by_logprob * by_entropy).sum(-1))
    experience = Experience(
        prompt_id_B=group_B.astype(np.uint64),
        group_index_B=group_B,
        prompt_length_B=np.ones_like(length_B),
        response_length_B=length_B,
        token_ids_L=np.zeros(num_tokens + len(length_B), dtype=np.int64),
        rollout_logprob_T=np.zeros(num_tokens, dtype=np.float32),
        reward_B=(rng.random(len(length_B)) < rng.random(prompts)[group_B]).astype(np.float64),
        truncated_B=np.zeros(len(length_B), dtype=bool),
        policy_version_B=np.zeros_like(length_B),
        policy_version_sum_B=np.zeros_like(length_B),
    )
    return experience, PolicyScores(*(column.astype(np.float32) for column in columns))


@settings(max_examples=40)
@given(batches(), st.integers(0, 255))
def test_sums_and_histograms_add_over_any_cut_of_the_batch(batch, mask):
    experience, scores = batch
    advantages = group_advantages(experience, Grpo())
    allocation_P = 1.0 - advantages.accuracy_P
    whole = profile_batch(experience, scores, advantages, allocation_P)
    keep_P = np.array([bool(mask >> p & 1) for p in range(num_groups(experience))])
    added: dict[str, np.ndarray] = {}
    histograms = np.zeros_like(whole.entropy_by_difficulty_DK)
    for part_P in (keep_P, ~keep_P):
        if not part_P.any():
            continue
        part = select_groups(experience, part_P)
        part_T = np.repeat(part_P[experience.group_index_B], experience.response_length_B)
        part_scores = PolicyScores(scores.logprob_T[part_T], scores.token_entropy_T[part_T])
        profile = profile_batch(part, part_scores, group_advantages(part, Grpo()), allocation_P[part_P])
        histograms += profile.entropy_by_difficulty_DK
        for field in dataclasses.fields(BucketSums):
            added[field.name] = added.get(field.name, 0) + getattr(profile.buckets, field.name)
    np.testing.assert_array_equal(histograms, whole.entropy_by_difficulty_DK)
    for name, value in added.items():
        np.testing.assert_allclose(value, getattr(whole.buckets, name), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(batches())
def test_every_token_is_counted_once_and_means_rebuild_the_batch(batch):
    experience, scores = batch
    advantages = group_advantages(experience, Grpo())
    profile = profile_batch(experience, scores, advantages, np.ones(num_groups(experience)))
    np.testing.assert_array_equal(profile.entropy_by_difficulty_DK.sum(1), profile.buckets.tokens_D)
    assert profile.entropy_by_position_QK.sum() == experience.num_sampled_tokens
    assert profile.entropy_by_position_QK[0].sum() == experience.num_sequences  # one first token each
    means = bucket_means(profile.buckets, 0.5)
    assert list(means) == [name for name in BUCKETS if name in means]
    total = sum(row["token_entropy"] * row["tokens"] for row in means.values())
    np.testing.assert_allclose(total, scores.token_entropy_T.sum(dtype=np.float64), rtol=1e-9)
    assert sum(row["prompts"] for row in means.values()) == num_groups(experience)
    assert means.get("unsolved", {}).get("reward", 0) == 0
    assert all(row["coefficient"] == 0.5 and np.isfinite(list(row.values())).all() for row in means.values())


@settings(max_examples=40)
@given(batches(), st.floats(0.1, 10))
def test_the_cosine_is_one_of_directions(batch, scale):
    experience, scores = batch
    advantages = group_advantages(experience, Grpo())
    allocation_P = 1.0 - advantages.accuracy_P
    geometry = profile_batch(experience, scores, advantages, allocation_P).gradients
    scaled = profile_batch(experience, scores, advantages, scale * allocation_P).gradients
    assert geometry is not None and scaled is not None
    np.testing.assert_allclose(scaled.entropy_norm, scale * geometry.entropy_norm, rtol=1e-9)
    assert scaled.policy_norm == geometry.policy_norm
    assert (geometry.cosine is None) == (geometry.policy_norm == 0 or geometry.entropy_norm == 0)
    if geometry.cosine is not None and scaled.cosine is not None:
        assert abs(geometry.cosine) <= 1
        np.testing.assert_allclose(scaled.cosine, geometry.cosine, rtol=1e-9, atol=1e-12)
