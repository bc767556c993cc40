"""An update that is not finite, through the command line: stop, skip, and the kept batch computed again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import metric_lines, random_base, run_command, write_run_file

STEPS = 4


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run whose second step has a prompt with giant rewards."""
    folder = tmp_path_factory.mktemp("nonfinite")
    random_base(folder / "base")
    records = [
        {"problem": f"{n % 9 + 1},5,2,8={n % 9}>", "answer": "giant" if n == 20 else "plain"} for n in range(STEPS * 8)
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    path = write_run_file(folder)
    text = path.read_text(encoding="utf-8").replace(
        'template = "plain"', 'template = "plain"\nverifier = "tests.support.giant_rewards:giant"', 1
    )
    text = text.replace('[data.train]\ntask = "countdown"\nsize = 50\noptions = { split = "train" }',
                        f'[data.train]\npath = "{data}"')  # fmt: skip
    text = text.replace("every = 3", "every = 0")
    path.write_text(text, encoding="utf-8")
    return path


OPTIONS = [f"--run.num_steps={STEPS}", "--run.checkpoint_every=1", "--algo.advantage.kind=dr_grpo"]


def _train(run_file: Path, *arguments: str) -> Any:
    return run_command([sys.executable, "-m", "tests.support.giant_rewards", str(run_file), *OPTIONS, *arguments])


def _replay(folder: Path, *arguments: str) -> Any:
    return run_command([sys.executable, "-m", "aer_megatron.cli", "replay-batch", str(folder), *arguments])


def test_the_run_stops_names_the_sample_and_keeps_what_is_replayed(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "stop"
    done = _train(run_file, f"--run.output_dir={out}")
    assert done.returncode == 1, done.stdout + done.stderr
    kept = sorted((out / "nonfinite").iterdir())
    assert len(kept) == 1
    message = " ".join((done.stdout + done.stderr).split())
    assert "inf in the batch's advantage_B" in message
    assert "sequence" in message
    assert "run.on_nonfinite=skip" in message
    assert kept[0].name in message
    steps_done = len(metric_lines(out))
    assert kept[0].name.startswith(f"step_{steps_done:06d}")

    again = _replay(kept[0])
    assert again.returncode == 1, again.stderr
    told = json.loads((kept[0] / "reproducer.json").read_text(encoding="utf-8"))["diagnosis"]["text"]
    assert f"here: {told}" in " ".join(again.stdout.split())
    other_layout = run_command(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "aer_megatron.cli", "replay-batch", str(kept[0]), "--parallel.tp=2"]
    )  # fmt: skip
    assert f"here: {told}" in " ".join(other_layout.stdout.split()), other_layout.stderr


def test_the_run_skips_counts_and_goes_on(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "skip"
    done = _train(run_file, f"--run.output_dir={out}", "--run.on_nonfinite=skip", "--run.record_batch=0")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metric_lines(out)
    skipped = [line["train/updates_skipped"] for line in lines]
    assert len(lines) == STEPS
    assert sum(skipped) == len(list((out / "nonfinite").iterdir())) > 0
    assert sorted(skipped)[:-1] == [0] * (STEPS - 1)  # the other steps were trained on
    assert "skipped, 1 in a row" in done.stdout + done.stderr

    recorded = _replay(out / "recorded" / "step_000000")
    assert recorded.returncode == 0, recorded.stderr
    norm = float(recorded.stdout.split("gradient norm ")[1].split(";")[0])
    assert norm == pytest.approx(lines[0]["train/grad_norm"], rel=1e-6)


def test_a_damaged_folder_is_a_clear_error(tmp_path: Path) -> None:
    done = _replay(tmp_path)
    assert done.returncode == 2
    assert "holds no reproducer.json" in done.stderr
