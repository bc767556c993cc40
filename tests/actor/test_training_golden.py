"""Three optimizer steps of the actor against the textbook: transformers in float64, log_softmax, autograd, AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.parallel.platform import install_platform
from tests.support.policies import build_actor, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed

NUM_STEPS = 3
HEADS = ("fused", "logits")


def _textbook() -> list[dict[str, float]]:
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
    return [_textbook_step(model, optimizer, options.clip_grad) for _ in range(NUM_STEPS)]


def _textbook_step(model: Any, optimizer: torch.optim.Optimizer, clip_grad: float) -> dict[str, float]:
    batch = fixed_batch()
    experience = batch.experience
    normalizer = float(experience.response_length_B.sum())
    policy, bonus, entropy = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    start = first = 0
    for index in range(experience.num_sequences):
        prompt, response = int(experience.prompt_length_B[index]), int(experience.response_length_B[index])
        ids = torch.from_numpy(experience.token_ids_L[start : start + prompt + response])
        logp_tV = model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        logp_t = logp_tV.gather(1, ids[prompt:, None])[:, 0]
        entropy_t = -(logp_tV.exp() * logp_tV).sum(-1)
        ratio_t = (logp_t - torch.from_numpy(batch.old_logprob_T[first : first + response])).exp()
        advantage = float(batch.advantage_B[index])
        policy = policy - torch.minimum(ratio_t * advantage, ratio_t.clamp(0.8, 1.2) * advantage).sum()
        bonus = bonus + float(batch.entropy_weight_B[index]) * entropy_t.sum()
        entropy = entropy + entropy_t.sum()
        start, first = start + prompt + response, first + response
    optimizer.zero_grad()
    ((policy - bonus) / normalizer).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    return {
        "policy_loss": float(policy.detach()),
        "entropy_bonus": float(bonus.detach()),
        "token_entropy": float(entropy.detach()),
        "grad_norm": float(norm),
    }


def _actor_steps(rank: int, world_size: int) -> list[list[dict[str, float]]]:
    install_platform()
    results = []
    for head in HEADS:
        actor = build_actor(policy_config(model={"head": head}))
        steps = [actor.train(fixed_batch(), seed=0, entropy_gradient=True) for _ in range(NUM_STEPS)]
        names = ("policy_loss", "entropy_bonus", "token_entropy")
        results.append([{n: s.sums[n][0] for n in names} | {"grad_norm": s.grad_norm} for s in steps])
    return results


@pytest.fixture(scope="module")
def actor_steps() -> list[list[dict[str, float]]]:
    return run_distributed(_actor_steps, 1, timeout_s=300)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("head", HEADS)
def test_losses_of_three_updates_are_the_textbook_s(head: str, actor_steps: list[list[dict[str, float]]]) -> None:
    wanted = _textbook()
    assert wanted[0]["policy_loss"] != pytest.approx(wanted[2]["policy_loss"], rel=1e-2)  # the weights do move
    for step, (mine, theirs) in enumerate(zip(actor_steps[HEADS.index(head)], wanted, strict=True)):
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=2e-5, atol=2e-5, err_msg=f"{name} of step {step}")
