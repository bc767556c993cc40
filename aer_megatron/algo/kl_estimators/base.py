"""What a KL estimator is: a rule for KL(policy || reference) of one token from its two log-probabilities.

Shape suffix: T packed sampled tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from aer_megatron.config_section import Rule

if TYPE_CHECKING:
    from torch import Tensor


class KlEstimator(Rule):
    """An estimate per token (Schulman, "Approximating KL divergence"), from ``[algo.kl_estimator]``."""

    @abstractmethod
    def estimate(self, log_ratio_T: Tensor) -> Tensor:
        """Returns the estimate in nats, fp32 [T].

        Args:
            log_ratio_T: x = ref_logprob - logprob in nats, limited to +-20, fp32 [T], with the graph of logprob.
        """
