"""What a quick-start step pays for being recorded: metrics.jsonl, TensorBoard, samples and the flight record; shares.

Run from the repository root; --base names a policy, without it the weights are random. Writes reporting.md into --out.
    python -m benchmarks.bench_reporting

The run is examples/quickstart/countdown.toml on one rank; the calls are timed where the loop makes them, so the share
holds on a busy machine as well. The first step and the first file, which import and open, are left out.
  reporter       Reporter.step: metrics.jsonl and the events, written and flushed
  flight record  Phases.record_flight: a line of flight.jsonl
  profile        profile_batch: the histograms and gradient norms that the line holds
  samples        RunSamples.trained: the draw, and the numbers of the groups that are kept
  samples, file  SampleWriter: decoding, columns, Parquet, a file in 30 s; by a thread, counted as if in turn
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aer_megatron import train
from aer_megatron.compose.samples import RunSamples
from aer_megatron.loop import phases
from aer_megatron.report.metrics import Metric
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.samples import SampleWriter
from aer_megatron.report.writer import read_metrics

RUN_FILE = "examples/quickstart/countdown.toml"
MODEL = Path("examples/quickstart/model")
LIMIT = 0.02


def timed(function: Callable[..., Any], durations_s: list[float]) -> Callable[..., Any]:
    """Returns ``function``, which notes how long every call took."""

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            durations_s.append(time.perf_counter() - begin)

    return call


def random_base(folder: Path) -> Path:
    """Returns ``folder`` with the quick start's model, random weights."""
    shutil.copytree(MODEL, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL)).float().save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    parts: dict[str, list[float]] = {
        "reporter": [], "flight record": [], "profile": [], "samples": [], "samples, file": []
    }  # fmt: skip
    Reporter.step = timed(Reporter.step, parts["reporter"])  # type: ignore[method-assign]
    phases.Phases.record_flight = timed(phases.Phases.record_flight, parts["flight record"])  # type: ignore[method-assign]
    phases.profile_batch = timed(phases.profile_batch, parts["profile"])
    RunSamples.trained = timed(RunSamples.trained, parts["samples"])  # type: ignore[method-assign]
    SampleWriter._write_file = timed(SampleWriter._write_file, parts["samples, file"])  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        base, output = given.base or random_base(Path(scratch) / "base"), Path(scratch) / "run"
        train.main(
            [
                RUN_FILE, f"--model.path={base}", f"--run.output_dir={output}", f"--run.num_steps={given.steps}",
                "--parallel.tp=1", "--eval.sets={}", "--run.checkpoint_every=0", '--report.sinks=["tensorboard"]',
                "--report.picture=false", "--report.html=false",
            ]
        )  # fmt: skip
        steps_s = [float(line[Metric.TIME_STEP] or 0.0) for line in read_metrics(output / "metrics.jsonl")][1:]
    whole = sum(steps_s)
    shares = {name: sum(durations[1:]) / whole for name, durations in parts.items()}
    text = [
        f"# Cost of records, {len(steps_s)} steps of the quick start, one rank",
        "", "| part | ms a step | share of a step |", "|---|---:|---:|",
        *(f"| {name} | {1000 * share * whole / len(steps_s):.1f} | {share:.2%} |" for name, share in shares.items()),
        f"| together | {1000 * sum(shares.values()) * whole / len(steps_s):.1f} | {sum(shares.values()):.2%} |",
        "", f"A step took {whole / len(steps_s):.2f} s. The limit is {LIMIT:.0%}.", "",
    ]  # fmt: skip
    (given.out / "reporting.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    return int(sum(shares.values()) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
