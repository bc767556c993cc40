"""Laws of sampled tokens: what a tool says inside of a response changes no number but lengths and positions.

Every law compares answers with context between their sampled tokens with the same answers without it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.algo.advantage import group_advantages
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.experience import (
    join_experiences,
    num_groups,
    pack_groups,
    sampled_mask,
    select_groups,
    staleness,
)
from aer_megatron.algo.flight import profile_batch
from aer_megatron.algo.ledger import group_token_entropy
from aer_megatron.algo.loss import TokenData, policy_loss, sequence_weights
from aer_megatron.algo.options import AlgoSection
from aer_megatron.algo.policy_losses.base import PolicyLoss
from aer_megatron.algo.policy_losses.clip import Clip
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.kl_cov import KlCov
from aer_megatron.report.training import experience_metrics
from aer_megatron.types import (
    Completion,
    Experience,
    PolicyScores,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    Verdict,
    VersionSpan,
)
from tests.support.tokens import token_data

# turns of one answer: (tokens that a tool says first, tokens that the policy samples, its version)
turns = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(3, 5)), min_size=1, max_size=4)
answers = st.lists(st.lists(st.tuples(turns, st.integers(0, 2)), min_size=2, max_size=3), min_size=1, max_size=4)


def answer(of_turns: list[tuple[int, int, int]], after: int, *, context: bool) -> Completion:
    """Returns a completion whose sampled tokens count from 1; a tool's are 0."""
    tokens: list[int] = []
    spans = []
    sampled = 0
    for before, count, version in of_turns:
        tokens += [0] * (before if context else 0)
        spans.append(VersionSpan(version, len(tokens), len(tokens) + count))
        tokens += range(sampled + 1, sampled + count + 1)
        sampled += count
    tokens += [0] * (after if context else 0)
    return Completion(tuple(tokens), tuple(-0.1 * place for place in range(sampled)), "stop", tuple(spans))


def groups(drawn: Any, *, context: bool, first: int = 0) -> list[ScoredGroup]:
    rows = []
    for index, of_group in enumerate(drawn, start=first):
        completions = tuple(answer(of_turns, after, context=context) for of_turns, after in of_group)
        verdicts = tuple(Verdict(float(place % 2), "ok") for place in range(len(of_group)))
        prompt = Prompt(100 + index, "", (50 + index,) * (1 + index % 3), "", "math")
        rows.append(ScoredGroup(RolloutGroup(prompt, completions), verdicts))
    return rows


def both(drawn: Any) -> tuple[Experience, Experience]:
    return pack_groups(groups(drawn, context=True)), pack_groups(groups(drawn, context=False))


def check_same(found: Experience, alone: Experience) -> None:
    """Sampled tokens, in order, and everything that is of them."""
    np.testing.assert_array_equal(found.sampled_length_B, alone.response_length_B)
    assert found.num_sampled_tokens == alone.num_sampled_tokens == len(found.rollout_logprob_T)
    np.testing.assert_array_equal(
        found.token_ids_L[sampled_mask(found)], alone.token_ids_L[sampled_mask(alone)], err_msg="sampled ids"
    )
    for field in dataclasses.fields(Experience):
        if field.name not in ("token_ids_L", "sampled_L", "response_length_B"):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(alone, field.name), err_msg=field.name)


@given(answers)
def test_packing_keeps_the_sampled_tokens_and_names_them(drawn: Any) -> None:
    found, alone = both(drawn)
    check_same(found, alone)
    assert alone.sampled_L is None
    assert (found.sampled_L is None) == (len(found.token_ids_L) == len(alone.token_ids_L))
    ids_of_responses = found.token_ids_L[sampled_mask(dataclasses.replace(found, sampled_L=None))]
    assert (ids_of_responses > 0).sum() == found.num_sampled_tokens  # the zeros, a tool's, are the others
    assert staleness(found, policy_version=7) == staleness(alone, policy_version=7)


@given(answers, st.integers(0, 15), answers)
def test_groups_are_picked_and_joined_with_their_masks(drawn: Any, picks: int, others: Any) -> None:
    found, alone = both(drawn)
    keep_P = np.array([bool(picks >> place & 1) for place in range(num_groups(found))])
    check_same(select_groups(found, keep_P), select_groups(alone, keep_P))
    single = pack_groups(groups(others, context=False, first=10))
    for left, right in (([found, single], [alone, single]), ([single, found], [single, alone])):
        check_same(join_experiences(left), join_experiences(right))
    assert join_experiences([alone, single]).sampled_L is None
    assert select_groups(alone, keep_P).sampled_L is None


