"""Buckets, histograms, gradient geometry and replay: numbers by hand, brute force in float64, laws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.advantage import AdvantageResult, group_advantages
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.controller import ControllerState, Observation
from aer_megatron.algo.entropy import logprob_entropy
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.skywork import Skywork
from aer_megatron.algo.experience import num_groups, select_groups
from aer_megatron.algo.flight import (
    BUCKETS,
    ENTROPY_EDGES,
    BatchProfile,
    BucketSums,
    FlightRecord,
    bucket_means,
    difficulty_buckets,
    entropy_histogram_rows,
    gradient_geometry,
    position_bins,
    profile_batch,
    replay,
    replayed_difficulty,
)
from aer_megatron.types import Experience, PolicyScores


def names(successes: list[int], counts: list[int]) -> list[str]:
    return [BUCKETS[index] for index in difficulty_buckets(np.array(successes), np.array(counts))]


def test_buckets_are_cut_at_one_and_two_thirds_exactly():
    assert names([0, 1, 2, 3, 4, 5, 6], [6] * 7) == ["unsolved", "hard", "hard", "medium", "easy", "easy", "easy"]
    # 1/3 and 2/3 for sizes whose quotient rounds either way; one rollout more or less is the next bucket
    for third in (1, 2, 5, 7, 29, 1001):
        size = 3 * third
        assert names([third, third + 1, 2 * third - 1, 2 * third], [size] * 4)[0] == "hard"
        assert names([2 * third], [size]) == ["easy"]
        if third > 2:
            assert names([third + 1, 2 * third - 1], [size] * 2) == ["medium", "medium"]
    assert names([0, 1], [1, 1]) == ["unsolved", "easy"]
    assert names([0, 2, 3, 5, 6, 8], [8] * 6) == ["unsolved", "hard", "medium", "medium", "easy", "easy"]


@pytest.mark.parametrize(("successes", "counts"), [([3], [2]), ([-1], [2]), ([0], [0]), ([1, 1], [2])])
def test_impossible_counts_are_refused(successes: list[int], counts: list[int]):
    with pytest.raises(ValueError, match="successes_P"):
        difficulty_buckets(np.array(successes), np.array(counts))


def test_positions_are_binned_by_powers_of_two():
    # 0 | 1 2 | 3 4 5 6 | 7 ... 14 | 15 ...
    assert position_bins(np.array([0, 1, 2, 3, 6, 7, 14, 15, 30, 31])).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    exact = np.array([2**k - 1 for k in range(40)])
    assert position_bins(exact).tolist() == list(range(40))
    assert position_bins(exact[1:] - 1).tolist() == list(range(39))


def test_entropy_bins_are_half_octaves_from_a_thousandth_of_a_nat():
    assert ENTROPY_EDGES[0] == 0 and ENTROPY_EDGES[1] == 2.0**-10 and ENTROPY_EDGES[-1] == 16
    assert ENTROPY_EDGES[21] == 1.0
    entropy = np.array([0.0, 0.0009, 2.0**-10, 1.0, 1.0, 15.0, -1e-7, 40.0, math.nan], dtype=np.float32)
    rows = entropy_histogram_rows(entropy, np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), num_rows=3)
    assert rows.shape == (3, 29)
    assert np.flatnonzero(rows[0]).tolist() == [0, 1, 21] and rows[0, [0, 1, 21]].tolist() == [2, 1, 1]
    assert np.flatnonzero(rows[1]).tolist() == [0, 21, 28] and rows[1, [0, 21, 28]].tolist() == [1, 1, 3]
    assert not rows[2].any()


def two_prompts() -> tuple[Experience, AdvantageResult]:
    """Prompt 7 with 0 of 2 right, prompt 9 with 1 of 2 right; responses of 1, 2, 3 and 1 tokens."""
    experience = Experience(
        prompt_id_B=np.array([7, 7, 9, 9], dtype=np.uint64),
        group_index_B=np.array([0, 0, 1, 1]),
        prompt_length_B=np.array([1, 1, 1, 1]),
        response_length_B=np.array([1, 2, 3, 1]),
        token_ids_L=np.zeros(11, dtype=np.int64),
        rollout_logprob_T=np.zeros(7, dtype=np.float32),
        reward_B=np.array([0.0, 0.25, 1.0, 0.0]),
        truncated_B=np.zeros(4, dtype=bool),
        policy_version_B=np.zeros(4, dtype=np.int64),
        policy_version_sum_B=np.zeros(4, dtype=np.int64),
    )
    advantages = AdvantageResult(
        advantage_B=np.array([-0.5, 0.5, 1.0, -1.0]),
        accuracy_P=np.array([0.0, 0.5]),
        counts_P=np.array([2, 2]),
        successes_P=np.array([0, 1]),
        prompt_id_P=np.array([7, 9], dtype=np.uint64),
    )
    return experience, advantages


def test_profile_of_two_prompts_by_hand():
    experience, advantages = two_prompts()
    #                    prompt 7: 1 | 2 .5     prompt 9: 0 1 .5 | 4
    entropy_T = np.array([1, 2, 0.5, 0, 1, 0.5, 4], dtype=np.float32)
    scores = PolicyScores(logprob_T=np.zeros(7, dtype=np.float32), token_entropy_T=entropy_T)
    profile = profile_batch(experience, scores, advantages, np.array([1.5, 0.5]))
    sums = profile.buckets
    assert sums.prompts_D.tolist() == [1, 0, 1, 0]
    assert sums.rollouts_D.tolist() == [2, 0, 2, 0]
    assert sums.tokens_D.tolist() == [3, 0, 4, 0]
    assert sums.entropy_sum_D.tolist() == [3.5, 0, 5.5, 0]
    assert sums.reward_sum_D.tolist() == [0.25, 0, 1.0, 0]
    assert sums.allocation_sum_D.tolist() == [1.5, 0, 0.5, 0]
    assert bucket_means(sums, 0.01) == {
        "unsolved": {
            "prompts": 1,
            "tokens": 3,
            "token_entropy": 3.5 / 3,
            "reward": 0.125,
            "response_length": 1.5,
            "coefficient": 0.015,
        },
        "medium": {
            "prompts": 1,
            "tokens": 4,
            "token_entropy": 1.375,
            "reward": 0.5,
            "response_length": 2.0,
            "coefficient": 0.005,
        },
    }
    # bins: 0 -> 0, 0.5 -> 19, 1 -> 21, 2 -> 23, 4 -> 25
    assert {(r, c): n for r, c, n in occupied(profile.entropy_by_difficulty_DK)} == {
        (0, 19): 1, (0, 21): 1, (0, 23): 1, (2, 0): 1, (2, 19): 1, (2, 21): 1, (2, 25): 1
    }  # fmt: skip
    # first tokens 1 2 0 4; positions 1 and 2: 0.5 | 1 0.5
    assert {(r, c): n for r, c, n in occupied(profile.entropy_by_position_QK)} == {
        (0, 0): 1, (0, 21): 1, (0, 23): 1, (0, 25): 1, (1, 19): 2, (1, 21): 1
    }  # fmt: skip
    assert profile.entropy_by_position_QK.shape == (2, 29)
    assert profile.gradients is None


def occupied(histogram: np.ndarray) -> list[tuple[int, int, int]]:
    return [(int(r), int(c), int(histogram[r, c])) for r, c in np.argwhere(histogram)]


def test_a_bucket_without_tokens_has_no_entropy():
    zeros = np.zeros(4)
    one = np.array([0, 1, 0, 0])
    means = bucket_means(BucketSums(one, 4 * one, 0 * one, zeros, zeros, zeros), 0.1)
    assert means == {"hard": {"prompts": 1, "tokens": 0, "reward": 0.0, "response_length": 0.0, "coefficient": 0.0}}


def test_gradient_geometry_equals_autograd_through_every_logit():
    """The oracle differentiates the two objectives themselves: sum A logp / N and sum w H / N of random logits."""
    torch.manual_seed(3)
    num_tokens, vocabulary, temperature = 9, 6, 0.7
    x = (3 * torch.randn(num_tokens, vocabulary, dtype=torch.float64)).requires_grad_()  # x = logits / temperature
    label = torch.randint(vocabulary, (num_tokens,))
    advantage = torch.randn(num_tokens, dtype=torch.float64)
    weight = torch.rand(num_tokens, dtype=torch.float64)
    logp = x.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    objective = (advantage * logp.gather(1, label[:, None]).squeeze(1)).sum() / num_tokens
    bonus = (weight * entropy).sum() / num_tokens
    (policy,) = torch.autograd.grad(objective, x, retain_graph=True)
    (raised,) = torch.autograd.grad(bonus, x)

    result = logprob_entropy(x.detach() * temperature, label, temperature=temperature, vocab_size=vocabulary)
    assert result.logprob_grad_sq_T is not None and result.entropy_grad_sq_T is not None
    assert result.grad_dot_T is not None
    scores = PolicyScores(
        logprob_T=result.logprob_T.float().numpy(),
        token_entropy_T=result.entropy_T.float().numpy(),
        logprob_grad_sq_T=result.logprob_grad_sq_T.numpy(),
        entropy_grad_sq_T=result.entropy_grad_sq_T.numpy(),
        grad_dot_T=result.grad_dot_T.numpy(),
    )
    geometry = gradient_geometry(scores, advantage_T=advantage.numpy(), weight_T=weight.numpy())
    assert geometry is not None and geometry.cosine is not None
    assert geometry.policy_norm == pytest.approx(float(policy.norm()), rel=1e-12)
    assert geometry.entropy_norm == pytest.approx(float(raised.norm()), rel=1e-12)
    cosine = float((policy * raised).sum() / policy.norm() / raised.norm())
    assert geometry.cosine == pytest.approx(cosine, rel=1e-10)
    assert abs(cosine) > 0.02  # a test of the sign as well


def geometry_scores(policy: list[float], entropy: list[float], dot: list[float]) -> PolicyScores:
    zeros = np.zeros(len(policy), dtype=np.float32)
    columns = [np.array(values, dtype=np.float32) for values in (policy, entropy, dot)]
    return PolicyScores(zeros, zeros, *columns)


def test_gradient_geometry_by_hand():
    """Two tokens, N = 2: |g_P|^2 = (9 * 1 + 16 * 1) / 4, |g_H|^2 = (4 * 4) / 4, <g_P, g_H> = (3 * 2 * -1) / 4."""
    scores = geometry_scores([1, 1], [4, 1], [-1, 0.5])
    geometry = gradient_geometry(scores, advantage_T=np.array([3.0, 4.0]), weight_T=np.array([2.0, 0.0]))
    assert geometry is not None
    assert (geometry.policy_norm, geometry.entropy_norm, geometry.cosine) == (2.5, 2.0, pytest.approx(-1.5 / 5))


@pytest.mark.parametrize(("advantage", "weight"), [([0.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])])
def test_no_gradient_has_no_direction(advantage: list[float], weight: list[float]):
    scores = geometry_scores([1, 1], [1, 1], [1, 1])
    geometry = gradient_geometry(scores, advantage_T=np.array(advantage), weight_T=np.array(weight))
    assert geometry is not None and geometry.cosine is None
    assert 0.0 in (geometry.policy_norm, geometry.entropy_norm)


def record(step: int, entropy: float, successes: list[int], *, alpha: float = 0.0) -> FlightRecord:
    """A step of 10 tokens and groups of 4, with rho = 0.5 and linear_deficit behind its mean difficulty."""
    accuracy = [value / 4 for value in successes]
    nothing = np.zeros(4, dtype=np.int64)
    return FlightRecord(
        step=step,
        observation=Observation(10 * entropy, 10.0, sum(max(0.0, 1 - 2 * g) for g in accuracy) / len(accuracy)),
        state=ControllerState(step + 1, alpha, 0.0, 1.0, 0, 0),
        coefficient=alpha,
        successes_P=np.array(successes),
        counts_P=np.full(len(successes), 4),
        ledger_accuracy_P=np.full(len(successes), 0.25),
        profile=BatchProfile(
            BucketSums(nothing, nothing, nothing, nothing * 0.0, nothing * 0.0, nothing * 0.0),
            np.zeros((4, 29), dtype=np.int64),
            np.zeros((1, 29), dtype=np.int64),
            None,
        ),
        clip_low=(0.0, 10.0),
        clip_high=(0.0, 10.0),
    )


def test_replay_of_two_controllers_by_hand():
    own = Aer(tau=0.75, eta=0.1, alpha_max=1.0)
    records = [record(0, 1.0, [0, 2]), record(1, 0.5, [0, 2]), record(2, 0.25, [1, 2])]
    # H_0 = 1, H* = 0.75: gaps -0.25, 0.25, 0.5 -> alpha 0, 0.025, 0.075
    steps = replay(records, own, recorded=own)
    assert [step.decision.state.alpha for step in steps] == pytest.approx([0, 0.025, 0.075], rel=1e-12)
    assert [step.decision.target for step in steps] == [0.75] * 3
    assert [step.decision.coefficient for step in steps] == [step.decision.state.alpha for step in steps]
    # H* = 0.4, proportional term only: gaps -0.6, -0.1, 0.15 -> I 0, 0, 0.015; alpha 0, 0, 0.015 + 0.3
    other = own.model_copy(update={"tau": 0.4, "update": "pi", "k_p": 2.0})
    alphas = [step.decision.state.alpha for step in replay(records, other, recorded=own)]
    assert alphas == pytest.approx([0, 0, 0.315], rel=1e-12)
    # skywork: target 0.3 of its own; H 1, 0.5, 0.25 -> c down, down, up
    skywork = Skywork(target=0.3, delta=0.001, alpha_max=0.005)
    steps = replay(records, skywork, recorded=own)
    assert [step.decision.state.alpha for step in steps] == [0, 0, 0.001]
    assert [step.decision.coefficient for step in steps] == [0, 0, 0.001]
    assert [step.decision.target for step in steps] == [0.3] * 3


def test_replay_evaluates_other_difficulties():
    own = Aer(tau=0.75)
    records = [record(0, 1.0, [0, 2]), record(1, 0.5, [1, 3])]
    means = {
        ("complement", "group"): [0.75, 0.5],  # 1 - (0 + 1/2) / 2 and 1 - (1/4 + 3/4) / 2
        ("threshold", "group"): [1.0, 0.5],  # g <= 1/2
        ("linear_deficit", "ledger"): [0.5, 0.5],  # 1 - 2 * 1/4
    }
    for (shape, source), expected in means.items():
        options = own.model_copy(update={"difficulty": shape, "source": source})
        steps = replay(records, options, recorded=own)
        assert [step.observation.difficulty_mean for step in steps] == expected
    assert replayed_difficulty(records[1], own).tolist() == [0.5, 0.0]
    # nothing about d changed: what was recorded is taken as it is
    twisted = record(0, 1.0, [0, 2])
    steps = replay([twisted], own.model_copy(update={"tau": 0.5}), recorded=own)
    assert steps[0].observation == twisted.observation


def test_anti_windup_follows_the_replayed_difficulty():
    own = Aer(tau=2.0, eta=0.1)
    records = [record(0, 1.0, [2, 2])]  # g = 1/2: linear_deficit gives 0, complement 1/2
    assert replay(records, own, recorded=own)[0].decision.frozen
    other = own.model_copy(update={"difficulty": "complement"})
    assert not replay(records, other, recorded=own)[0].decision.frozen


def test_a_recording_from_a_later_step_starts_from_its_first_state():
    own = Aer(tau=0.75, eta=0.1, alpha_max=1.0)
    records = [record(5, 1.0, [0, 2], alpha=0.2), record(6, 0.5, [0, 2])]
    steps = replay(records, own, recorded=own)
    assert [step.step for step in steps] == [6]
    assert steps[0].decision.state.alpha == pytest.approx(0.2 + 0.1 * 0.25, rel=1e-12)
    with pytest.raises(ValueError, match="no step to replay"):
        replay(records[:1], own, recorded=own)
    with pytest.raises(ValueError, match="no step to replay"):
        replay([], own, recorded=own)
    with pytest.raises(ValueError, match="between 6 and 8"):
        replay([records[1], record(8, 1.0, [0])], own, recorded=own)


def test_an_unusable_observation_is_held_in_replay_too():
    own = Aer(tau=0.75)
    steps = replay([record(0, math.nan, [0]), record(1, 1.0, [0])], own, recorded=own)
    assert [step.decision.held for step in steps] == [True, False]
    assert math.isnan(steps[0].decision.target) and steps[1].decision.target == 0.75


# Laws: sums add over any cut of the batch, bins keep every token, norms obey Cauchy-Schwarz


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
