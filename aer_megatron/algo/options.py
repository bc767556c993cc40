"""The options of the algorithm, ``[algo]`` and the tables below it, with their defaults; config.py has all others.

This file does NOT hold formulas.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aer_megatron.config_section import Section


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
    divide_by_std: bool = Field(True, description="False: Dr.GRPO's advantage (no division by the group's std)")
    std_epsilon: float = Field(1e-6, gt=0)
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio clipped below 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratio clipped above 1 + clip_high (Clip-Higher: 0.28)")
    dual_clip: float = Field(0.0, ge=0, description="lower bound c > 1 on negative-advantage ratios; 0 = off")
    policy_loss: Literal["clip", "clip_cov", "kl_cov"] = Field("clip", description="token rule; see docs/aer.md")
    clip_cov_fraction: float = Field(2e-4, gt=0, le=1, description="share of tokens that clip_cov silences")
    clip_cov_low: float = Field(1.0, description="clip_cov picks among covariances above this")
    clip_cov_high: float = Field(5.0, description="clip_cov picks among covariances below this")
    kl_cov_fraction: float = Field(2e-3, gt=0, le=1, description="share of tokens, the highest, that kl_cov penalises")
    kl_cov_coefficient: float = Field(1.0, ge=0, description="weight of kl_cov's |logprob - old logprob|")
    normalizer: Literal["tokens", "sequences", "constant"] = Field(
        "tokens", description="the loss is a mean over tokens, over sequences, or over sequences * max_new_tokens"
    )
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the k3 KL to the policy of model.path; 0 = off")
    tis_clip: float = Field(0.0, ge=0, description="bound of the train/rollout importance weight (usual: 2); 0 = off")
    overlong_buffer: int = Field(0, ge=0, description="last tokens before max_new_tokens that cost reward; 0 = off")
    overlong_penalty: float = Field(1.0, gt=0, description="reward taken from a response of max_new_tokens tokens")
    entropy: EntropySection = EntropySection()
    ledger: LedgerSection = LedgerSection()
    selection: SelectionSection = SelectionSection()

    def check_loss_options(self, max_new_tokens: int) -> None:
        """Raises ValueError where options of the loss do not fit together, naming the remedy."""
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError(f"algo.dual_clip={self.dual_clip} must be greater than 1 (usual: 3), or 0 for off")
        if self.dual_clip and self.policy_loss == "kl_cov":
            raise ValueError(f"algo.dual_clip={self.dual_clip} must be 0: algo.policy_loss='kl_cov' clips nothing")
        if not self.clip_cov_low < self.clip_cov_high:
            raise ValueError(f"algo.clip_cov_low={self.clip_cov_low} must be below clip_cov_high={self.clip_cov_high}")
        if 0 < self.tis_clip < 1:
            raise ValueError(f"algo.tis_clip={self.tis_clip} would cut equal policies; use at least 1 (usual: 2), or 0")
        if self.overlong_buffer >= max_new_tokens:
            raise ValueError(f"algo.overlong_buffer={self.overlong_buffer} must be < max_new_tokens={max_new_tokens}")
