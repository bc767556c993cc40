"""Rules of a run's own, ``kind = "package.module:name"``: what is taken, what is refused at start, what they report."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aer_megatron.algo.advantage import group_advantages
from aer_megatron.algo.loss import policy_loss
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.report.training import user_metrics
from tests.support.experiences import experience_of
from tests.support.tokens import token_data

MODULE = """
    from typing import ClassVar
    from pydantic import Field
    from aer_megatron.algo.advantages.base import Advantage
    from aer_megatron.algo.policy_losses.base import PolicyLoss

    class Plain(PolicyLoss):
        reports: ClassVar = ("steps", "rises")
        scale: float = Field(1.0, gt=0)

        def token_loss(self, tokens):
            up = tokens.log_ratio_T.detach() > 0
            loss_T = -self.scale * tokens.log_ratio_T.exp() * tokens.advantage_T
            return loss_T, {"rises": (up.double().sum(), float(len(up)))}

    class LeaveOneOut(Advantage):
        min_group_size: ClassVar = 2
        reports: ClassVar = ("baseline",)

        def advantages(self, reward_B, group_index_B):
            size = len(reward_B)
            baseline_B = (reward_B.sum() - reward_B) / (size - 1)
            return reward_B - baseline_B, {"baseline": (float(baseline_B.sum()), float(size))}

    class Short(PolicyLoss):
        def token_loss(self, tokens):
            return tokens.log_ratio_T.sum(), {}

    class Talker(Short):
        def token_loss(self, tokens):
            return tokens.log_ratio_T, {"surprise": (tokens.log_ratio_T.sum(), 1.0)}

    class Empty(PolicyLoss):
        pass

    class FewArguments(PolicyLoss):
        def token_loss(self):
            return None, {}

    class ManyArguments(Short):
        def select(self, advantage_T, logprob_T, old_logprob_T, seed, *, key):
            return advantage_T > 0

    class Collides(Plain):
        reports: ClassVar = ("ratio",)

    class Shouts(Plain):
        reports: ClassVar = ("Steps taken",)

    class SameName(LeaveOneOut):
        reports: ClassVar = ("rises",)

    class Other:
        pass

    def function(*arguments):
        pass
"""


@pytest.fixture
def own_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_rules.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    (tmp_path / "broken_rules.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_rules", None)


def load(*overrides: str) -> Config:
    return load_config(None, ["--model.path=base", "--data.train.task=countdown", *overrides])


@pytest.mark.usefixtures("own_rules")
def test_a_policy_loss_of_a_runs_own_has_options_and_reports_numbers() -> None:
    config = load("--algo.policy_loss.kind=own_rules:Plain", "--algo.policy_loss.scale=2")
    again = Config.from_table(config.model_dump(mode="json"))
    assert again == config and config.with_options({"run.seed": 1}).algo == config.algo
    logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    tokens = token_data(torch.tensor([-1.0, -2.5]), torch.tensor([1.0, -1.0]))
    output = policy_loss(logprob, torch.zeros(2), tokens=tokens, normalizer=2.0, config=config.algo)
    # -2 (1 - exp(0.5)) / 2
    assert output.loss.item() == pytest.approx(np.exp(0.5) - 1, rel=1e-6)
    assert (output.sums["rises"][0].item(), output.sums["rises"][1]) == (1.0, 2.0)
    assert "steps" not in output.sums  # not reported this time
    assert all(output.sums[name][0].item() == 0 for name in ("clip_low", "clip_high", "dual_clip"))


@pytest.mark.usefixtures("own_rules")
def test_an_advantage_of_a_runs_own_reports_numbers() -> None:
    config = load("--algo.advantage.kind=own_rules:LeaveOneOut")
    ones, zeros = np.ones(3, dtype=np.int64), np.zeros(6, dtype=np.int64)
    experience = dataclasses.replace(
        experience_of(ones, ones, zeros),
        prompt_id_B=np.zeros(3, dtype=np.uint64),
        group_index_B=zeros[:3],
        reward_B=np.array([1.0, 0.0, 0.0]),
    )
    result = group_advantages(experience, config.algo.advantage)
    assert result.advantage_B.tolist() == [1.0, -0.5, -0.5]
    sums = {**result.reported, "rises": (0.0, 0.0), "ratio": (3.0, 3.0)}
    assert user_metrics(("baseline", "rises", "steps"), sums) == {"user/baseline": pytest.approx(1 / 3)}


REFUSED = [
    ("policy_loss.kind=own_rules:Missing", "cannot be imported: AttributeError"),
    ("policy_loss.kind=no_such_module:Plain", "cannot be imported: ModuleNotFoundError"),
    ("policy_loss.kind=broken_rules:Plain", "cannot be imported: ZeroDivisionError: division by zero"),
    (
        "policy_loss.kind=own_rules:Other",
        "must be a class derived from aer_megatron.algo.policy_losses.base.",
    ),
    ("policy_loss.kind=own_rules:function", "must be a class derived from"),
    ("policy_loss.kind=own_rules:LeaveOneOut", "must be a class derived from"),
    ("policy_loss.kind=own_rules:Empty", "must define token_loss"),
    ("policy_loss.kind=own_rules:FewArguments", "too many positional arguments"),
    ("policy_loss.kind=own_rules:ManyArguments", "missing a required argument: 'seed'"),
    ("policy_loss.kind=own_rules:Collides", "'ratio' must be a snake_case name that no other number of the loss has"),
    ("policy_loss.kind=own_rules:Shouts", "'Steps taken' must be a snake_case name"),
]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(("override", "words"), REFUSED)
def test_what_is_no_rule_is_refused_at_start(override: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(f"--algo.{override}")
    assert words in str(caught.value)


@pytest.mark.usefixtures("own_rules")
def test_options_and_names_of_own_rules_are_checked_at_start() -> None:
    plain = "--algo.policy_loss.kind=own_rules:Plain"
    with pytest.raises(ValueError, match=r"option algo\.policy_loss\.scale=-1 is not valid"):
        load(plain, "--algo.policy_loss.scale=-1")
    with pytest.raises(ValueError, match=r"algo\.policy_loss\.clip_low is not one of kind='own_rules:Plain'"):
        load(plain, "--algo.policy_loss.clip_low=0.1")
    with pytest.raises(ValueError, match=r"unknown option .*scael: did you mean algo\.policy_loss\.scale"):
        load(plain, "--algo.policy_loss.scael=1")
    with pytest.raises(ValueError, match="'rises' must be a snake_case name"):
        load(plain, "--algo.advantage.kind=own_rules:SameName")
    with pytest.raises(ValueError, match="group_size=1 leaves no group"):
        load("--algo.advantage.kind=own_rules:LeaveOneOut", "--rollout.group_size=1")


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("name", ["Short", "Talker"])
def test_what_a_rule_returns_is_checked(name: str) -> None:
    algo: Any = load(f"--algo.policy_loss.kind=own_rules:{name}").algo
    tokens = token_data(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=rf"algo\.policy_loss\.kind='own_rules:{name}' must return one loss per token"):
        policy_loss(torch.zeros(2), torch.zeros(2), tokens=tokens, normalizer=1.0, config=algo)
