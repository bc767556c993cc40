"""What a KL estimator is: a rule for KL(policy || reference) of one token from its two log-probabilities.

Shape suffix: T packed sampled tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aer_megatron.config_section import Rule

if TYPE_CHECKING:
    from torch import Tensor


class KlEstimator(Rule):
    """An estimate per token (Schulman, "Approximating KL divergence"), from ``[algo.kl_estimator]``.

    What a loss differentiates is the estimate times ``ratio``. The gradient of KL(policy || reference) is that of k1 or
    k3 times the live ratio, of k2 times the detached one, and of k2 without a ratio while the policy is the sampler.
    k3 without a ratio (GRPO as printed) has the gradient of KL(reference || policy) on policy (docs/aer.md).
    """

    ratio: Literal["none", "live", "detached"] = Field(
        "none", description="the estimate is multiplied by pi / pi_old: not at all, with its gradient, without it"
    )

    @abstractmethod
    def estimate(self, log_ratio_T: Tensor) -> Tensor:
        """Returns the estimate in nats, fp32 [T].

        Args:
            log_ratio_T: x = ref_logprob - logprob in nats, limited to +-20, fp32 [T], with the graph of logprob.
        """
