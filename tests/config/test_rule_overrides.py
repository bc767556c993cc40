"""Another ``kind`` of a rule over options of the former one: which stay, which are left out, which are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.fixed import Fixed
from aer_megatron.algo.entropy_rules.none import NoBonus
from aer_megatron.algo.entropy_rules.skywork import Skywork
from aer_megatron.algo.policy_losses.kl_cov import KlCov
from aer_megatron.config import Config
from aer_megatron.config_loading import load_config


def build(algo: dict[str, Any]) -> Config:
    return Config.from_table({"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "algo": algo})


def write_run(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "base"\n[data.train]\ntask = "countdown"\n{text}', encoding="utf-8")
    return path


def test_another_kind_on_the_command_line_leaves_out_what_only_the_former_has(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write_run(tmp_path, "[algo.entropy]\nrho = 0.3\ntau = 0.7\nalpha_max = 0.2\nalarm_low = 0.5\n")

    def load(*overrides: str) -> Config:
        return load_config(path, overrides, note=notes.append)

    assert load("--algo.entropy.eta=0.1").algo.entropy == Aer(rho=0.3, tau=0.7, alpha_max=0.2, alarm_low=0.5, eta=0.1)
    assert load("--algo.entropy.kind=aer").algo.entropy == load().algo.entropy
    assert notes == []
    # what both inherit stays; a bound of the same name is another option
    assert load("--algo.entropy.kind=skywork").algo.entropy == Skywork(rho=0.3, alarm_low=0.5)
    assert notes == [
        f"left out of {path}: algo.entropy.tau, algo.entropy.alpha_max, "
        "which the kind of the command line does not have"
    ]
    # options of the command line belong to the kind of the command line, in any order
    fixed = load("--algo.entropy.coefficient=0.5", "--algo.entropy.kind=fixed", "--algo.entropy.rho=0.4")
    assert fixed.algo.entropy == Fixed(coefficient=0.5, rho=0.4, alarm_low=0.5)
    with pytest.raises(ValueError, match=r"algo\.entropy\.tau is not one of kind='none'; kinds that have it: aer"):
        load("--algo.entropy.tau=0.7", "--algo.entropy.kind=none")
    # a table replaces a table, and nothing is left out silently of a file that is wrong by itself
    assert load('--algo.entropy={kind = "none"}').algo.entropy == NoBonus()
    path.write_text(path.read_text() + "taau = 3\n")
    with pytest.raises(ValueError, match=r"unknown option algo\.entropy\.taau"):
        load("--algo.entropy.kind=none")


def test_changed_options_of_a_rule_follow_its_kind() -> None:
    config = build({"entropy": {"tau": 0.7}, "policy_loss": {"kind": "clip_cov", "fraction": 0.5}})
    assert config.with_options({"algo.entropy.kind": "none"}).algo.entropy == NoBonus()
    # both have a fraction, each of its own
    assert config.with_options({"algo.policy_loss.kind": "kl_cov"}).algo.policy_loss == KlCov()
    resolved = Config.from_table(config.model_dump(mode="json"))
    assert resolved.with_options({"algo.entropy.kind": "fixed"}).algo.entropy == Fixed()
