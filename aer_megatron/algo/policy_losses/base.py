"""What a policy loss is: a rule that says what each token costs. algo/loss.py does the rest, once for all of them:
importance weights, the KL to a reference policy, the entropy bonus, the normaliser.

The tensors come and go as methods, so that reading a run file needs no torch.

Shape suffix: T packed sampled tokens of one part of the batch (T = 0 is a legal part).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from aer_megatron.algo.statistics import TokenSums
from aer_megatron.config_section import Rule
from aer_megatron.types import BoolArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a policy loss knows of each token: fp32 [T], without a graph where not said otherwise."""

    logprob_T: Tensor  # log pi(token) in nats under the policy being trained, with graph
    log_ratio_T: Tensor  # log pi(token) - log pi_old(token), limited to +-20, with graph
    advantage_T: Tensor  # A of the token's sequence
    selected_T: Tensor | None = None  # bool: what ``select`` picked; None for a rule that selects nothing
    # mean of log_ratio over the sampled tokens of the token's whole sequence; None unless ``of_sequences``
    sequence_log_ratio_T: Tensor | None = None


class PolicyLoss(Rule):
    """The policy loss of a token, with the options of ``[algo.policy_loss]`` as fields.

    A class of a run's own names in ``reports`` the numbers that it reports, metrics ``user/NAME``. One that defines
    ``select`` has tokens picked from the whole mini-batch, which ``token_loss`` is told.
    """

    reports: ClassVar[tuple[str, ...]] = ()
    of_sequences: ClassVar[bool] = False  # whether ``token_loss`` needs the ratio of whole sequences

    @property
    def selects(self) -> bool:
        """Whether the class has a ``select`` of its own, which is asked before each optimizer step."""
        return type(self).select is not PolicyLoss.select

    @abstractmethod
    def token_loss(self, tokens: PolicyTokens) -> tuple[Tensor, TokenSums]:
        """Returns (the loss of each token, what is reported of them).

        A token's loss may depend on its own numbers alone: how the batch is cut into parts is the layout's business.

        Returns:
            The loss fp32 [T], to be minimised, and (sum, count) by name: ``CLIP_STATISTICS`` (tokens whose gradient
            a bound removes) and ``reports``, all or some, without a graph; see ``algo/statistics.py``.
        """

    def select(
        self,
        advantage_T: NDArray[np.floating],
        logprob_T: NDArray[np.floating],
        old_logprob_T: NDArray[np.floating],
        *,
        key: tuple[int, int],
    ) -> BoolArray:
        """Returns bool [T]: what the rule picks from the T sampled tokens of the whole mini-batch.

        Args:
            advantage_T: A of the token's sequence.
            logprob_T: log pi(token) in nats under the policy being trained, at this optimizer step.
            old_logprob_T: log pi(token) at the start of the rollout step.
            key: (seed, update), both >= 0: whatever is random depends on nothing else.
        """
        raise NotImplementedError("only asked of a class that defines it")
