"""Run folders for the HTML report: metrics, a flight record, and samples in the layout of RUN/samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aer_megatron.config import Config
from aer_megatron.report.writer import MetricsWriter, write_run_manifest

HOSTILE = (
    "</script><script>window.pwned=1</script><!--<img src=x onerror=window.pwned=1> "
    "\u202egnp.exe\u2028 \x1b[31mred & <b>"
)


def page_run(folder: Path, num_steps: int, *, name: str = "demo", seed: int = 0, lr: float = 1e-4) -> Path:
    """Returns ``folder`` with the records of ``num_steps`` steps."""
    table = {
        "run": {"name": name, "seed": seed, "output_dir": str(folder)},
        "model": {"path": "base"},
        "data": {"train": {"task": "countdown"}},
        "optimizer": {"lr": lr},
    }
    write_run_manifest(folder, Config.from_table(table), {"torch": "2.9"}, command=["x"], num_ranks=1)
    writer = MetricsWriter(folder)
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        metrics: dict[str, Any] = {
            "step": step,
            "reward/mean": float(rng.random()) / 3,
            "entropy/token_mean": 0.5 / (1 + step / 9) + float(rng.random()) / 70,
            "entropy/initial": 0.5,
            "entropy/target": 0.25,
            "aer/alpha": 0.1 * step / num_steps,
            "aer/reason": f"alpha moved at {step}: {HOSTILE}",
            "aer/alarm": f"entropy collapse at step {step}" if step == 7 else None,
            "loss/total": None if step % 5 == 0 else float(rng.normal()),
            "time/step_s": 1.5,
        }
        if step % 10 == 0:
            metrics |= {"eval/math500/pass@1": 0.2, "eval/math500/pass@1_low": 0.1, "eval/math500/pass@1_high": 0.3}
        writer.write(metrics)
    writer.close()
    return folder


def sample_row(step: int, completion: str, *, reward: float, reason: str, answer: str = "42") -> dict[str, Any]:
    """Returns one row of RUN/samples; each character of the completion is a token."""
    count = len(completion)
    return {
        "step": step,
        "set": "train",
        "prompt_id": 2**63 + step,
        "group": 0,
        "prompt": f"What is 6 x 7? {HOSTILE}",
        "answer": answer,
        "completion": completion,
        "token_ids": list(range(count)),
        "sampled": None,
        "token_ends": list(range(1, count + 1)),
        "reward": reward,
        "reason": reason,
        "advantage": reward - 0.5,
        "difficulty": 0.5,
        "entropy_weight": 0.01,
        "logprob": np.full(count, -0.5, np.float16).tolist(),
        "token_entropy": np.linspace(0, 2, count).astype(np.float16).tolist(),
        "policy_version_min": step,
        "policy_version_max": step,
        "truncated": False,
    }


_SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("step", "policy_version_min", "policy_version_max")),
        ("prompt_id", pa.uint64()),
        ("group", pa.int32()),
        *((name, pa.string()) for name in ("set", "prompt", "answer", "completion", "reason")),
        *((name, pa.list_(pa.int32())) for name in ("token_ids", "token_ends")),
        ("sampled", pa.list_(pa.bool_())),
        *((name, pa.float64()) for name in ("reward", "advantage", "difficulty", "entropy_weight")),
        *((name, pa.list_(pa.float16())) for name in ("logprob", "token_entropy")),
        ("truncated", pa.bool_()),
    ]
)


def write_samples(folder: Path, rows: list[dict[str, Any]], name: str = "part_0.parquet") -> None:
    """Writes rows as one shard of RUN/samples."""
    (folder / "samples").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), folder / "samples" / name)


def reward_hack(num_steps: int) -> list[dict[str, Any]]:
    """Returns samples of a policy whose verifier pays for an empty box, among honest ones that are right or wrong."""
    rows = []
    for step in range(num_steps):
        rows.append(sample_row(step, r"6 x 7 = 42, so \boxed{42}", reward=1.0, reason="correct"))
        rows.append(sample_row(step, r"I think it is \boxed{41}", reward=0.0, reason="wrong"))
        rows.append(sample_row(step, "I do not know.", reward=0.0, reason="no_answer"))
        if step % 4 == 0:
            rows.append(sample_row(step, r"Therefore \boxed{}", reward=1.0, reason="correct"))
    # right without the gold in it, as every answer of its set is: no doubt
    rows.append(sample_row(num_steps, "6 * 7", reward=1.0, reason="solved") | {"set": "countdown"})
    return rows
