"""[eval.sets.NAME]: named sets in files and on the command line, greedy decoding, what is inherited and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.options.data import DataSection, EvalSetSection, SourceSection

TEXT = """
[model]
path = "base"
[data]
instruction = "{problem}"
system = "be brief"
train = { task = "countdown" }
[eval.sets.aime24]
source = { path = "aime24.jsonl" }
num_samples = 16
k = [1, 16]
every = 25
[eval.sets.math500]
source = { path = "math500.jsonl" }
"""


def load(folder: Path, *overrides: str) -> Config:
    path = folder / "run.toml"
    path.write_text(TEXT)
    return load_config(path, overrides)


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder, *overrides)
    return str(caught.value)


def test_a_file_names_sets_and_the_command_line_changes_one(tmp_path: Path) -> None:
    config = load(tmp_path, "--eval.sets.aime24.num_samples=64", "--eval.sets.aime24.k=[1,64]")
    aime, math = config.eval.sets.values()
    assert list(config.eval.sets) == ["aime24", "math500"]
    assert (aime.num_samples, aime.k, aime.every, aime.temperature) == (64, (1, 64), 25, 1.0)
    assert (math.num_samples, math.k) == (32, (1, 8, 32))
    assert aime.source.path == "aime24.jsonl"


def test_the_command_line_adds_a_set_and_takes_all_away(tmp_path: Path) -> None:
    added = load(tmp_path, "--eval.sets.amc23.source.path=1.5", "--eval.sets.amc23.verifier=7:8").eval.sets["amc23"]
    assert (added.source.path, added.verifier) == ("1.5", "7:8")  # text as it stands
    assert load(tmp_path, "--eval.sets={}").eval.sets == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--eval.sets.aime24.num_sample=4", "did you mean eval.sets.aime24.num_samples?"),
        ("--eval.sets.aime24.source.pth=x", "did you mean eval.sets.aime24.source.path?"),
        ("--eval.set.aime24.k=[1]", "did you mean eval.sets?"),
        ("--eval.sets.aime24.temperature=-1", "option eval.sets.aime24.temperature=-1 is not valid"),
        ("--eval.sets.aime24.temperature=-1", "the default is 1.0"),
        ("--eval.sets.aime24=3", "eval.sets.aime24 is a section; set the options below it, such as eval.sets.aime24."),
        ("--eval.sets=3", "option eval.sets=3 is not valid: must be a table"),
        ("--eval.sets.new.k=[1]", "option eval.sets.new.source is required"),
        ("--eval.sets.aime24.k=[1,64]", "k=[1, 64] asks for pass@64 from num_samples=16"),
        ("--eval.sets.AIME.source.path=x", "sets.AIME: the name of a set must be snake_case"),
        ("--eval.sets.train.source.path=x", "sets.train: the name of a set must be"),
        ("--eval.sets.aime24.temperature=0", "num_samples=16 with temperature=0"),
        ("--data.eval.path=x", "write [eval.sets.NAME.source]"),
        ("--run.eval_every=0", "it is eval.sets.NAME.every"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, override)


def test_greedy_decoding_has_one_answer(tmp_path: Path) -> None:
    config = load(tmp_path, "--eval.sets.math500.temperature=0")
    greedy = config.eval.sets["math500"]
    assert (greedy.num_samples, greedy.k) == (1, (1,))
    assert Config.from_table(config.model_dump(mode="json")) == config
    # not given, so not kept where the temperature changes again
    again = config.with_options({"eval.sets.math500.temperature": 0.6}).eval.sets["math500"]
    assert (again.num_samples, again.k) == (32, (1, 8, 32))
    assert "k=[1, 8] with temperature=0" in refused(
        tmp_path, "--eval.sets.math500.temperature=0", "--eval.sets.math500.k=[1,8]"
    )


def test_a_set_inherits_how_problems_are_put_and_changes_what_it_says() -> None:
    source = SourceSection(task="countdown")
    data = DataSection(train=source, instruction="a {problem}", system="s", verifier="math")
    assert EvalSetSection(source=source).data_of(data) == data
    own = EvalSetSection(source=source, instruction="b {problem}", verifier="math_verify", system="t").data_of(data)
    assert (own.instruction, own.verifier, own.system, own.template) == ("b {problem}", "math_verify", "t", "chat")
    plain = EvalSetSection(source=source, template="plain").data_of(data)
    assert (plain.template, plain.system) == ("plain", None)  # plain text has no system message
    assert EvalSetSection(source=source).length_limit(100) == 100
    assert EvalSetSection(source=source, max_new_tokens=7).length_limit(100) == 7
