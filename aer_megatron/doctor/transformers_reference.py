"""A whole, unsharded, fp32 model of transformers that says what log-probabilities, entropy and gradient should be.

It reads the checkpoint's own config.json and shares nothing with the policy but the formula of the loss: what all
layouts of the policy get wrong together (a rope base, a mapped tensor) shows here. Where it contradicts, ``explain``
looks for the one change of the reference that reproduces the contradicting numbers, which names the cause.

Shape suffixes: T packed sampled tokens, t sampled tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aer_megatron.actor.batching import sampled_positions
from aer_megatron.algo.loss import TokenData, policy_loss, sequence_weights
from aer_megatron.config import Config
from aer_megatron.doctor.diagnosis import Explanation, ExplanationKind, fit_temperature
from aer_megatron.doctor.layout_comparison import Truth
from aer_megatron.types import Experience, Float32Array, TrainBatch

# bases of published models and the ones that a forgotten option falls back to
ROPE_BASES = (1e4, 1e5, 2.5e5, 5e5, 1e6, 5e6, 1e7)
_ACCEPTED = 0.1  # an explanation must leave less than this share of the error


class TransformersReference:
    """The model of ``folder`` in fp32 on ``device``; scores are taken at ``temperature``, gradients with ``config``."""

    def __init__(self, folder: str | Path, config: Config, *, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        build: Any = AutoModelForCausalLM.from_pretrained
        self._model: Any = build(folder, dtype=torch.float32, attn_implementation="eager").to(device).eval()
        for module in self._model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None  # transformers drops the gradient of the padding token's row
        self._device = device
        self._config = config
        self._temperature = config.rollout.temperature

    @torch.no_grad()
    def logprobs(self, experience: Experience) -> Float32Array:
        """Returns the log-probability of every sampled token, fp32 [T]."""
        parts = [logprob_t for logprob_t, _ in self._scores(experience)]
        result: Float32Array = torch.cat(parts).float().cpu().numpy()
        return result

    def truth(self, batch: TrainBatch) -> Truth:
        """Returns loss, entropy and gradient norm of ``batch``; the gradient costs a second copy of the weights."""
        scores = list(self._scores(batch.experience))
        logprob_T = torch.cat([logprob_t for logprob_t, _ in scores])
        entropy_T = torch.cat([entropy_t for _, entropy_t in scores])
        num_tokens = len(logprob_T)
        output = policy_loss(
            logprob_T,
            entropy_T,
            tokens=self._token_data(batch),
            normalizer=float(num_tokens),
            config=self._config.algo,
        )
        self._model.zero_grad()
        output.loss.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.double().square().sum() for p in self._model.parameters() if p.grad is not None]
        norm = float(torch.stack(grads).sum().sqrt())
        self._model.zero_grad(set_to_none=True)
        return Truth(
            logprob_T=logprob_T.detach().float().cpu().numpy(),
            token_entropy=float(entropy_T.detach().double().mean()),
            loss=float(output.loss.detach()),
            grad_norm=norm,
        )

    @torch.no_grad()
    def explain(self, experience: Experience, target_T: Float32Array) -> Explanation | None:
        """Returns the change of temperature, rope or weights under which the reference gives ``target_T``, if any.

        Tried are any temperature, the rope bases of published models with and without rope scaling, and an exchange of
        two tensors of one shape in every layer. The best one counts, if it leaves less than a tenth of the error.
        """
        before = _mean_error(self.logprobs(experience), target_T)
        found = [self._explain_temperature(experience, target_T, before)]
        for kind, text, change in self._changes():
            with change():
                found.append(Explanation(kind, text, before, _mean_error(self.logprobs(experience), target_T)))
        best = min(found, key=lambda explanation: explanation.error_after)
        return best if best.error_after <= _ACCEPTED * before else None

    def _explain_temperature(self, experience: Experience, target_T: Float32Array, before: float) -> Explanation:
        logits = [(logits_tV, label_t) for logits_tV, label_t in self._logits(experience)]
        target = torch.from_numpy(target_T).to(self._device)

        def error(temperature: float) -> float:
            parts = [_logprob(logits_tV / temperature, label_t) for logits_tV, label_t in logits]
            return float((torch.cat(parts) - target).abs().double().mean())

        temperature, after = fit_temperature(error)
        text = f"temperature {temperature:.4g} instead of {self._temperature:.4g}"
        return Explanation("temperature", text, before, after)

    def _changes(self) -> Iterator[tuple[ExplanationKind, str, Callable[[], Any]]]:
        rotary = [module for module in self._model.modules() if hasattr(module, "inv_freq")]
        if rotary:
            own = rotary[0].inv_freq
            width = 2 * len(own)
            base = float(self._model.config.rope_parameters["rope_theta"])
            plain = _inverse_frequencies(base, width, own)
            if not torch.allclose(plain, own, rtol=1e-5):
                text = "the plain rope, without the scaling of config.json"
                yield "rope scaling", text, lambda: _frequencies(rotary, plain)
            for other in ROPE_BASES:
                if other == base:
                    continue
                text = f"rope base {other:g} instead of {base:g}"
                yield "rope base", text, _bound(_frequencies, rotary, _inverse_frequencies(other, width, own))
                scaled = own * (_inverse_frequencies(other, width, own) / plain)
                if not torch.allclose(plain, own, rtol=1e-5):
                    yield "rope base", f"{text} (scaled as before)", _bound(_frequencies, rotary, scaled)
        for first, second in self._exchangeable():
            yield "exchange", f"{first} and {second} exchanged in every layer", _bound(self._exchanged, first, second)

    def _exchangeable(self) -> list[tuple[str, str]]:
        """Returns the pairs of parameters of one shape in a layer, by their names with numbers replaced by ``*``."""
        shapes: dict[str, torch.Size] = {}
        for name, parameter in self._model.named_parameters():
            if re.search(r"\.\d+\.", name):
                shapes.setdefault(_pattern(name), parameter.shape)
        return [pair for pair in itertools.combinations(shapes, 2) if shapes[pair[0]] == shapes[pair[1]]]

    @contextmanager
    def _exchanged(self, first: str, second: str) -> Iterator[None]:
        ones = [p for name, p in self._model.named_parameters() if _pattern(name) == first]
        others = [p for name, p in self._model.named_parameters() if _pattern(name) == second]
        _swap(ones, others)
        try:
            yield
        finally:
            _swap(ones, others)

    def _scores(self, experience: Experience) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (log-probability [t], entropy [t]) of each sequence's sampled tokens."""
        for logits_tV, label_t in self._logits(experience):
            logprob_tV = (logits_tV / self._temperature).log_softmax(-1)
            entropy_t = -(logprob_tV.exp() * logprob_tV).sum(-1)
            yield logprob_tV.gather(1, label_t[:, None]).squeeze(1), entropy_t

    def _logits(self, experience: Experience) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for index, length in enumerate(experience.length_B.tolist()):
            ids = torch.from_numpy(experience.token_ids_L[start : start + length]).to(self._device)
            position_t = torch.from_numpy(sampled_positions(experience, index, start)).to(self._device)
            start += length
            yield self._model(ids[None], use_cache=False).logits[0, position_t - 1], ids[position_t]

    def _token_data(self, batch: TrainBatch) -> TokenData:
        length_B = batch.experience.sampled_length_B
        weight_B = sequence_weights(
            length_B, rule=self._config.algo.normalizer, max_new_tokens=self._config.rollout.max_new_tokens
        )

        def tensor(values: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self._device)

        return TokenData(
            old_logprob_T=tensor(batch.old_logprob_T),
            advantage_T=tensor(np.repeat(batch.advantage_B, length_B)),
            entropy_weight_T=tensor(np.repeat(batch.entropy_weight_B, length_B)),
            mean_weight_T=tensor(np.repeat(weight_B, length_B)),
            selected_T=None,
            ref_logprob_T=None,
        )


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _swap(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        one.data, other.data = other.data, one.data


def _inverse_frequencies(base: float, width: int, like: Tensor) -> Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
    return 1.0 / base**exponent


@contextmanager
def _frequencies(rotary: list[Any], values: Tensor) -> Iterator[None]:
    before = [module.inv_freq for module in rotary]
    for module in rotary:
        module.inv_freq = values
    try:
        yield
    finally:
        for module, own in zip(rotary, before, strict=True):
            module.inv_freq = own


def _logprob(logits_tV: Tensor, label_t: Tensor) -> Tensor:
    return logits_tV.log_softmax(-1).gather(1, label_t[:, None]).squeeze(1)


def _mean_error(logprob_T: Float32Array, target_T: Float32Array) -> float:
    return float(np.abs(logprob_T.astype(np.float64) - target_T).mean())
