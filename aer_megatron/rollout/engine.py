"""The contract between the trainer and whatever generates text: token ids in, token ids out.

``RolloutEngine`` is structural: the embedded engine and server clients satisfy it without inheriting from it.
What every engine owes the trainer:

* one completion per request, in the order of the requests;
* ``logprobs`` of softmax(logits / temperature), of softmax(logits) where the temperature is 0, before top-p/top-k
  truncation, in fp32, natural logarithm;
* the policy version of every token;
* randomness that is a function of the request's own seed, so that a request does not depend on its
  neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from aer_megatron.types import Completion


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion to sample.

    Example: ``GenerateRequest(prompt_ids=(4, 1, 6), seed=0x51A7, max_new_tokens=16)``; ``seed`` is unsigned
    64-bit.

    Raises:
        ValueError: an empty prompt, a length below 1 or a seed outside 64 bits.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: a prompt needs at least one token; add a BOS or an instruction")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1; raise it")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed} must be an unsigned 64-bit integer; reduce it modulo 2**64")


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn, the same for all requests of a call.

    ``temperature = 0`` is greedy: the token of the largest logit, of equal ones that with the lowest id.

    Top-k and top-p are applied jointly to softmax(logits / temperature): a token is kept if it is among the
    ``top_k`` most probable ones (0 = all) and the tokens before it hold less than ``top_p`` of the mass.
    Generation ends after a token of ``stop_token_ids``, which stays part of the completion.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: frozenset[int]

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; use 0 for greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; use 1 to switch it off")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; use 0 to switch it off")


class RolloutEngine(Protocol):
    """Generates completions from the policy it was last given."""

    @property
    def policy_version(self) -> int:
        """Returns the version of the weights in use; -1 before any weights came."""
        ...

    def generate(self, requests: Sequence[GenerateRequest], options: SamplingOptions) -> list[Completion]:
        """Returns one completion per request, in order.

        Raises:
            ValueError: a request the model cannot take, naming it.
            RuntimeError: the engine has no weights, is closed or failed.
        """
        ...


@runtime_checkable
class RacingEngine(Protocol):
    """An engine whose requests run beside one another, so that groups of them can race."""

    def generate_first(
        self, groups: Sequence[Sequence[GenerateRequest]], options: SamplingOptions, *, wanted: int
    ) -> dict[int, list[Completion]]:
        """Returns the completions of the ``wanted`` groups that are whole first, by index; gives up the others."""
        ...
