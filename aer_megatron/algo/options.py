"""The options of the algorithm, ``[algo]`` and the tables below it, with their defaults; config.py has all others.

This file does NOT hold formulas.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from aer_megatron.algo.advantages.base import Advantage
from aer_megatron.algo.advantages.dr_grpo import DrGrpo
from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.kl_estimators.base import KlEstimator
from aer_megatron.algo.kl_estimators.k2 import K2
from aer_megatron.algo.kl_estimators.k3 import K3
from aer_megatron.algo.policy_losses.base import PolicyLoss
from aer_megatron.algo.policy_losses.clip import Clip
from aer_megatron.algo.policy_losses.clip_cov import ClipCov
from aer_megatron.algo.policy_losses.kl_cov import KlCov
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
    "algo.std_epsilon": "it is algo.advantage.std_epsilon, of the kind grpo",
}


class EntropySection(Section):
    """Entropy rule; formulas and provenance in docs/aer.md and algo/controller.py."""

    kind: Literal["aer", "fixed", "skywork", "none"] = "aer"
    shadow: bool = Field(False, description="log what the controller would do; the loss uses coefficient 0")
    # difficulty-aware allocation
    difficulty: Literal["linear_deficit", "threshold", "complement"] = "linear_deficit"
    rho: float = Field(0.5, gt=0, le=1, description="accuracy from which a prompt counts as easy")
    source: Literal["group", "ledger"] = Field("group", description="accuracy from this step's group or the ledger")
    normalize: Literal["none", "mean"] = Field("none", description="mean: d / max(its batch mean, difficulty_floor)")
    # initial-anchored target
    tau: float = Field(0.4, gt=0, description="target entropy as a fraction of the initial entropy")
    # dynamic global coefficient
    update: Literal["proportional", "sign", "pi"] = "proportional"
    eta: float = Field(1e-3, gt=0, description="gain of the integral (nat^-1 per step)")
    k_p: float = Field(0.0, ge=0, description="proportional gain of the pi update (nat^-1)")
    alpha_max: float = Field(0.05, gt=0, description="hard upper bound of the coefficient")
    max_change: float = Field(0.0, ge=0, description="largest change of alpha in one step; 0 = no rate limit")
    difficulty_floor: float = Field(0.02, ge=0, description="mean d below which the integrator freezes; see normalize")
    alarm_low: float = Field(0.7, ge=0, description="collapse alarm below this fraction of the target; 0 = off")
    alarm_high: float = Field(
        1.5, ge=0, description="explosion alarm above this multiple of the initial entropy; 0 = off"
    )
    mismatch_bound: float = Field(
        0.1, ge=0, description="alpha is held above this KL (nats) between rollout engine and trainer; 0 = off"
    )
    # baselines
    coefficient: float = Field(1e-3, ge=0, description="constant coefficient of kind = fixed")
    skywork_target: float = Field(0.2, gt=0, description="entropy target of kind = skywork, nats")
    skywork_delta: float = Field(1e-4, gt=0, description="coefficient step of kind = skywork")
    skywork_max: float = Field(0.005, gt=0, description="upper bound of the coefficient of kind = skywork")


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


class AlgoSection(Section):
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per rollout batch")
    normalizer: Literal["tokens", "sequences", "constant"] = Field(
        "tokens", description="the loss is a mean over tokens, over sequences, or over sequences * max_new_tokens"
    )
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the KL to the policy of model.path; 0 = off")
    tis_clip: float = Field(0.0, ge=0, description="bound of the train/rollout importance weight (usual: 2); 0 = off")
    overlong_buffer: int = Field(0, ge=0, description="last tokens before max_new_tokens that cost reward; 0 = off")
    overlong_penalty: float = Field(1.0, gt=0, description="reward taken from a response of max_new_tokens tokens")
    policy_loss: Annotated[PolicyLoss, OneOf(PolicyLoss, Clip, ClipCov, KlCov)] = Field(
        Clip(), description="what a token costs; docs/aer.md"
    )
    advantage: Annotated[Advantage, OneOf(Advantage, Grpo, DrGrpo)] = Field(
        Grpo(), description="how a reward is compared with those of its group"
    )
    kl_estimator: Annotated[KlEstimator, OneOf(KlEstimator, K3, K2)] = Field(
        K3(), description="how that KL is estimated from two log-probabilities"
    )
    entropy: EntropySection = EntropySection()
    ledger: LedgerSection = LedgerSection()
    selection: SelectionSection = SelectionSection()

    @property
    def reports(self) -> tuple[str, ...]:
        """The numbers of their own that the rules report."""
        return (*self.policy_loss.reports, *self.advantage.reports)

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
                    f"algo.policy_loss and algo.advantage report {self.reports}: {name!r} must be a snake_case name "
                    "that no other number of the loss has; rename it"
                )
        if 0 < self.tis_clip < 1:
            raise ValueError(f"algo.tis_clip={self.tis_clip} would cut equal policies; use at least 1 (usual: 2), or 0")
        if self.overlong_buffer >= max_new_tokens:
            raise ValueError(f"algo.overlong_buffer={self.overlong_buffer} must be < max_new_tokens={max_new_tokens}")
