"""The run's configuration: defaults, overrides, unknown keys, ranges and cross checks."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aer_megatron.algo.advantages.grpo import Grpo
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.entropy_rules.skywork import Skywork
from aer_megatron.algo.kl_estimators.k3 import K3
from aer_megatron.algo.options import AlgoSection
from aer_megatron.algo.policy_losses.clip import Clip
from aer_megatron.algo.policy_losses.kl_cov import KlCov
from aer_megatron.config import Config
from aer_megatron.config_loading import config_digest, load_config
from aer_megatron.config_section import describe
from tests.support.config_options import described_options
from tools import write_configuration_docs

MINIMAL: dict[str, Any] = {"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}}


def build(**sections: dict[str, Any]) -> Config:
    return Config.from_table({**MINIMAL, **sections})


def write_run(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "base"\n[data.train]\ntask = "countdown"\n{text}', encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_specification() -> None:
    algo = build().algo
    assert algo.entropy == Aer(
        difficulty="linear_deficit",
        source="group",
        rho=0.5,
        tau=0.4,
        update="proportional",
        eta=1e-3,
        alpha_max=0.05,
    )
    skywork = build(algo={"entropy": {"kind": "skywork"}}).algo.entropy
    assert skywork == Skywork(target=0.2, delta=1e-4, alpha_max=0.005)
    assert algo.policy_loss == Clip(clip_low=0.2, clip_high=0.2, dual_clip=0.0)
    assert algo.advantage == Grpo(std_epsilon=1e-6)
    assert algo.kl_estimator == K3()


def test_a_run_file_sets_values_and_keeps_the_other_defaults(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, "[algo.entropy]\ntau = 0.7\n"))
    assert config.algo.entropy == Aer(tau=0.7, eta=1e-3)
    assert config.model.path == "base"


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("--algo.entropy.kind=none", ("algo", "entropy"), "kind", "none"),
        ("algo.entropy.tau=0.7", ("algo", "entropy"), "tau", 0.7),
        ("--run.resume=false", ("run",), "resume", False),
        ("--rollout.top_k=4", ("rollout",), "top_k", 4),
        ("--model.path=/some/where=odd", ("model",), "path", "/some/where=odd"),
        ('--run.name="2024"', ("run",), "name", "2024"),
        ("--megatron.num_layers=3", (), "megatron", {"num_layers": 3}),
        ("--data.train.options.digits=2", ("data", "train"), "options", {"digits": 2}),
        ("--optimizer.lr=2e-4", ("optimizer",), "lr", 2e-4),
    ],
)
def test_an_override_replaces_one_value(
    tmp_path: Path, override: str, section: tuple[str, ...], name: str, value: object
) -> None:
    found: Any = load_config(write_run(tmp_path), [override])
    for part in section:
        found = getattr(found, part)
    assert getattr(found, name) == value


def test_an_override_beats_the_file_and_the_last_override_wins(tmp_path: Path) -> None:
    path = write_run(tmp_path, "[run]\nnum_steps = 5\n")
    assert load_config(path).run.num_steps == 5
    assert load_config(path, ["--run.num_steps=6", "--run.num_steps=7"]).run.num_steps == 7


def test_overrides_alone_make_a_run() -> None:
    config = load_config(None, ["--model.path=base", "--data.train.task=countdown"])
    assert config == build()


@pytest.mark.parametrize("override", ["--run.num_steps", "=3", "--=3"])
def test_an_override_without_key_or_value_is_an_error(override: str) -> None:
    with pytest.raises(ValueError, match=r"must look like section\.key=value"):
        load_config(None, [override])


def test_an_override_below_a_value_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path is a value, not a table"):
        load_config(write_run(tmp_path), ["--model.path.deeper=1"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("algo.entropy.taau", "algo.entropy.tau"),
        ("rollout.group_sise", "rollout.group_size"),
        ("group_size", "rollout.group_size"),
        ("num_minibatches", "algo.num_minibatches"),
        ("modle", "model"),
        ("data.train.pth", "data.train.path"),
        ("sft.optimizer.leer", "sft.optimizer.lr"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write_run(tmp_path), [f"--{key}=1"])
    assert str(caught.value) == f"unknown option {key}: did you mean {nearest}?"


def test_an_unknown_key_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option report\.zzzzzzzz: known here: .*report\.sinks"):
        load_config(write_run(tmp_path), ["--report.zzzzzzzz=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--algo.entropy.kind=noen", ["algo.entropy.kind='noen'", "'aer'"]),
        ("--rollout.group_size=0", ["rollout.group_size=0", "greater than or equal to 1"]),
        ("--algo.entropy.rho=1.5", ["algo.entropy.rho=1.5", "less than or equal to 1"]),
        ("--algo.entropy.tau=0.0", ["algo.entropy.tau=0.0", "greater than 0"]),
        ("--optimizer.lr=nan", ["optimizer.lr=nan", "finite"]),
        ("--run.num_steps=2.5", ["run.num_steps=2.5", "integer"]),
        ("--parallel=4", ["parallel=4"]),
    ],
)
def test_a_value_out_of_its_range_is_an_error_that_names_the_option(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write_run(tmp_path), [override])
    for word in words:
        assert word in str(caught.value)


def test_every_bad_value_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(write_run(tmp_path), ["--parallel.tp=0", "--run.seed=-1"])
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "option run.seed",
        "option parallel.tp",
    ]


def test_required_options_are_named() -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, [])
    assert "option model is required" in str(caught.value)
    assert "option data is required" in str(caught.value)


def test_a_missing_or_malformed_run_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run file .*absent\.toml does not exist"):
        load_config(tmp_path / "absent.toml")
    path = tmp_path / "broken.toml"
    path.write_text("[model\npath=", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML: .*line 1"):
        load_config(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML"):
        load_config(path)


CROSS_CHECKS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    (
        {"rollout": {"prompts_per_step": 10, "group_size": 3}, "algo": {"num_minibatches": 4}},
        ["algo.num_minibatches=4", "must divide", "= 30", "[1, 2, 3, 5, 6, 10, 15, 30]"],
    ),
    ({"parallel": {"sequence_parallel": True}}, ["parallel.sequence_parallel=true", "parallel.tp > 1"]),
    ({"algo": {"policy_loss": {"dual_clip": 0.5}}}, ["algo.policy_loss", "dual_clip=0.5", "greater than 1"]),
    (
        {"algo": {"policy_loss": {"kind": "clip_cov", "covariance_low": 5.0}}},
        ["algo.policy_loss", "covariance_low=5.0", "below covariance_high=5.0"],
    ),
    ({"algo": {"correction": {"high": 0.5}}}, ["high=0.5", "exclude 1"]),
    ({"algo": {"correction": {"reject": "token"}}}, ["algo.correction.reject='token'", "set both, or neither"]),
    ({"algo": {"correction": {"reject_high": 2.0}}}, ["reject_high=2", "set both, or neither"]),
    (
        {"algo": {"overlong_buffer": 64}, "rollout": {"max_new_tokens": 64}},
        ["algo.overlong_buffer=64", "max_new_tokens=64"],
    ),
    ({"rollout": {"group_size": 1}}, ["rollout.group_size=1", "at least 2"]),
    ({"data": {"train": {}}}, ["data.train", "exactly one of path, task and dataset"]),
    (
        {"data": {"train": {"path": "a.jsonl", "task": "countdown"}}},
        ["data.train", "exactly one of path, task and dataset"],
    ),
]


RULE_OPTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"policy_loss": {"kind": "kl_cov", "clip_low": 0.1}},
        "algo.policy_loss.clip_low is not one of kind='kl_cov'; kinds that have it: clip, gspo, cispo, clip_cov",
    ),
    (
        {"advantage": {"kind": "dr_grpo", "std_epsilon": 0.1}},
        "algo.advantage.std_epsilon is not one of kind='dr_grpo'; kinds that have it: grpo",
    ),
    (
        {"policy_loss": {"fraction": 0.1}},
        "algo.policy_loss.fraction is not one of kind='clip'; kinds that have it: clip_cov, kl_cov",
    ),
    (
        {"policy_loss": {"kind": "ppo"}},
        "algo.policy_loss.kind='ppo' is not valid: must be 'clip', 'gspo', 'cispo', 'reinforce', 'clip_cov', 'kl_cov' "
        "or 'package.module:name'",
    ),
    (
        {"entropy": {"kind": "fixed", "tau": 0.3}},
        "option algo.entropy.tau is not one of kind='fixed'; kinds that have it: aer",
    ),
    (
        {"entropy": {"kind": "none", "max_change": 0.3}},
        "option algo.entropy.max_change is not one of kind='none'; kinds that have it: aer, skywork",
    ),
    ({"entropy": {"kind": "none", "referense": 0.3}}, "referense: did you mean algo.entropy.reference?"),
    ({"policy_loss": {"kind": ["clip"]}}, "algo.policy_loss.kind=['clip'] is not valid"),
    ({"policy_loss": {"clip_low": 2}}, "algo.policy_loss.clip_low=2 is not valid: Input should be less than 1"),
    ({"policy_loss": {"clip_loow": 2}}, "algo.policy_loss.clip_loow: did you mean algo.policy_loss.clip_low?"),
    ({"advantage": 3}, "algo.advantage=3 is not valid: algo.advantage is a section; set the options below it"),
]


@pytest.mark.parametrize(("algo", "words"), RULE_OPTIONS)
def test_an_option_belongs_to_the_rules_that_have_it(algo: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(algo=algo)
    assert words in str(caught.value)


def test_a_rule_keeps_its_kind_where_defaults_are_left_out() -> None:
    config = build(algo={"policy_loss": {"kind": "kl_cov", "fraction": 0.5}})
    assert config.with_options({"run.seed": 3}).algo == config.algo
    assert AlgoSection(policy_loss=KlCov()).model_dump(exclude_unset=True) == {"policy_loss": {"kind": "kl_cov"}}


@pytest.mark.parametrize("option", sorted(Config.moved))
def test_an_option_of_former_versions_is_told_where_it_went(option: str) -> None:
    with pytest.raises(ValueError, match=rf"option {re.escape(option)}=.* is no longer there: ") as caught:
        load_config(None, ["--model.path=base", "--data.train.task=countdown", f"--{option}=0.5"])
    named = re.findall(r"(?:algo|eval|report)\.(?:[a-z_.]|NAME)+", Config.moved[option])
    known = {key for key, *_ in describe(Config)} | {"eval.sets.NAME.source"}
    assert named and set(named) <= known, caught.value


@pytest.mark.parametrize(("sections", "words"), CROSS_CHECKS)
def test_options_that_do_not_fit_together_are_an_error(sections: dict[str, dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build(**sections)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"prompts_per_step": 10, "group_size": 3}, "algo": {"num_minibatches": 5}},
        {"parallel": {"sequence_parallel": True, "tp": 2}},
        {"algo": {"policy_loss": {"dual_clip": 3.0}}},
        {"algo": {"policy_loss": {"kind": "clip_cov", "dual_clip": 3.0}}},
        {"algo": {"correction": {"high": 1.0}}},
        {"algo": {"overlong_buffer": 63}, "rollout": {"max_new_tokens": 64}},
        {"rollout": {"group_size": 1}, "algo": {"advantage": {"kind": "dr_grpo"}}},
    ],
)
def test_the_remedies_of_the_cross_checks_work(sections: dict[str, dict[str, Any]]) -> None:
    build(**sections)


def test_the_data_parallel_size_is_what_tp_and_pp_leave() -> None:
    config = build(parallel={"tp": 2, "pp": 2})
    assert [config.check_world_size(size) for size in (4, 8, 16)] == [1, 2, 4]


def test_ranks_that_tp_and_pp_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tp=2 \* parallel\.pp=3 = 6 must divide .* 8; launch a multiple"):
        build(parallel={"tp": 2, "pp": 3}).check_world_size(8)


def test_a_minibatch_that_the_ranks_cannot_share_is_an_error() -> None:
    config = build(rollout={"prompts_per_step": 3, "group_size": 2}, parallel={"micro_batch_size": 2})
    assert config.check_world_size(3) == 3  # 6 sequences = 3 ranks * 2
    assert config.check_world_size(2) == 2  # the last micro-batch of a rank may be smaller
    with pytest.raises(ValueError, match=r"mini-batch of 6 sequences .* data-parallel size 4; change"):
        config.check_world_size(4)


def test_the_configuration_is_frozen() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.run.num_steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # type: ignore[misc]


def test_a_resolved_run_loads_back_to_the_same_run() -> None:
    config = build(megatron={"num_layers": 2}, algo={"entropy": {"tau": 0.7}})
    assert Config.from_table(json.loads(config.model_dump_json())) == config


def test_the_digest_is_that_of_the_sorted_json_text() -> None:
    text = '{"a": [1, 2.5], "b": {"c": "x", "d": null}}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert config_digest({"b": {"d": None, "c": "x"}, "a": (1, 2.5)}) == expected


@pytest.mark.processes
def test_the_digest_changes_with_any_value_and_not_with_the_process() -> None:
    digest = config_digest(build().model_dump(mode="json"))
    assert digest != config_digest(build(run={"seed": 1}).model_dump(mode="json"))
    program = (
        "from aer_megatron.config import Config; from aer_megatron.config_loading import config_digest;"
        f"print(config_digest(Config.from_table({MINIMAL!r}).model_dump(mode='json')))"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == digest


def test_every_option_is_described_by_the_default_that_a_run_gets() -> None:
    source = {"task": "countdown"}
    sets = {"held_out": {"source": source}}
    resolved = build(data={"train": source}, sft={"source": source}, eval={"sets": sets}).model_dump(mode="json")
    given = {"model.path", "data.train.task", "eval.sets.held_out.source.task", "sft.source.task"}
    described = [(key, default) for key, _, default, needed in described_options() if not needed]
    assert ("model.path", "required") in described
    for key, default in described:
        value: Any = resolved
        for part in key.split("."):
            value = value[part]
        if key not in given:
            assert json.loads(default) == value, key


def test_every_section_is_described() -> None:
    sections = {key.split(".")[0] for key, *_ in describe(Config)}
    assert sections == set(Config.model_fields)


def test_the_configuration_document_is_current() -> None:
    written = write_configuration_docs.PATH.read_text(encoding="utf-8")
    assert written == write_configuration_docs.render(), "run: python tools/write_configuration_docs.py"


def test_changed_options_are_validated_together_and_leave_the_rest() -> None:
    config = Config.from_table({**MINIMAL, "run": {"seed": 7}, "parallel": {"tp": 2, "sequence_parallel": True}})
    changed = config.with_options({"parallel.pp": 2, "rollout": {"group_size": 4}, "megatron.fp8": "e4m3"})
    assert (changed.run.seed, changed.parallel.tp, changed.parallel.pp) == (7, 2, 2)
    assert changed.rollout.group_size == 4
    assert changed.megatron == {"fp8": "e4m3"} and config.megatron == {}
    assert changed == Config.from_table(json.loads(changed.model_dump_json()))
    for options, words in (
        ({"parallel.tp": 1}, "sequence_parallel=true needs parallel.tp > 1"),
        ({"parallel.tpp": 1}, "did you mean parallel.tp?"),
        ({"run.seed.low": 1}, "seed is a value, not a table"),
        ({"run..seed": 1}, "without empty parts"),
        ({"run.seed": "7"}, "option run.seed='7' is not valid: must be an integer"),
        ({"algo.num_minibatches": 7}, "algo.num_minibatches=7 must divide"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            config.with_options(options)
