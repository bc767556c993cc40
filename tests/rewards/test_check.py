"""Verifiers are looked at before the first step, in a process of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aer_megatron.rewards.pool import check_verifiers

pytestmark = pytest.mark.processes

MODULE = "tests.support.bad_verifiers"


def test_usable_verifiers_pass() -> None:
    functions = ("exact", "optional_arguments", "judge_object", "bound")
    check_verifiers(["math", "countdown", "reasoning_gym:gcd", *(f"{MODULE}:{name}" for name in functions)])


def test_built_in_verifiers_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aer_megatron.rewards.pool.VerifierPool", None)
    check_verifiers(["math", "countdown"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maths", "unknown"),
        ("no_such_package.x:f", "cannot be imported"),
        ("reasoning_gym:no_such_task", "no_such_task.*reasoning-gym has"),
        (f"{MODULE}:missing", "cannot be imported"),
        (f"{MODULE}:not_callable", "not a function but a int"),
        (f"{MODULE}:Judge", "not a function but a type"),
        (f"{MODULE}:one_argument", r"arguments \(text: 'str'\).*two positional arguments, \(text, prompt\)"),
        (f"{MODULE}:three_arguments", "missing a required argument: 'more'"),
        (f"{MODULE}:keyword_argument", "missing a required argument: 'more'"),
        (f"{MODULE}:asynchronous", "async function.*asyncio.run"),
        (f"{MODULE}:generating", "generator function.*'return'"),
    ],
)
def test_the_trouble_is_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_verifiers([name])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys\nsys.exit('no')", r"verifier 'broken:f' cannot be imported: SystemExit: no"),
        ("raise RuntimeError('no licence')", r"cannot be imported: RuntimeError: no licence"),
        ("def f(:", r"cannot be imported: SyntaxError"),
    ],
)
def test_a_module_that_raises_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    (tmp_path / "broken.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=words):
        check_verifiers(["broken:f"])
    assert "broken" not in sys.modules  # user code was not imported here


def test_a_module_that_ends_its_process_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ending.py").write_text("import os\nos.write(2, b'no GPU here')\nos._exit(5)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"ended 3 times.*'ending:f'.*exit code 5.*no GPU here"):
        check_verifiers(["ending:f"])
