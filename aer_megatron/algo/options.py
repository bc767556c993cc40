"""The options of the algorithm, ``[algo]`` and the tables below it, with their defaults; options/ has all others.

This file does NOT hold formulas.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.algo.advantages.dr_grpo import DrGrpo
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.advantages.max_at_k import MaxAtK, PassAtK
from aer_megatron.algo.advantages.rloo import Rloo
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.base import EntropyRule
from aer_megatron.algo.entropy_rules.fixed import Fixed
from aer_megatron.algo.entropy_rules.none import NoBonus
from aer_megatron.algo.entropy_rules.skywork import Skywork
from aer_megatron.algo.kl_estimators.base import KlEstimator
from aer_megatron.algo.kl_estimators.k1 import K1
from aer_megatron.algo.kl_estimators.k2 import K2
from aer_megatron.algo.kl_estimators.k3 import K3
from aer_megatron.algo.policy_losses.base import PolicyLoss
from aer_megatron.algo.policy_losses.cispo import Cispo
from aer_megatron.algo.policy_losses.clip import Clip
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.gspo import Gspo
from aer_megatron.algo.policy_losses.kl_cov import KlCov
from aer_megatron.algo.policy_losses.reinforce import Reinforce
from aer_megatron.algo.statistics import LOSS_STATISTICS
from aer_megatron.config_section import OneOf, Section

_LABEL = re.compile(r"[a-z][a-z0-9_]*")

# what is told who gives an option of former versions
MOVED_OPTIONS = {
    "algo.policy_loss": "write algo.policy_loss.kind",
    "algo.clip_low": "it is algo.policy_loss.clip_low, of the kinds clip and clip_cov",
    "algo.clip_high": "it is algo.policy_loss.clip_high, of the kinds clip and clip_cov",
    "algo.dual_clip": "it is algo.policy_loss.dual_clip, of the kinds clip and clip_cov",
    "algo.clip_cov_fraction": "it is algo.policy_loss.fraction under algo.policy_loss.kind='clip_cov'",
    "algo.clip_cov_low": "it is algo.policy_loss.covariance_low under algo.policy_loss.kind='clip_cov'",
    "algo.clip_cov_high": "it is algo.policy_loss.covariance_high under algo.policy_loss.kind='clip_cov'",
    "algo.kl_cov_fraction": "it is algo.policy_loss.fraction under algo.policy_loss.kind='kl_cov'",
    "algo.kl_cov_coefficient": "it is algo.policy_loss.coefficient under algo.policy_loss.kind='kl_cov'",
    "algo.divide_by_std": "write algo.advantage.kind='grpo' for true, 'dr_grpo' for false",
    "algo.entropy.skywork_target": "it is algo.entropy.target under algo.entropy.kind='skywork'",
    "algo.entropy.skywork_delta": "it is algo.entropy.delta under algo.entropy.kind='skywork'",
    "algo.entropy.skywork_max": "it is algo.entropy.alpha_max under algo.entropy.kind='skywork'",
    "algo.tis_clip": "write algo.correction.weight='token' and algo.correction.high, or weight='none' for 0",
    "algo.std_epsilon": "it is algo.advantage.std_epsilon, of the kind grpo",
}


class LedgerSection(Section):
    decay: float = Field(0.9, gt=0, le=1, description="weight that a prompt's evidence keeps per step of age")
    prior_success: float = Field(1.0, gt=0, description="a0 of the Beta posterior")
    prior_failure: float = Field(1.0, gt=0, description="b0 of the Beta posterior")


class SelectionSection(Section):
    """Prompts whose outcome the ledger knows are passed over; algo/selection.py."""

    kind: Literal["none", "skip_decided"] = Field(
        "none", description="skip_decided: pass over prompts that are always or never solved (ledger.decay near 1)"
    )
    confidence: float = Field(0.9, gt=0, lt=1, description="posterior probability from which a prompt is decided")
    margin: float = Field(0.1, gt=0, lt=0.5, description="always: accuracy > 1 - margin; never: accuracy < margin")
    exploration: float = Field(0.1, gt=0, le=1, description="probability of taking a decided prompt all the same")
    min_attempts: int = Field(16, ge=1, description="rollouts of a prompt before it can be decided")
    max_rejections: int = Field(4, ge=1, description="prompts passed over per prompt wanted, at most")


class CorrectionSection(Section):
    """What is done about rollouts that another policy sampled: the engine's rounding, an older version."""

    weight: Literal["auto", "none", "token", "sequence", "geometric"] = Field(
        "auto",
        description="importance weight pi_old / pi_rollout: of the token, the product over its sequence, that one's "
        "geometric mean; auto: token where rollouts are stale or quantised, else none",
    )
    bound: Literal["truncate", "mask"] = Field("truncate", description="weights beyond the bounds are cut, or 0")
    low: float = Field(0.0, ge=0, description="lower bound of the weight; 0 = off")
    high: float = Field(2.0, ge=0, description="upper bound of the weight; 0 = off")
    reject: Literal["none", "token", "sequence", "geometric"] = Field(
        "none", description="ratio whose bounds decide which tokens have a policy loss, beside the weight"
    )
    reject_low: float = Field(0.0, ge=0, description="lower bound of that ratio; 0 = off")
    reject_high: float = Field(0.0, ge=0, description="upper bound of that ratio; 0 = off")
    veto: float = Field(0.0, ge=0, lt=1, description="a token's ratio below which its sequence is rejected; 0 = off")
    denominator: Literal["all", "kept"] = Field(
        "all", description="the loss is a mean over all sampled tokens, or rejected ones leave it altogether"
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is corrected; ``auto`` must be resolved (``Config.correction``)."""
        return self.weight != "none" or self.reject != "none" or self.veto > 0

    def check(self) -> None:
        """Raises ValueError for bounds that reject equal policies, or that nothing uses."""
        for low, high in (("low", "high"), ("reject_low", "reject_high")):
            bounds = getattr(self, low), getattr(self, high)
            if bounds[0] > 1 or 0 < bounds[1] < 1:
                raise ValueError(
                    f"algo.correction.{low}={bounds[0]:g}, {high}={bounds[1]:g} exclude 1, the ratio of equal "
                    f"policies; use {low} <= 1 <= {high} (usual: high = 2), or 0 for off"
                )
        if (self.reject == "none") == bool(self.reject_low or self.reject_high):
            raise ValueError(
                f"algo.correction.reject={self.reject!r} with reject_low={self.reject_low:g}, "
                f"reject_high={self.reject_high:g}: a ratio and a bound belong together; set both, or neither"
            )


class AlgoSection(Section):
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per rollout batch")
    normalizer: Literal["tokens", "sequences", "constant"] = Field(
        "tokens", description="the loss is a mean over tokens, over sequences, or over sequences * max_new_tokens"
    )
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the KL to the policy of model.path; 0 = off")
    overlong_buffer: int = Field(0, ge=0, description="last tokens before max_new_tokens that cost reward; 0 = off")
    overlong_penalty: float = Field(1.0, gt=0, description="reward taken from a response of max_new_tokens tokens")
    policy_loss: Annotated[PolicyLoss, OneOf(PolicyLoss, Clip, Gspo, Cispo, Reinforce, ClipCov, KlCov)] = Field(
        Clip(), description="what a token costs; docs/aer.md"
    )
    advantage: Annotated[Advantage, OneOf(Advantage, Grpo, DrGrpo, Rloo, MaxAtK, PassAtK)] = Field(
        Grpo(), description="how a reward is compared with those of its group"
    )
    kl_estimator: Annotated[KlEstimator, OneOf(KlEstimator, K3, K2, K1)] = Field(
        K3(), description="how that KL is estimated from two log-probabilities"
    )
    entropy: Annotated[EntropyRule, OneOf(EntropyRule, Aer, Fixed, Skywork, NoBonus)] = Field(
        Aer(), description="how entropy becomes the coefficient of the bonus; docs/aer.md"
    )
    correction: CorrectionSection = CorrectionSection()
    ledger: LedgerSection = LedgerSection()
    selection: SelectionSection = SelectionSection()

    @property
    def reports(self) -> tuple[str, ...]:
        """The numbers of their own that the rules report."""
        return (*self.policy_loss.reports, *self.advantage.reports, *self.entropy.reports)

    def check(self, group_size: int, max_new_tokens: int) -> None:
        """Raises ValueError where options do not fit together, or to the rollouts, naming the remedy."""
        if group_size < self.advantage.min_group_size:
            raise ValueError(
                f"rollout.group_size={group_size} leaves no group to compare with under "
                f"algo.advantage.kind={self.advantage.kind!r}; use at least {self.advantage.min_group_size}"
            )
        for name in self.reports:
            if not _LABEL.fullmatch(name) or name in LOSS_STATISTICS or self.reports.count(name) > 1:
                raise ValueError(
                    f"the rules of [algo] report {self.reports}: {name!r} must be a snake_case name that no other "
                    "number of the loss has; rename it"
                )
        estimator = self.kl_estimator
        if self.kl_coefficient and estimator.kind == "k1" and estimator.ratio != "live":
            raise ValueError(
                f"algo.kl_estimator.ratio={estimator.ratio!r} under kind='k1' penalises nothing: its expected "
                "gradient is zero on policy; set ratio='live', or kind='k2' or 'k3'"
            )
        self.correction.check()
        if self.overlong_buffer >= max_new_tokens:
            raise ValueError(f"algo.overlong_buffer={self.overlong_buffer} must be < max_new_tokens={max_new_tokens}")
