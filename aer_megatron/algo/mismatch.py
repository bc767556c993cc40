"""How far the policy that sampled is from the policy that trains: per-token differences of their log-probabilities.

x_t = log pi_train(o_t) - log pi_rollout(o_t), w_t = exp(x_t): the tokens o_t were sampled by the rollout engine, with
its weights (older ones, where rollouts are stale), kernels and precision.

Shape suffix: T packed sampled tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aer_megatron.types import Float32Array

# the loss limits log-ratios likewise: beyond it a weight says no more, and its square would overflow
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Sums over the sampled tokens of a batch, in float64; never means.

    Example, two tokens with x = 0 and x = ln 2: ``Mismatch(num_tokens=2, largest=0.693, difference_sum=0.693,
    k3_sum=0.307, weight_sum=3.0, weight_square_sum=5.0)``.
    """

    num_tokens: int
    largest: float  # max |x|, nats
    difference_sum: float  # of |x|, nats
    k3_sum: float  # of exp(x) - 1 - x, nats
    weight_sum: float  # of w
    weight_square_sum: float  # of w^2

    @property
    def difference_mean(self) -> float:
        """Mean of |x| in nats; 0 without tokens."""
        return self.difference_sum / max(1, self.num_tokens)

    @property
    def kl(self) -> float:
        """Mean of exp(x) - 1 - x in nats, never negative: the k3 estimate of KL(rollout || train).

        Source: Schulman, "Approximating KL divergence", for tokens that the first policy sampled.
        """
        return self.k3_sum / max(1, self.num_tokens)

    @property
    def sample_size(self) -> float:
        """Kish's effective sample size of the weights as a share of the tokens: (sum w)^2 / (n sum w^2); 1 = equal."""
        if not self.num_tokens:
            return math.nan
        return self.weight_sum**2 / (self.num_tokens * self.weight_square_sum)

    def check_same_policy(self, gate: float) -> None:
        """Refuses a policy that is not the one that sampled: wrong weights, temperature or positions.

        Raises:
            RuntimeError: a sampled token's log-probabilities differ by more than ``gate`` nats; 0 = no gate.
        """
        # what is not finite is named by the update that it would make (run.on_nonfinite)
        if gate and self.largest > gate:
            raise RuntimeError(
                f"at step 0 the rollout engine and the trainer differ by {self.largest:.3g} nats in a sampled "
                f"token's log-probability, more than rollout.logprob_gate={gate}: they do not hold the same policy "
                "(weights, temperature, dtype); raise the gate for bf16, or look for the cause"
            )


def measure_mismatch(train_logprob_T: Float32Array, rollout_logprob_T: Float32Array) -> Mismatch:
    """Returns the mismatch of a batch whose tokens the rollout engine sampled; natural logarithms, fp32 [T] each.

    Raises:
        ValueError: the shapes differ.
    """
    if train_logprob_T.shape != rollout_logprob_T.shape:
        raise ValueError(
            f"train_logprob_T {train_logprob_T.shape} and rollout_logprob_T {rollout_logprob_T.shape} must have one "
            "entry per sampled token; score the batch that was sampled"
        )
    x_T = train_logprob_T.astype(np.float64) - rollout_logprob_T
    limited_T = np.clip(x_T, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    weight_T = np.exp(limited_T)
    return Mismatch(
        num_tokens=len(x_T),
        largest=float(np.abs(x_T).max(initial=0.0)),
        difference_sum=float(np.abs(x_T).sum()),
        # expm1 keeps what exp(x) - 1 loses where the policies nearly agree
        k3_sum=float((np.expm1(limited_T) - limited_T).sum()),
        weight_sum=float(weight_T.sum()),
        weight_square_sum=float(np.square(weight_T).sum()),
    )
