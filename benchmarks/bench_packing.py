"""Padding and balance of packed micro-batches over 8 data-parallel ranks; writes benchmarks/results/packing.{md,json}.

    .venv/bin/python -m benchmarks.bench_packing                            # under a minute; arithmetic only, no model
    .venv/bin/python -m benchmarks.bench_packing --lengths mine.jsonl       # {"prompt": tokens, "response": tokens}

**Batches.** 64 prompts x 8 rollouts per optimizer step, several steps, the shapes of Qwen3-8B, cp 2 and sequence
parallelism over tp 4 (so that sequences are padded to multiples of 4, micro-batches to multiples of 8).
  gsm8k       prompts of GSM8K's training set at 4 characters a token where --data has it, else the log-normal fitted
              to it; responses log-normal with median 180 and shape 0.45, at most 1024
  long tail   prompts as above; responses log-normal with median 700 and shape 1.1, at most 16384: most short, few huge

**Forms.** All keep to the token budget; sequences longer than it have a micro-batch to themselves.
  ours                 ranks by FLOPs, micro-batches by tokens, both by the C++ partition (actor/packing.py)
  Karmarkar-Karp       largest differencing by token counts over ranks, then over each rank's micro-batches
  first-fit            bins of the budget in the order given, dealt to the ranks in turn
  first-fit-decreasing the same, longest first
  padded               sorted rectangles of 8 sequences, dealt to the ranks one by one: parallel.micro_batch_size

**Figures.** Padding is the share of computed tokens that are none of a sequence. Imbalance is the slowest rank's FLOPs
over the mean, minus 1, for the step (with padding) and where ranks wait for one another after every micro-batch.
Micro-batches are those of the rank with most. Medians and the worst over steps.

This file does NOT judge the figures; tests/actor/test_packing.py does for ours.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.actor.batching import micro_batch_indices
from aer_megatron.actor.packing import TokenCut, pack_micro_batches, padded_lengths, sequence_costs
from aer_megatron.convert.hf_config import architecture_from_hf_config

RANKS, PROMPTS, GROUP, BUDGET = 8, 64, 8, 16_384
CUT = TokenCut(cp_size=2, shards=4)
PADDED_ROWS = 8
RESULTS = Path(__file__).parent / "results"
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
MODEL = architecture_from_hf_config(QWEN3_8B)

Plan = list[list[np.ndarray]]  # [rank][micro-batch] -> sequences
Form = Callable[[np.ndarray], Plan]


def draw_lengths(kind: str, rng: np.random.Generator, gsm8k: Path) -> np.ndarray:
    """Returns int64 [PROMPTS * GROUP], tokens of a step's sequences, groups side by side."""
    if gsm8k.is_file():
        characters = [len(json.loads(line)["problem"]) for line in gsm8k.open(encoding="utf-8")]
        prompts = np.maximum(8, rng.choice(characters, PROMPTS) // 4)
    else:
        prompts = np.clip(rng.lognormal(np.log(53), 0.37, PROMPTS), 8, 400)
    median, shape, most = {"gsm8k": (180, 0.45, 1024), "long tail": (700, 1.1, 16_384 - 400)}[kind]
    responses = np.clip(rng.lognormal(np.log(median), shape, PROMPTS * GROUP), 4, most)
    return (np.repeat(prompts, GROUP) + responses).astype(np.int64)


def ours(length_B: np.ndarray) -> Plan:
    """Returns the plan of actor/packing.py."""
    cost_B, everyone = sequence_costs(length_B, MODEL), np.arange(len(length_B))
    return [
        pack_micro_batches(everyone, length_B, cost_B, ranks=(rank, RANKS), budget=BUDGET, multiple=1, cut=CUT)
        for rank in range(RANKS)
    ]


def differencing(weight: np.ndarray, parts: int) -> list[np.ndarray]:
    """Returns the largest differencing method's partition (Karmarkar and Karp 1982)."""
    empty: list[tuple[int, list[int]]] = [(0, [])] * (parts - 1)
    partial = [[*empty, (int(w), [i])] for i, w in enumerate(weight)]
    while len(partial) > 1:
        partial.sort(key=lambda sums: sums[-1][0] - sums[0][0])
        one, other = partial.pop(), partial.pop()
        merged = [(a + b, left + right) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        partial.append(sorted(merged, key=lambda part: part[0]))
    return [np.array(members, dtype=np.int64) for _, members in partial[0]]


def karmarkar_karp(length_B: np.ndarray) -> Plan:
    """Returns token-balanced ranks, each cut into the fewest token-balanced micro-batches that fit."""
    limit = max(BUDGET, int(length_B.max()))
    plan = []
    for of_rank in differencing(length_B, RANKS):
        number = 1
        while True:
            parts = [of_rank[part] for part in differencing(length_B[of_rank], number)]
            if max(int(length_B[part].sum()) for part in parts) <= limit - 8 * number:
                break
            number += 1
        plan.append(parts)
    return plan


def first_fit(length_B: np.ndarray, order: np.ndarray | None = None) -> Plan:
    """Returns bins of the budget, filled in order, dealt to the ranks in turn."""
    bins: list[tuple[int, list[int]]] = []
    for index in (np.arange(len(length_B)) if order is None else order).tolist():
        width = -(-int(length_B[index]) // 4) * 4
        place = next((i for i, (used, _) in enumerate(bins) if used + width <= BUDGET), len(bins))
        used, members = bins[place] if place < len(bins) else (0, [])
        bins[place : place + 1] = [(used + width, [*members, index])]
    return [[np.array(members) for _, members in bins[rank::RANKS]] for rank in range(RANKS)]


def first_fit_decreasing(length_B: np.ndarray) -> Plan:
    """Returns ``first_fit``, longest first."""
    return first_fit(length_B, np.argsort(-length_B, kind="stable"))


def padded(length_B: np.ndarray) -> Plan:
    """Returns the rectangles of actor/batching.py."""
    everyone = np.arange(len(length_B))
    return [
        micro_batch_indices(everyone, length_B, dp_rank=rank, dp_size=RANKS, micro_batch_size=PADDED_ROWS)
        for rank in range(RANKS)
    ]


FORMS: dict[str, Form] = {
    "ours": ours,
    "Karmarkar-Karp": karmarkar_karp,
    "first-fit": first_fit,
    "first-fit-decreasing": first_fit_decreasing,
    "padded": padded,
}


@dataclass(frozen=True)
class Figures:
    """What a plan costs: shares in [0, 1], except for the number of micro-batches."""

    padding: float
    imbalance: float
    stepwise: float
    micro_batches: int


def measure(length_B: np.ndarray, plan: Plan, *, rectangles: bool) -> Figures:
    """Returns the figures of one step."""
    number = max(len(parts) for parts in plan)
    flops = np.zeros((RANKS, number))
    tokens = 0
    for rank, parts in enumerate(plan):
        for place, part in enumerate(parts):
            if rectangles:
                width = -(-int(length_B[part].max()) // CUT.total_multiple) * CUT.total_multiple
                widths = np.full(len(part), width, dtype=np.int64)
            else:
                widths = padded_lengths(np.sort(length_B[part]), CUT)
            tokens += int(widths.sum())
            flops[rank, place] = sequence_costs(widths, MODEL).sum()
    of_rank = flops.sum(axis=1)
    mean = float(of_rank.mean())
    return Figures(
        padding=1 - int(length_B.sum()) / tokens,
        imbalance=float(of_rank.max()) / mean - 1,
        stepwise=float(flops.max(axis=0).sum()) / mean - 1,
        micro_batches=number,
    )


def steps(kind: str, options: argparse.Namespace) -> Iterator[np.ndarray]:
    """Yields the lengths of every step."""
    rng = np.random.default_rng(options.seed)
    if options.lengths:
        rows = [json.loads(line) for line in options.lengths.open(encoding="utf-8")]
        lengths = np.array([row["prompt"] + row["response"] for row in rows], dtype=np.int64)
        for _ in range(options.steps):
            yield rng.choice(lengths, PROMPTS * GROUP)
        return
    for _ in range(options.steps):
        yield draw_lengths(kind, rng, options.data / "gsm8k_train.jsonl")


def main() -> None:
    """Writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--lengths", type=Path, help="JSONL of token counts to draw from, in place of both batches")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = ["given lengths"] if options.lengths else ["gsm8k", "long tail"]
    table: dict[str, Any] = {}
    for kind in kinds:
        batches = list(steps(kind, options))
        for name, form in FORMS.items():
            rows = [measure(batch, form(batch), rectangles=name == "padded") for batch in batches]
            keys = ("padding", "imbalance", "stepwise", "micro_batches")
            table.setdefault(kind, {})[name] = {
                key: [float(f([getattr(row, key) for row in rows])) for f in (np.median, np.max)] for key in keys
            }
    source = "prompts from GSM8K" if (options.data / "gsm8k_train.jsonl").is_file() else "prompts from the fit"
    RESULTS.joinpath("packing.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    RESULTS.joinpath("packing.md").write_text("\n".join(_markdown(table, options, source)) + "\n", encoding="utf-8")


def _markdown(table: dict[str, Any], options: argparse.Namespace, source: str) -> list[str]:
    lines = [
        "# Packed micro-batches",
        "",
        f"`python -m benchmarks.bench_packing` on {platform.machine()}: {options.steps} steps of {PROMPTS} x {GROUP} "
        f"sequences over {RANKS} data-parallel ranks, budget {BUDGET} tokens, {source}; the forms are described in "
        "that file. Median over steps (worst).",
    ]
    for kind, forms in table.items():
        head = "| form | padding % | FLOP imbalance % | ... if ranks wait after every micro-batch % | micro-batches |"
        lines += ["", f"## {kind}", "", head, "|---|---|---|---|---|"]
        for name, row in forms.items():
            cells = [f"{100 * row[k][0]:.2f} ({100 * row[k][1]:.2f})" for k in ("padding", "imbalance", "stepwise")]
            cells.append(f"{row['micro_batches'][0]:.0f} ({row['micro_batches'][1]:.0f})")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
