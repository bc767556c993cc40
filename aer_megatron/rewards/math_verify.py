"""A second opinion on mathematical answers: the library math-verify, in a worker process.

It judges by computer algebra where rewards/math.py has a grammar of its own; benchmarks/bench_grader.py has both.
"""

from __future__ import annotations

from typing import Any

from aer_megatron.rewards.extract import boxed_answer
from aer_megatron.rewards.math import decide_quickly
from aer_megatron.types import Prompt, Verdict


class MathVerifyVerifier:
    """math-verify behind one call; lives in a worker's main thread, because its time limit is SIGALRM.

    ``alarm_s`` is the whole number of seconds that each of parsing and comparing may take.
    """

    def __init__(self, alarm_s: int) -> None:
        # sympy and its LaTeX parser take a second to import: only worker processes pay
        from math_verify import LatexExtractionConfig, parse, verify
        from math_verify.errors import TimeoutException

        self._parse = parse
        self._verify = verify
        self._timeout_exception = TimeoutException
        self._config = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)
        self._alarm_s = alarm_s
        self._gold: tuple[str, list[Any]] = ("", [])
        self._parse_boxed("1")  # builds its regular expressions and the grammar before the clock runs

    def __call__(self, text: str, prompt: Prompt) -> Verdict:
        """Returns the verdict; reasons ``correct``, ``wrong``, ``no_answer``, ``unparseable``, ``bad_gold``,
        ``timeout``.
        """
        quick = decide_quickly(text, prompt)
        if quick is not None:
            return quick
        try:
            return self._compare(boxed_answer(text) or "", prompt.answer)
        except self._timeout_exception:
            return Verdict(0.0, "timeout")

    def _compare(self, answer: str, gold_text: str) -> Verdict:
        if self._gold[0] != gold_text:  # the G rollouts of a prompt share one gold answer
            self._gold = (gold_text, self._parse_boxed(gold_text))
        gold, given = self._gold[1], self._parse_boxed(answer)
        if not _has_expression(gold):
            return Verdict(0.0, "bad_gold")
        if not _has_expression(given):
            return Verdict(0.0, "unparseable")
        matches = self._verify(gold, given, timeout_seconds=self._alarm_s, raise_on_error=True)
        return Verdict(1.0, "correct") if matches else Verdict(0.0, "wrong")

    def _parse_boxed(self, text: str) -> list[Any]:
        boxed = "\\boxed{" + text + "}"
        parsed: list[Any] = self._parse(boxed, self._config, parsing_timeout=self._alarm_s, raise_on_error=True)
        return parsed


def _has_expression(parsed: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in parsed)
