"""Properties of sampling and sharing over random inputs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.rollout.collect import share
from aer_megatron.rollout.engine import SamplingOptions
from aer_megatron.rollout.sampling import sample_tokens, truncate

logit_rows = st.lists(st.one_of(st.floats(-60, 60), st.just(float("-inf"))), min_size=1, max_size=12).filter(
    lambda row: max(row) > float("-inf")
)
uniforms = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53]))


@settings(max_examples=200, deadline=None)
@given(row=logit_rows, uniform=uniforms, top_p=st.floats(1e-3, 1), top_k=st.integers(0, 12))
def test_every_draw_is_a_kept_token_with_its_own_logprob(
    row: list[float], uniform: float, top_p: float, top_k: int
) -> None:
    logits = torch.tensor([row], dtype=torch.float32)
    options = SamplingOptions(0.7, top_p, top_k, frozenset())
    tokens, logprobs = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), options)
    logprob_V = (logits[0] / 0.7).log_softmax(-1)
    assert logprobs.item() == logprob_V[tokens.item()].item()
    more_probable = logprob_V > logprob_V[tokens.item()]
    assert logprob_V[tokens.item()] > float("-inf")
    assert more_probable.sum() < (top_k or len(row))
    assert logprob_V[more_probable].double().exp().sum() < top_p + 1e-6


@settings(max_examples=200, deadline=None)
@given(row=logit_rows, top_p=st.floats(1e-3, 1), top_k=st.integers(0, 12))
def test_truncation_keeps_a_smallest_set_that_reaches_top_p(row: list[float], top_p: float, top_k: int) -> None:
    probability = torch.tensor([row], dtype=torch.float64).softmax(-1)
    kept = truncate(probability, top_p=top_p, top_k=top_k)[0]
    values = kept[kept > 0]
    assert 1 <= len(values) <= (top_k or len(row))
    assert values.sum() - values.min() < top_p  # without its least probable token it would not reach top_p
    if len(values) < (top_k or len(row)):
        assert values.sum() >= min(top_p, probability.sum().item()) - 1e-12


@given(num_items=st.integers(0, 500), world_size=st.integers(1, 70))
def test_shares_partition_the_items_evenly(num_items: int, world_size: int) -> None:
    parts = [range(num_items)[share(num_items, rank=rank, world_size=world_size)] for rank in range(world_size)]
    assert [item for part in parts for item in part] == list(range(num_items))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
