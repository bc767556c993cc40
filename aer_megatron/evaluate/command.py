"""Measures a policy on evaluation sets: ``aer evaluate``.

    aer evaluate runs/math --set aime24 math500
    aer evaluate MODEL --set gsm8k --eval.sets.gsm8k.source.path=gsm8k_test.jsonl --temperatures 0 0.6 1.0
    aer launch --nproc 2 evaluate runs/math

Exit codes: 0 done, 2 options, problems or weights are wrong. See docs/how-to/evaluate-a-policy.md.
"""

from __future__ import annotations

import math
from pathlib import Path

from aer_megatron.config_section import TRUST_CODE
from aer_megatron.console.command_line import CommandLine, Given, Option
from aer_megatron.console.failures import LOG_FOLDER, Edge

FORMATS = ("table", "markdown", "latex")
FORMAT = Option("format", "FORM", "of the table that is printed", choices=FORMATS, default="table")


def _run(given: Given, edge: Edge) -> int:
    # torch and transformers take seconds, which a mistyped option should not cost
    from aer_megatron.compose.common import collective_timeout_s
    from aer_megatron.evaluate.evaluation import Wish, evaluate
    from aer_megatron.evaluate.policy import find_policy
    from aer_megatron.evaluate.tables import render, result_rows
    from aer_megatron.parallel import platform as platforms
    from aer_megatron.parallel.topology import destroy_topology

    policy = find_policy(given)
    output = given["output"] or (policy.place / "evaluate.json" if policy.kind == "run" else Path("evaluate.json"))
    if output.suffix != ".json":
        raise ValueError(f"--output={output} must end in .json; the samples are kept beside it as .samples.jsonl")
    beside = output.with_suffix("")  # what servers that are launched write
    edge.log_folder = beside / LOG_FOLDER
    known = policy.config.eval.sets
    for name in given["set"]:
        if name not in known:
            raise ValueError(f"--set={name} is no set of [eval.sets]; it has {', '.join(known) or 'none'}")
    names = tuple(dict.fromkeys(given["set"] or known))
    if not names:
        raise ValueError("no set is given; name a run file with --config, or give --eval.sets.NAME.source.path=FILE")
    config = policy.config.with_options({"run.output_dir": str(beside)})
    wish = Wish(policy.with_config(config), names, tuple(dict.fromkeys(given["temperatures"])), output)
    platform = platforms.install_platform()
    platforms.initialize_process_group(platform, timeout_s=collective_timeout_s(config))
    try:
        with edge.noting():
            result = evaluate(wish, platform)
    finally:
        destroy_topology()
    if result is not None:
        print(render(*result_rows(result), given["format"]))
        print(output)
    return 0


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and 0 <= value <= 100):
        raise ValueError("must be a number from 0, which is greedy, to 100")
    return value + 0.0


COMMAND = CommandLine(
    "evaluate",
    about="Measures a policy on evaluation sets and writes one JSON file: pass@k and maj@k with 95 % intervals, and "
    "the counts of every problem. POLICY is a Hugging Face folder, or a run, whose newest checkpoint and own options "
    "are taken. Killed and called again, it goes on: samples are kept beside the output.",
    run=_run,
    place="POLICY",
    what="a Hugging Face folder or the folder of a run",
    under_launch=True,
    options=(
        Option("set", "NAME ...", "sets of [eval.sets] [all]", several=True),
        Option("config", "RUN.toml", "the run file of the sets [of a run: its own options]", Path),
        Option("checkpoint", "step_N", "of a run [the newest]"),
        Option("urls", "URL ...", "SGLang servers that serve the policy; POLICY is then their tokenizer", several=True),
        Option("temperatures", "T ...", "in place of each set's own; 0 is greedy", _temperature, several=True),
        Option("output", "FILE.json", "the result [evaluate.json in the run, else here]", Path),
        FORMAT,
        Option(TRUST_CODE, "", "import the classes of your own that run.json names"),
    ),
)
main = COMMAND.main
