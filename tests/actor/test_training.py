"""Three optimizer steps of the actor against the textbook: transformers in float64, log_softmax, autograd, AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.parallel.platform import install_platform
from aer_megatron.types import SupervisedBatch, TrainBatch
from tests.support.experiences import with_context
from tests.support.policies import build_actor, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.processes

NUM_STEPS = 3
LONGEST = 9


@dataclass(frozen=True)
class Case:
    """A head, a mean, and whether a tool said some of the response tokens."""

    head: str = "fused"
    normalizer: str = "tokens"
    masked: bool = False

    def batch(self) -> TrainBatch:
        return with_context(fixed_batch()) if self.masked else fixed_batch()


CASES = (
    Case(),
    Case(head="logits"),
    Case(masked=True),
    Case(head="logits", masked=True),
    Case(normalizer="sequences", masked=True),
    Case(normalizer="constant", masked=True),
)


def _textbook(case: Case) -> list[dict[str, float]]:
    """Returns loss sums and gradient norm of every step, in float64 and without any of the project's arithmetic."""
    options = policy_config().optimizer
    model = tiny_hf_model().double().train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    undecayed = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": undecayed, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    return [_textbook_step(model, optimizer, options.clip_grad, case) for _ in range(NUM_STEPS)]


def _textbook_step(model: Any, optimizer: torch.optim.Optimizer, clip_grad: float, case: Case) -> dict[str, float]:
    batch = case.batch()
    experience = batch.experience
    num_tokens = len(batch.old_logprob_T)
    policy, bonus, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    start = first = 0
    for index in range(experience.num_sequences):
        prompt, response = int(experience.prompt_length_B[index]), int(experience.response_length_B[index])
        ids = torch.from_numpy(experience.token_ids_L[start : start + prompt + response])
        sampled = torch.ones(response, dtype=torch.bool)
        if experience.sampled_L is not None:
            sampled = torch.from_numpy(experience.sampled_L[start + prompt : start + prompt + response])
        count = int(sampled.sum())
        logp_tV = model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)[sampled]
        logp_t = logp_tV.gather(1, ids[prompt:][sampled][:, None])[:, 0]
        entropy_t = -(logp_tV.exp() * logp_tV).sum(-1)
        ratio_t = (logp_t - torch.from_numpy(batch.old_logprob_T[first : first + count])).exp()
        advantage = float(batch.advantage_B[index])
        terms_t = torch.minimum(ratio_t * advantage, ratio_t.clamp(0.8, 1.2) * advantage)
        divisor = {"tokens": num_tokens, "sequences": 12 * count, "constant": 12 * LONGEST}[case.normalizer]
        policy = policy - terms_t.sum() / divisor
        bonus = bonus + float(batch.entropy_weight_B[index]) * entropy_t.sum() / divisor
        entropy = entropy + entropy_t.sum()
        start, first = start + prompt + response, first + count
    optimizer.zero_grad()
    (policy - bonus).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return {
        "policy_loss": float(policy.detach()) * num_tokens,
        "entropy_bonus": float(bonus.detach()) * num_tokens,
        "token_entropy": float(entropy.detach()),
        "grad_norm": float(norm),
    }


def _supervised_batch() -> SupervisedBatch:
    """Returns a conversation: what the other side says between the answers carries no loss."""
    sequences = with_context(fixed_batch()).experience
    lengths = sequences.prompt_length_B, sequences.response_length_B
    return SupervisedBatch(*lengths, sequences.token_ids_L, sampled_L=sequences.sampled_L)


def _actor_steps(rank: int, world_size: int) -> list[list[dict[str, float]]]:
    install_platform()
    results = []
    for case in CASES:
        config = policy_config(
            model={"head": case.head}, algo={"normalizer": case.normalizer}, rollout={"max_new_tokens": LONGEST}
        )
        actor = build_actor(config)
        steps = [actor.train(case.batch(), seed=0, entropy_gradient=True) for _ in range(NUM_STEPS)]
        names = ("policy_loss", "entropy_bonus", "token_entropy")
        results.append([{n: s.sums[n][0] for n in names} | {"grad_norm": s.grad_norm} for s in steps])
    stats = build_actor(policy_config()).train_supervised(_supervised_batch())
    total, count = stats.sums["supervised_loss"]
    results.append([{"sum": total, "count": count, "grad_norm": stats.grad_norm}])
    return results


@pytest.fixture(scope="module")
def actor_steps() -> list[list[dict[str, float]]]:
    return run_distributed(_actor_steps, 1, timeout_s=300)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_of_three_updates_are_the_textbook_s(case: Case, actor_steps: list[list[dict[str, float]]]) -> None:
    wanted = _textbook(case)
    assert wanted[0]["policy_loss"] != pytest.approx(wanted[2]["policy_loss"], rel=1e-2)  # the weights do move
    for step, (mine, theirs) in enumerate(zip(actor_steps[CASES.index(case)], wanted, strict=True)):
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=2e-5, atol=2e-5, err_msg=f"{name} of step {step}")


def test_the_supervised_loss_is_the_textbook_s_mean_over_marked_tokens(
    actor_steps: list[list[dict[str, float]]],
) -> None:
    batch, model = _supervised_batch(), tiny_hf_model().double().train()
    assert batch.sampled_L is not None
    parts, start = [], 0
    for length in (batch.prompt_length_B + batch.response_length_B).tolist():
        ids, marked = (torch.from_numpy(each[start : start + length]) for each in (batch.token_ids_L, batch.sampled_L))
        logp_tV = model(ids[None]).logits[0, :-1].log_softmax(-1)
        parts.append(-logp_tV.gather(1, ids[1:, None])[:, 0][marked[1:]])
        start += length
    loss_T = torch.cat(parts)
    loss_T.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    wanted = {"sum": float(loss_T.detach().sum()), "count": len(loss_T), "grad_norm": float(norm)}
    for name, value in wanted.items():
        np.testing.assert_allclose(actor_steps[-1][0][name], value, rtol=2e-5, err_msg=name)
