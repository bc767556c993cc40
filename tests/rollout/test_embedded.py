"""The embedded engine against plain, unpadded, uncached transformers forwards of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.embedded import EmbeddedEngine
from aer_megatron.rollout.engine import GenerateRequest, RolloutEngine, SamplingOptions
from aer_megatron.types import Completion, VersionSpan
from tests.support.tiny_models import save_tiny_model

VOCABULARY = 29
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wrong positions and masks show, rounding stays below 1e-5
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_tied": lambda: Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
}
PLAIN = SamplingOptions(temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=frozenset())


def make_model(config: PretrainedConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_engine(
    config: PretrainedConfig, *, max_batch_size: int = 64, dtype: torch.dtype = torch.float32
) -> EmbeddedEngine:
    return EmbeddedEngine(config, dtype=dtype, device=torch.device("cpu"), max_batch_size=max_batch_size)


def give(engine: EmbeddedEngine, tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, int]:
    """Returns the checksums of the weights now in use as policy ``version``."""
    checksums = engine.receive_weights(tensors)
    engine.commit_weights(version)
    return checksums


def loaded(name: str, **kwargs: int) -> tuple[torch.nn.Module, EmbeddedEngine]:
    config = CONFIGS[name]()
    model = make_model(config)
    engine = make_engine(config, **kwargs)
    give(engine, model.named_parameters(), version=3)
    return model, engine


def random_requests(count: int, *, seed: int, longest: int = 11, new: int = 12) -> list[GenerateRequest]:
    rng = np.random.default_rng(seed)
    return [
        GenerateRequest(
            tuple(rng.integers(0, VOCABULARY, size=rng.integers(1, longest + 1)).tolist()),
            int(rng.integers(0, 2**63)),
            int(rng.integers(1, new + 1)),
        )
        for _ in range(count)
    ]


@torch.no_grad()
def reference_logits(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Returns the logits that predict each response token, from one unpadded forward without a cache."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def assert_logprobs_match(
    model: torch.nn.Module, request: GenerateRequest, completion: Completion, temperature: float
) -> None:
    logits = reference_logits(model, request.prompt_ids, completion.token_ids) / temperature
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logprobs_equal_an_unpadded_uncached_forward(name: str) -> None:
    model, engine = loaded(name)
    options = SamplingOptions(temperature=0.8, top_p=1.0, top_k=0, stop_token_ids=frozenset({5, 6}))
    requests = random_requests(40, seed=1)
    requests += [GenerateRequest(requests[0].prompt_ids, seed, 12) for seed in range(8)]  # rollouts of one prompt
    completions = engine.generate(requests, options)
    reasons = {completion.finish_reason for completion in completions}
    assert reasons == {"stop", "length"}
    for request, completion in zip(requests, completions, strict=True):
        assert_logprobs_match(model, request, completion, 0.8)


def test_every_completion_ends_at_its_first_stop_token_or_its_own_limit() -> None:
    _, engine = loaded("qwen3")
    stop = frozenset({2, 9, 17})
    requests = random_requests(60, seed=2)
    completions = engine.generate(requests, SamplingOptions(1.0, 1.0, 0, stop))
    for request, completion in zip(requests, completions, strict=True):
        body, last = completion.token_ids[:-1], completion.token_ids[-1]
        assert not stop & set(body)
        assert len(completion.logprobs) == len(completion.token_ids) <= request.max_new_tokens
        if last in stop:
            assert completion.finish_reason == "stop"
        else:
            assert completion.finish_reason == "length"
            assert len(completion.token_ids) == request.max_new_tokens
        assert completion.policy_versions == (VersionSpan(3, 0, len(completion.token_ids)),)


def test_a_completion_depends_on_its_request_only() -> None:
    _, engine = loaded("qwen3_tied")
    _, small = loaded("qwen3_tied", max_batch_size=7)
    options = SamplingOptions(1.0, 0.9, 20, frozenset({4}))
    requests = random_requests(30, seed=3)
    together = [completion.token_ids for completion in engine.generate(requests, options)]
    alone = [engine.generate([request], options)[0].token_ids for request in requests]
    backwards = [completion.token_ids for completion in small.generate(requests[::-1], options)][::-1]
    assert together == alone == backwards
    assert together == [completion.token_ids for completion in engine.generate(requests, options)]


def test_rollouts_of_one_prompt_differ_with_their_seeds() -> None:
    _, engine = loaded("llama")
    requests = [GenerateRequest((1, 2, 3), seed, 12) for seed in range(16)]
    assert len({completion.token_ids for completion in engine.generate(requests, PLAIN)}) > 8


def test_first_token_frequencies_follow_the_models_probabilities() -> None:
    model, engine = loaded("qwen3", max_batch_size=4096)
    count = 4000
    requests = [GenerateRequest((7, 3), seed, 1) for seed in range(count)]
    drawn = [completion.token_ids[0] for completion in engine.generate(requests, PLAIN)]
    probability = reference_logits(model, (7, 3), (0,))[0].double().softmax(-1).numpy()
    expected = probability * count
    kept = expected >= 5
    assert kept.sum() >= 5
    observed = np.bincount(drawn, minlength=VOCABULARY)
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 1 + (not kept.all())
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)  # some 5 standard deviations; seeds are fixed
    flat = ((observed - count / VOCABULARY) ** 2 / (count / VOCABULARY)).sum()
    assert flat > 10 * degrees  # the test can tell this distribution from a uniform one


def test_greedy_completions_are_the_argmax_of_every_position() -> None:
    model, engine = loaded("qwen3")
    greedy = SamplingOptions(temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=frozenset())
    requests = random_requests(20, seed=3)
    for request, completion in zip(requests, engine.generate(requests, greedy), strict=True):
        best = reference_logits(model, request.prompt_ids, completion.token_ids).argmax(-1)
        assert list(completion.token_ids) == best.tolist()
        assert_logprobs_match(model, request, completion, 1.0)


def test_truncation_keeps_the_untruncated_logprob() -> None:
    model, engine = loaded("llama")
    requests = random_requests(30, seed=5)
    greedy = engine.generate(requests, SamplingOptions(1.0, 1.0, 1, frozenset()))
    for request, completion in zip(requests, greedy, strict=True):
        logits = reference_logits(model, request.prompt_ids, completion.token_ids)
        assert completion.token_ids == tuple(logits.argmax(-1).tolist())
        assert_logprobs_match(model, request, completion, 1.0)


def test_update_replaces_the_policy_and_its_version() -> None:
    model, engine = loaded("qwen3")
    requests = random_requests(8, seed=6)
    first = engine.generate(requests, PLAIN)
    other = make_model(CONFIGS["qwen3"](), seed=1)
    give(engine, other.named_parameters(), version=4)
    second = engine.generate(requests, PLAIN)
    assert engine.policy_version == 4
    assert [c.token_ids for c in first] != [c.token_ids for c in second]
    assert {c.policy_versions[0].version for c in second} == {4}
    for request, completion in zip(requests, second, strict=True):
        assert_logprobs_match(other, request, completion, 1.0)
    give(engine, model.named_parameters(), version=5)
    assert [c.token_ids for c in first] == [c.token_ids for c in engine.generate(requests, PLAIN)]


def test_later_changes_of_the_senders_tensors_do_not_reach_the_engine() -> None:
    model, engine = loaded("qwen3")
    requests = random_requests(8, seed=6)
    before = engine.generate(requests, PLAIN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert engine.generate(requests, PLAIN) == before


def test_receiving_weights_returns_the_checksum_of_every_tensor() -> None:
    config = CONFIGS["qwen3_tied"]()
    model = make_model(config)
    engine = make_engine(config)
    checksums = give(engine, model.named_parameters(), version=0)
    assert checksums == {name: tensor_checksum(parameter) for name, parameter in model.named_parameters()}
    assert "lm_head.weight" not in checksums


def test_a_tied_head_may_be_sent_but_must_equal_the_embedding() -> None:
    config = CONFIGS["qwen3_tied"]()
    model = make_model(config)
    engine = make_engine(config)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in give(engine, named.items(), version=0)
    named["lm_head.weight"] = named["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        give(engine, named.items(), version=1)
    assert engine.policy_version == 0


def _break(kind: str, named: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    norm = "model.layers.1.input_layernorm.weight"
    items = list(named.items())
    if kind == "unknown":
        return [*items, ("model.layers.9.bias", torch.zeros(1))]
    if kind == "missing":
        return [(name, tensor) for name, tensor in items if name != norm]
    if kind == "twice":
        return [*items, (norm, named[norm])]
    changed = named[norm][:-1] if kind == "shape" else named[norm].bfloat16()
    return [(name, changed if name == norm else tensor) for name, tensor in items]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown", r"'model.layers.9.bias' is not a parameter"),
        ("missing", r"lacks 1 of \d+ tensors, first 'model.layers.1.input_layernorm.weight'"),
        ("twice", r"'model.layers.1.input_layernorm.weight' was sent twice"),
        ("shape", r"'model.layers.1.input_layernorm.weight' has shape \(31,\), the model's is \(32,\)"),
        ("dtype", r"'model.layers.1.input_layernorm.weight' has dtype torch.bfloat16"),
    ],
)
def test_a_refused_update_names_the_tensor_and_leaves_the_old_policy(kind: str, message: str) -> None:
    _, engine = loaded("qwen3")
    requests = random_requests(4, seed=7)
    before = engine.generate(requests, PLAIN)
    other = dict(make_model(CONFIGS["qwen3"](), seed=1).named_parameters())
    with pytest.raises(ValueError, match=message):
        give(engine, _break(kind, other), version=4)
    assert engine.generate(requests, PLAIN) == before
    with pytest.raises(RuntimeError, match="no weights were received"):
        engine.commit_weights(4)


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (
            GenerateRequest((1, VOCABULARY), 0, 4),
            PLAIN,
            r"request 1: prompt ids must lie in .* 0..28, got 1..29",
        ),
        (GenerateRequest((1,) * 60, 0, 5), PLAIN, r"request 1: 60 prompt tokens .* must not exceed .* 64"),
        (
            GenerateRequest((1,), 0, 1),
            SamplingOptions(1.0, 1.0, 0, frozenset({-1})),
            r"stop token -1 must lie in the vocabulary",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_named(
    request_: GenerateRequest, options: SamplingOptions, message: str
) -> None:
    _, engine = loaded("qwen3")
    with pytest.raises(ValueError, match=message):
        engine.generate([GenerateRequest((1,), 0, 1), request_], options)


def test_the_models_last_position_can_be_used() -> None:
    model, engine = loaded("llama")
    requests = [GenerateRequest((1,) * 60, 0, 4), GenerateRequest((2, 3), 1, 62)]
    for request, completion in zip(requests, engine.generate(requests, PLAIN), strict=True):
        assert len(completion.token_ids) == request.max_new_tokens
        assert_logprobs_match(model, request, completion, 1.0)


def test_generation_needs_weights_and_an_open_engine() -> None:
    engine: RolloutEngine = make_engine(CONFIGS["qwen3"]())
    assert engine.policy_version == -1
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.generate(random_requests(1, seed=0), PLAIN)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(random_requests(1, seed=0), PLAIN)
    with pytest.raises(RuntimeError, match="closed"):
        give(engine, [], version=0)


def test_no_requests_give_no_completions() -> None:
    _, engine = loaded("qwen3")
    assert engine.generate([], PLAIN) == []


def test_nan_weights_are_an_error_and_not_a_sample() -> None:
    model, engine = loaded("qwen3")
    broken = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    broken["model.norm.weight"][0] = float("nan")
    give(engine, broken.items(), version=4)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        engine.generate(random_requests(3, seed=0), PLAIN)


def test_a_model_with_sliding_windows_is_refused() -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ValueError, match="full attention only"):
        make_engine(config)


def test_building_and_generating_leaves_torchs_generator_alone() -> None:
    model = make_model(CONFIGS["qwen3"]())
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    engine = make_engine(CONFIGS["qwen3"]())
    give(engine, model.named_parameters(), version=0)
    engine.generate(random_requests(4, seed=0), PLAIN)
    assert torch.equal(torch.get_rng_state(), expected)


def test_bf16_weights_give_fp32_logprobs_of_the_bf16_model() -> None:
    config = CONFIGS["qwen3"]()
    model = make_model(config).bfloat16()
    engine = make_engine(config, dtype=torch.bfloat16)
    give(engine, model.named_parameters(), version=0)
    request = GenerateRequest((3, 1, 4, 1, 5), 9, 10)
    completion = engine.generate([request], PLAIN)[0]
    logits = reference_logits(model, request.prompt_ids, completion.token_ids).float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    # bf16 keeps 8 bits: logits of size ~4 differ by 2^-6 with the order of the sums.
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=0.15)
    assert max(-value for value in completion.logprobs) > 0.15


def test_max_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_batch_size=0"):
        make_engine(CONFIGS["qwen3"](), max_batch_size=0)


def test_experts_arrive_one_by_one_and_answer_like_transformers(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen3_moe", tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tensors = load_file(folder / "model.safetensors")
    assert any(".experts.3.up_proj.weight" in name for name in tensors)
    engine = make_engine(model.config)
    checksums = give(engine, tensors.items(), version=0)
    assert checksums == engine.held_checksums() == {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    requests = random_requests(5, seed=0, longest=6, new=6)
    requests = [GenerateRequest(tuple(i % 25 for i in r.prompt_ids), r.seed, r.max_new_tokens) for r in requests]
    for request, completion in zip(requests, engine.generate(requests, PLAIN), strict=True):
        logits = reference_logits(model, request.prompt_ids, completion.token_ids)
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), chosen, atol=1e-5)
    with pytest.raises(ValueError, match=r"lacks 1 of .*experts\.2\.gate_proj"):
        engine.receive_weights(
            (n, t) for n, t in tensors.items() if n != "model.layers.1.mlp.experts.2.gate_proj.weight"
        )
