"""The judge of answers against math-verify on pairs of gold answer and completion: who is right, how often, how fast.

    python -m benchmarks.bench_grader PAIRS.jsonl [--markdown FILE]

A pair is {"gold", "completion", "want": "correct" | "wrong", "kind", "adversarial"}. Both judges get the content of the
last box; times are of the process's CPU, imports and warm-up left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aer_megatron.rewards.math import verify_math
from aer_megatron.rewards.math_verify import MathVerifyVerifier
from aer_megatron.types import Prompt, Verdict

Judge = Callable[[str, Prompt], Verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    with arguments.pairs.open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    library = MathVerifyVerifier(alarm_s=5)
    table = report(pairs, {"ours": verify_math, "math-verify": lambda text, prompt: verdict_of(library, text, prompt)})
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")


def verdict_of(library: MathVerifyVerifier, text: str, prompt: Prompt) -> Verdict:
    """Returns the library's verdict; what it raises is a wrong answer here, as its users count it."""
    try:
        return library(text, prompt)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, NotImplementedError):
        return Verdict(0.0, "error")


def report(pairs: list[dict[str, Any]], judges: dict[str, Judge]) -> str:
    """Returns the Markdown table of precision, recall, speed and agreement."""
    prompts = [Prompt(index, "", (0,), pair["gold"], "math", {}) for index, pair in enumerate(pairs)]
    given: dict[str, list[bool]] = {}
    lines = [
        "| judge | pairs | precision | recall | adversarial: precision | recall | per CPU-second |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, judge in judges.items():
        judge(r"\boxed{\frac{1}{2}}", prompts[0])
        begin = time.process_time()
        given[name] = [
            judge(pair["completion"], prompt).reward == 1.0 for pair, prompt in zip(pairs, prompts, strict=True)
        ]
        seconds = time.process_time() - begin
        every = precision_recall(pairs, given[name])
        hard = precision_recall(
            [pair for pair in pairs if pair["adversarial"]],
            [right for right, pair in zip(given[name], pairs, strict=True) if pair["adversarial"]],
        )
        shares = " | ".join(f"{share:.3f}" for share in (*every, *hard))
        lines.append(f"| {name} | {len(pairs)} | {shares} | {len(pairs) / seconds:.0f} |")
    first, second = given.values()
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    return "\n".join([*lines, "", f"The two agree on {agreed} of {len(pairs)} pairs.", ""])


def precision_recall(pairs: list[dict[str, Any]], given: list[bool]) -> tuple[float, float]:
    """Returns (share of accepted answers that are right, share of right answers that are accepted)."""
    right = [pair["want"] == "correct" for pair in pairs]
    hits = sum(a and b for a, b in zip(given, right, strict=True))
    return hits / max(sum(given), 1), hits / max(sum(right), 1)


if __name__ == "__main__":
    main()