@settings(max_examples=40)
@given(answers, st.integers(0, 2**31))
def test_entropy_difficulty_and_gradients_are_of_sampled_tokens(drawn: Any, seed: int) -> None:
    found, alone = both(drawn)
    rng = np.random.default_rng(seed)
    scores = PolicyScores(*rng.random((5, found.num_sampled_tokens)).astype(np.float32))
    results = []
    for experience in (found, alone):
        advantages = group_advantages(experience, Grpo())
        profile = profile_batch(experience, scores, advantages, np.linspace(0, 1, num_groups(experience)))
        evidence = group_token_entropy(experience, scores.token_entropy_T)
        weight_B = sequence_weights(experience.sampled_length_B, rule="sequences", max_new_tokens=9)
        results.append((*dataclasses.astuple(profile), *evidence, weight_B, advantages.advantage_B))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_equal(mine, theirs)


@given(answers)
def test_metrics_tell_sampled_tokens_from_responses(drawn: Any) -> None:
    found, alone = both(drawn)
    metrics, plain = experience_metrics(found), experience_metrics(alone)
    assert metrics["rollout/response_tokens"] == int(found.response_length_B.sum())
    assert metrics.get("rollout/sampled_tokens", metrics["rollout/response_tokens"]) == plain["rollout/response_tokens"]
    assert "rollout/sampled_tokens" not in plain


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.booleans(), min_size=1, max_size=30).filter(any),
    st.sampled_from([Clip(dual_clip=2.0), ClipCov(dual_clip=2.0), KlCov()]),
)
def test_sampled_tokens_alone_have_the_loss_of_all_with_weight_zero_between(
    seed: int, mask: list[bool], rule: PolicyLoss
) -> None:
    config = AlgoSection(policy_loss=rule, kl_coefficient=0.2)
    sampled_T = torch.tensor(mask)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(len(mask), generator=generator, dtype=torch.float64)

    whole = token_data(
        normal(),
        normal(),
        entropy_weight_T=0.1 * normal().abs(),
        mean_weight_T=normal().abs() * sampled_T,
        importance_T=normal().abs(),
        selected_T=normal() > 0.5 if rule.selects else None,
        ref_logprob_T=normal(),
    )
    values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    alone = TokenData(**{name: None if value is None else value[sampled_T] for name, value in values.items()})
    logprob, entropy = (normal().requires_grad_() for _ in range(2))
    count = float(sampled_T.sum())
    gradients = []
    for tokens, keep in ((whole, slice(None)), (alone, sampled_T)):
        logprob.grad = entropy.grad = None
        output = policy_loss(logprob[keep], entropy[keep], tokens=tokens, normalizer=count, config=config)
        output.loss.backward()
        assert logprob.grad is not None and entropy.grad is not None
        gradients.append([output.loss.detach(), logprob.grad.clone(), entropy.grad.clone()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_single_turn_answers_cost_no_array() -> None:
    experience = pack_groups(groups([[([(0, 3, 4)], 0), ([(0, 2, 4)], 0)]], context=True))
    assert experience.sampled_L is None
    assert experience.sampled_length_B is experience.response_length_B
    assert join_experiences([experience, experience]).sampled_L is None


SPAN = VersionSpan(0, 0, 2)


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "spans"),
    [
        ((), (), ()),  # nothing at all
        ((1, 2), (), ()),  # a tool alone spoke
        ((1, 2), (-1.0, -1.0), ()),  # nobody sampled them
        ((1, 2), (-1.0,), (SPAN,)),
        ((1, 2, 3), (-1.0, -1.0, -1.0), (SPAN,)),  # log-probabilities of a tool's words
        ((1, 2), (-1.0, -1.0, -1.0), (VersionSpan(0, 0, 3),)),  # beyond the end
        ((1, 2, 3), (-1.0, -1.0, -1.0), (SPAN, VersionSpan(1, 1, 2))),  # twice
        ((1, 2, 3), (-1.0, -1.0, -1.0), (VersionSpan(0, 2, 3), SPAN)),  # not in order
        ((1, 2), (-1.0, -1.0), (VersionSpan(0, 0, 0), SPAN)),  # empty
        ((1, 2), (-1.0, -1.0), (VersionSpan(0, -1, 1),)),
    ],
)
def test_a_completion_that_contradicts_itself_is_refused(token_ids: Any, logprobs: Any, spans: Any) -> None:
    group = RolloutGroup(Prompt(0x9AE1, "", (1,), "", "math"), (Completion(token_ids, logprobs, "stop", spans),))
    with pytest.raises(ValueError, match="prompt 0x9ae1 has"):
        pack_groups([ScoredGroup(group, (Verdict(0.0, "wrong"),))])
