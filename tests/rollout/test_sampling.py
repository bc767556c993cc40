"""Inverse-CDF sampling and top-k/top-p truncation by hand-worked distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aer_megatron.rollout import sampling
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.rollout.sampling import sample_tokens, truncate

LAST_UNIFORM = 1 - 2.0**-53  # the largest number that uniform_B returns


def options(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingOptions:
    return SamplingOptions(temperature, top_p, top_k, frozenset())


def draw(probabilities: list[float], uniforms: list[float], sampling_options: SamplingOptions) -> list[int]:
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(len(uniforms), -1)
    tokens, _ = sample_tokens(logits, torch.tensor(uniforms, dtype=torch.float64), sampling_options)
    return tokens.tolist()


def test_tokens_own_consecutive_intervals_of_the_unit_interval() -> None:
    uniforms = [0.0, 0.09, 0.11, 0.59, 0.61, LAST_UNIFORM]
    assert draw([0.1, 0.5, 0.4], uniforms, options()) == [0, 0, 1, 1, 2, 2]


def test_a_token_without_probability_is_never_drawn() -> None:
    uniforms = [0.0, 0.5, math.nextafter(0.5, 0), math.nextafter(0.5, 1), LAST_UNIFORM]
    drawn = draw([0.0, 0.5, 0.0, 0.5, 0.0], uniforms, options())
    assert set(drawn) == {1, 3}
    assert drawn[0] == 1
    assert drawn[-1] == 3


def test_truncated_tokens_are_never_drawn_and_the_rest_is_renormalised() -> None:
    # top-2 of (0.1, 0.5, 0.4): tokens 1 and 2 with 5/9 and 4/9
    uniforms = [0.0, 5 / 9 - 1e-6, 5 / 9 + 1e-6, LAST_UNIFORM]
    assert draw([0.1, 0.5, 0.4], uniforms, options(top_k=2)) == [1, 1, 2, 2]


def test_the_logprob_is_that_of_the_tempered_untruncated_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    tokens, logprobs = sample_tokens(logits, torch.zeros(1, dtype=torch.float64), options(temperature=2.0, top_k=1))
    assert tokens.tolist() == [0]
    expected = 1.0 - math.log(math.e + 1.0 + math.sqrt(math.e))  # log softmax of (1, 0, 1/2)
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(expected, abs=1e-6)


def test_greedy_takes_the_largest_logit_whatever_the_uniform_number_and_the_first_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.5, -1.0, 0.0, 0.25]])
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        drawn = torch.full((2,), uniform, dtype=torch.float64)
        tokens, logprobs = sample_tokens(logits, drawn, options(temperature=0.0, top_p=0.1, top_k=1))
        assert tokens.tolist() == [1, 0]
        # of the policy itself, at temperature 1
        first = -math.log(2 + math.exp(-2) + math.exp(-3))
        assert logprobs[0].item() == pytest.approx(first, abs=1e-6)
    with pytest.raises(RuntimeError, match="not finite"):
        sample_tokens(torch.tensor([[1.0, float("nan")]]), torch.zeros(1, dtype=torch.float64), options(0.0))


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3]),
        (0.4, 0, [1]),  # 0.5 alone reaches 0.4
        (0.55, 0, [1, 3]),  # 0.5 does not reach 0.55, 0.8 does
        (0.85, 0, [0, 1, 3]),
        (1.0, 1, [1]),
        (1.0, 3, [0, 1, 3]),
        (0.55, 1, [1]),  # the stricter of the two
        (0.4, 3, [1]),
        (1e-9, 0, [1]),  # never empty
        (1.0, 9, [0, 1, 2, 3]),
    ],
)
def test_truncate(top_p: float, top_k: int, kept: list[int]) -> None:
    probabilities = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    result = truncate(probabilities, top_p=top_p, top_k=top_k)
    assert result.nonzero()[:, 1].tolist() == kept
    assert torch.equal(result[result > 0], probabilities[result > 0])


def test_ties_of_top_k_go_to_the_lower_id() -> None:
    assert truncate(torch.full((1, 4), 0.25), top_p=1.0, top_k=2).tolist() == [[0.25, 0.25, 0.0, 0.0]]


def test_slicing_the_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 31, generator=generator)
    uniforms = torch.rand(23, generator=generator, dtype=torch.float64)
    whole = sample_tokens(logits, uniforms, options(top_p=0.9))
    monkeypatch.setattr(sampling, "_SLICE_ELEMENTS", 5 * 31)
    sliced = sample_tokens(logits, uniforms, options(top_p=0.9))
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = bad
    with pytest.raises(RuntimeError, match="not finite"):
        sample_tokens(logits, torch.zeros(2, dtype=torch.float64), options())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_options_out_of_range_are_named(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((), 0, 1), "prompt_ids is empty"), (((1,), 0, 0), "max_new_tokens=0"), (((1,), 1 << 64, 1), "seed=")],
)
def test_malformed_requests_are_refused(arguments: tuple[tuple[int, ...], int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateRequest(*arguments)


# Laws

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
