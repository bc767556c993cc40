"""Measures the asynchronous loop against the synchronous one, over a server whose generation lasts a training step.

    python -m benchmarks.bench_async --scratch DIR [--rounds 3] [--steps 10] [--device-s 3]

The server is the stand-in of the tests in a process of its own: it sleeps for every token and needs no cores. With
--device-s the policy update is followed by so long a wait, for a device that trains while the host is idle: a machine
shared with other work then still gives equal steps. Each
round measures what a synchronous step takes without generation, makes the server's generation last as long, and runs
both loops; the first two steps of each are left out. Writes benchmarks/results/async.json and async.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "examples" / "quickstart" / "model"
NEW_TOKENS = 24
TRAIN = "--as-trainer"  # how the script calls itself
WARM_UP_STEPS = 2
# large enough that a step is compute, and not the handling of requests
SIZE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}

RUN_FILE = """
[run]
num_steps = {steps}
[model]
path = "{folder}/base"
dtype = "fp32"
[parallel]
micro_batch_size = 16
[data]
template = "plain"
max_prompt_tokens = 16
[data.train]
task = "countdown"
size = 200
options = {{ split = "train" }}
[rollout]
engine = "sglang"
prompts_per_step = 8
group_size = 8
max_new_tokens = {new_tokens}
[sglang]
max_concurrency = 512
[algo]
correction = {{ weight = "token" }}
[report]
picture = false
sinks = []
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="default %(default)s")
    parser.add_argument("--device-s", type=float, default=0.0, help="default %(default)s")
    options = parser.parse_args()
    prepare(options.scratch, options.steps)
    rounds = []
    for _ in range(options.rounds):
        rounds.append(measure(options.scratch, options.device_s))
        print(json.dumps(rounds[-1]), flush=True)
    write(rounds, options.steps, options.device_s)


def prepare(folder: Path, steps: int) -> None:
    """Writes the run file and a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, folder / "base")
    config = AutoConfig.from_pretrained(MODEL, **SIZE)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "base")
    text = RUN_FILE.format(folder=folder, steps=steps, new_tokens=NEW_TOKENS)
    (folder / "run.toml").write_text(text, encoding="utf-8")


def measure(folder: Path, device_s: float) -> dict[str, float]:
    """Returns the median seconds of a training step, a generation and both loops' steps, from one round."""
    with server(folder, token_s=0.0) as url:
        lines = run(folder, "calibration", url, staleness=0, device_s=device_s)
    training_s = statistics.median(line["time/step_s"] - line["time/rollout_s"] for line in lines)
    with server(folder, token_s=training_s / NEW_TOKENS) as url:
        turns = run(folder, "sync", url, staleness=0, device_s=device_s)
        beside = run(folder, "async", url, staleness=1, device_s=device_s)
    return {
        "training_s": training_s,
        "generation_s": statistics.median(line["time/rollout_s"] for line in turns),
        "sync_step_s": statistics.median(line["time/step_s"] for line in turns),
        "async_step_s": statistics.median(line["time/step_s"] for line in beside),
        "async_wait_s": statistics.median(line["time/rollout_s"] for line in beside),
        "staleness_max": max(line["rollout/staleness_max"] for line in beside),
        "staleness_mean": statistics.mean(line["rollout/staleness_mean"] for line in beside),
    }


@contextlib.contextmanager
def server(folder: Path, *, token_s: float) -> Iterator[str]:
    """Yields the address of a stand-in server that sleeps ``token_s`` per token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "tests/support/sglang_double.py", "--model-path", str(folder / "base")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--token-s", str(token_s), "--vocab-size", "20"]
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def run(folder: Path, name: str, url: str, *, staleness: int, device_s: float) -> list[dict[str, float]]:
    """Returns the metrics of a run's steps but the first ones. Raises RuntimeError if it fails."""
    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, TRAIN, str(device_s), str(folder / "run.toml")]
    command += [f"--run.output_dir={output}", f'--sglang.urls=["{url}"]', f"--rollout.staleness={staleness}"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[WARM_UP_STEPS:]]


def train(device_s: float, arguments: list[str]) -> int:
    """Returns the exit code of the real command line, in which a policy update takes ``device_s`` longer."""
    from aer_megatron.actor.actor import Actor
    from aer_megatron.train import main as train_main

    update = Actor.train

    def waiting(self: Actor, batch: Any, **options: Any) -> Any:
        stats = update(self, batch, **options)
        time.sleep(device_s)
        return stats

    Actor.train = waiting  # type: ignore[method-assign]
    return train_main(arguments)


def write(rounds: list[dict[str, float]], steps: int, device_s: float) -> None:
    """Writes the rounds as JSON and as Markdown."""
    load = os.getloadavg()[1]
    table = {"cores": os.cpu_count(), "load_average": load, "device_s": device_s, "rounds": rounds}
    (RESULTS / "async.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Generating beside training",
        "",
        "`python -m benchmarks.bench_async --scratch DIR`: a Qwen3 of 2 wide layers with random weights, 64",
        "sequences a step, one stand-in server that sleeps for every token; medians of "
        f"{steps - WARM_UP_STEPS} steps of the",
        "real command line, `rollout.staleness = 1` against 0. Training is a step without generation, publication",
        f"and a wait of {device_s:g} s for a device (--device-s) included; generation was set to last as long.",
        f"{os.cpu_count()} cores shared with other work (load average {load:.0f}): the ratio, not the seconds, is what",
        "the table says. 0.5 is the bound for equal parts.",
        "",
        "| training | generation | synchronous step | asynchronous step | ratio | of it waiting | staleness, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rounds:
        seconds = [f"{row[name]:.2f} s" for name in ("training_s", "generation_s", "sync_step_s", "async_step_s")]
        ratio = row["async_step_s"] / row["sync_step_s"]
        cells = [*seconds, f"{ratio:.2f} x", f"{row['async_wait_s']:.2f} s", f"{row['staleness_mean']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    (RESULTS / "async.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    if sys.argv[1:2] == [TRAIN]:
        sys.exit(train(float(sys.argv[2]), sys.argv[3:]))
    main()
