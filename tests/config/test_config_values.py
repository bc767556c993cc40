"""Values of options: types, paths, texts that look like numbers, run files; errors name option and value."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from tests.support.config_options import SET, described_options

BASE = ["--model.path=base", "--data.train.task=countdown", SET]
MINIMAL: dict[str, Any] = {"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}}


def load(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


def options_of(kind: str) -> list[str]:
    return [key for key, found, _, needed in described_options() if found == kind and not needed]


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("value", ["true", "false", '"1"', "[1]"])
def test_a_number_is_a_number(value: str) -> None:
    keys = options_of("int") + options_of("float")
    assert len(keys) > 80
    message = refused(*(f"--{key}={value}" for key in keys))
    assert [key for key in keys if f"option {key}=" not in message] == []


def test_options_of_other_rules_are_checked_too() -> None:
    found = [(key, form, needed) for key, form, _, needed in described_options() if needed and form in ("int", "float")]
    assert {"algo.policy_loss.fraction", "algo.policy_loss.coefficient"} <= {key for key, *_ in found}
    for key, form, needed in found:
        for value in ("true", '"1"', "inf", str(10**400), "[1]"):
            assert f"option {key}=" in refused(needed, f"--{key}={value}"), (key, form, value)


@pytest.mark.parametrize("value", ["1", "0", '"true"', "yes", "1.0"])
def test_true_and_false_are_spelled_so(value: str) -> None:
    keys = options_of("bool")
    message = refused(*(f"--{key}={value}" for key in keys))
    assert [key for key in keys if f"option {key}=" not in message] == []


@pytest.mark.parametrize("value", [str(10**400), "inf", "nan", "2024-01-01"])
def test_a_float_is_finite(value: str) -> None:
    for key in options_of("float"):
        assert f"option {key}=" in refused(f"--{key}={value}")


@pytest.mark.parametrize("value", [str(2**64), "9" * 5000, "0x" + "f" * 5000])
def test_an_integer_has_64_bits(value: str) -> None:
    for key in options_of("int"):
        message = refused(f"--{key}={value}")
        assert f"option {key}=" in message
        assert len(message) < 1000


def test_a_fraction_is_no_integer_but_an_integer_may_stand_for_a_float() -> None:
    keys = options_of("int")
    message = refused(*(f"--{key}=1.5" for key in keys))
    assert [key for key in keys if f"option {key}=1.5 is not valid: must be an integer" not in message] == []
    assert load("--optimizer.lr=1").optimizer.lr == 1.0


def test_the_largest_seed_is_taken_and_the_next_one_is_not() -> None:
    assert load(f"--run.seed={2**63 - 1}").run.seed == 2**63 - 1
    assert "run.seed=" in refused(f"--run.seed={2**63}")


@pytest.mark.parametrize("value", ["[]", "[0, 4]", "[-1]", "[true]", '["1"]', "[1.0]", "8", '"8"', "[[1]]"])
def test_pass_at_k_needs_positive_integers(value: str) -> None:
    assert "option eval.sets.held_out.k" in refused(f"--eval.sets.held_out.k={value}")


@pytest.mark.parametrize("section", ["optimizer", "sft.optimizer"])
def test_a_decay_does_not_raise_the_learning_rate(section: str) -> None:
    both = (f"--{section}.min_lr=1.0", f"--{section}.lr=0.5")
    message = refused(*both, f"--{section}.decay=linear")
    assert message.startswith(f"{section}.min_lr=1 must be at most {section}.lr=0.5")
    load(*both, f"--{section}.decay=constant")
    load(f"--{section}.min_lr=0.5", f"--{section}.lr=0.5", f"--{section}.decay=linear")


TEXTS = ["007", "123", "2024-01-01", "true", "1e5", "[1]", "nan", "{a = 1}", "10:30:00", "1\nother = 2", "a # b"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_option_keeps_what_looks_like_something_else(text: str) -> None:
    config = load(f"--run.name={text}", f"--model.path={text}", f"--data.system={text}", f"--sft.init={text}")
    found = (config.run.name, config.model.path, config.data.system, config.sft.init)
    assert found == (text, text, text, text)


def test_other_texts_of_overrides() -> None:
    assert load('--run.name="2024"').run.name == "2024"
    assert load("--sglang.environment.LEVEL=1").sglang.environment == {"LEVEL": "1"}
    assert load("--megatron.num_layers=3").megatron == {"num_layers": 3}
    assert load("--run.name=" + "[" * 3000).run.name == "[" * 3000
    assert load("--run.name=" + "9" * 5000).run.name == "9" * 5000


@pytest.mark.parametrize("text", ["007", "1e5", "2024-01-01", "true"])
def test_a_text_option_of_a_file_must_be_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[run]\nname = {text}\n")
    with pytest.raises(ValueError, match=r"run\.name|run\.toml"):
        load_config(path, BASE)


PATHS = [
    "run.output_dir",
    "model.path",
    "data.train.path",
    "eval.sets.held_out.source.path",
    "sft.init",
    "sft.source.path",
]


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def with_path(key: str, value: str) -> list[str]:
    others = [item for item in BASE if not item.startswith(f"--{key.removesuffix('path')}task")]
    return [*others, f"--{key}={value}"]


@pytest.mark.parametrize("key", [*PATHS, "sglang.transfer_dir", "sglang.python"])
def test_a_tilde_is_the_home_folder(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert value_of(load_config(None, with_path(key, "~/x")), key) == "/home/somebody/x"
    assert value_of(load_config(None, with_path(key, "~")), key) == "/home/somebody"
    assert value_of(load_config(None, with_path(key, "./~/x")), key) == "./~/x"
    with pytest.raises(ValueError, match=rf"{key}='~no_such_user_/x' is not valid: .*home folder"):
        load_config(None, with_path(key, "~no_such_user_/x"))


@pytest.mark.parametrize("key", [*PATHS, "run.name", "sglang.host", "sglang.trainer_address", "data.verifier"])
@pytest.mark.parametrize("value", ["", " ", '""'])
def test_an_empty_text_is_an_error(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"option {key}=.* must not be empty"):
        load_config(None, with_path(key, value))


@pytest.mark.parametrize("key", PATHS)
def test_a_text_without_an_encoding_is_an_error(key: str) -> None:
    for value in ("a\0b", "a\udcffb"):
        with pytest.raises(ValueError, match=rf"option {key}="):
            load_config(None, with_path(key, value))


@pytest.mark.parametrize(
    "override",
    [
        "--run..seed=1",
        "--.seed=1",
        "--run.=1",
        "--run. =1",
        "--run.seed=" + "[" * 3000,
        "--run.seed=" + "{a=" * 3000,
        "--" + "a." * 3000 + "b=1",
        "--megatron." + "a." * 40 + "b=1",
        "--megatron.a=" + "[" * 40 + "]" * 40,
        "--megatron.a=nan",
        "--megatron.a=[1, inf]",
        f"--sglang.launch.a={2**70}",
        "--megatron.a=2024-01-01",
        "--run=3",
        "--data.train=countdown",
        "--data.verifiers=os.system",
        '--data.verifiers=["os.system"]',
        '--data.verifiers=["a:b:c"]',
        '--data.verifiers=["../a:b"]',
        "--data.verifiers=[1]",
    ],
)
def test_other_overrides_that_are_refused(override: str) -> None:
    message = refused(override)
    key = override[2:].partition("=")[0]
    assert key[:20] in message
    assert len(message) < 1000


def test_a_table_for_a_value_names_the_value() -> None:
    assert "option run.seed={'deeper': 1} is not valid: must be an integer" in refused("--run.seed.deeper=1")


def test_a_scalar_for_a_section_is_told_an_option_of_it() -> None:
    assert refused("--parallel=4") == (
        "option parallel=4 is not valid: parallel is a section; set the options below it, such as parallel.tp"
    )


def test_functions_of_the_run_file_are_listed() -> None:
    assert load('--data.verifiers=["a.b:c", "d:e"]').data.verifiers == ("a.b:c", "d:e")


TEXT = '[model]\npath = "base"\n[data.train]\ntask = "countdown"\n'


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert load_config(path) == Config.from_table(MINIMAL)


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-32"),
        b"\xff" + TEXT.encode(),
        TEXT.encode() + b"[run]\nseed = " + b"9" * 5000,
        TEXT.encode() + b"[run]\nseed = " + b"[" * 5000,
        TEXT.encode() + b"[run]\nseed = 1\nseed = 2",
        TEXT.encode() + b"[model]\n",
        TEXT.encode()[:-3],
        b"#" * (1 << 24) + b"\n",
    ],
    ids=range(10),
)
def test_a_broken_run_file_is_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"run file .*run\.toml .*(UTF-8|flat|TOML)"):
        load_config(path)


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_many_sequences_are_refused_at_once() -> None:
    assert "algo.num_minibatches=7" in refused("--rollout.prompts_per_step=1000000000000", "--algo.num_minibatches=7")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3))


@given(key=st.sampled_from([key for key, *_ in described_options()]), value=VALUES)
def test_any_value_of_any_option_is_taken_or_named(key: str, value: Any) -> None:
    table = json.loads(json.dumps(MINIMAL))
    node = table
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    try:
        config = Config.from_table(table)
    except ValueError as error:
        assert key in str(error) or key.rpartition(".")[0] in str(error)
    else:
        assert Config.from_table(json.loads(config.model_dump_json())) == config


@given(st.text())
def test_any_override_is_taken_or_named(text: str) -> None:
    try:
        load_config(None, [*BASE, text])
    except ValueError as error:
        assert str(error)
