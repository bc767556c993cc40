"""The flight recorder of a real run, killed or not, and its exact replay."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aer_megatron.algo.difficulty import normalize_difficulty
from aer_megatron.algo.flight import BUCKETS, replayed_difficulty
from aer_megatron.config import Config
from aer_megatron.report.flight import read_flight
from tests.support.runs import metric_lines, run_command, train, write_run_file

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, warm_policy: Path) -> Path:
    """A folder with a run file and a run of 6 steps in ``out``."""
    folder = tmp_path_factory.mktemp("flight")
    done = train(write_run_file(folder, base=warm_policy), "--eval.sets={}")
    assert done.returncode == 0, done.stderr
    return folder


def replay(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, "-m", "aer_megatron.cli", "replay", str(run), *arguments], timeout_s=120)


def test_the_record_and_the_metrics_tell_the_same(straight: Path) -> None:
    lines = metric_lines(straight / "out")
    records = read_flight(straight / "out")
    entropy = Config.from_table(json.loads((straight / "out" / "run.json").read_text())["config"]).algo.entropy
    assert [record.step for record in records] == list(range(6))
    for line, record in zip(lines, records, strict=True):
        observation = record.observation
        assert line["entropy/token_mean"] == observation.entropy_sum / observation.token_count
        assert line["aer/difficulty_mean"] == observation.difficulty_mean
        assert (line["aer/alpha"], line["aer/coefficient"]) == (record.state.alpha, record.coefficient)
        assert line["train/clip_low"] == record.clip_low[0] / record.clip_low[1]
        # difficulty is rebuilt bit for bit from the verdicts
        d_P = replayed_difficulty(record, entropy)
        assert float(d_P.mean()) == observation.difficulty_mean
        sums = record.profile.buckets
        assert sums.entropy_sum_D.sum() == pytest.approx(observation.entropy_sum, rel=1e-12)
        assert record.profile.entropy_by_position_QK.sum() == observation.token_count
        allocation_P = normalize_difficulty(d_P, mode=entropy.normalize, floor=entropy.difficulty_floor)
        assert sums.allocation_sum_D.sum() == pytest.approx(allocation_P.sum(), rel=1e-12)
        for index, bucket in enumerate(BUCKETS):
            named = {key for key in line if key.startswith("difficulty/") and key.endswith(f"/{bucket}")}
            assert bool(named) == bool(sums.prompts_D[index])
            if named:
                assert len(named) == 6 and all(line[key] is not None for key in named)
                assert line[f"difficulty/prompts/{bucket}"] == sums.prompts_D[index]
        assert sum(line.get(f"difficulty/prompts/{bucket}", 0) for bucket in BUCKETS) == 8
        if record.profile.gradients is not None:
            assert record.profile.gradients.policy_norm >= 0
            assert abs(record.profile.gradients.cosine or 0.0) <= 1


def test_the_runs_own_settings_reproduce_its_coefficients_bitwise(straight: Path) -> None:
    done = replay(straight / "out")
    assert done.returncode == 0, done.stderr
    assert "steps 0-5: alpha reproduced exactly" in done.stdout
    with (straight / "out" / "replay.csv").open(newline="") as file:
        replayed = [float(row["replayed_alpha"]).hex() for row in csv.DictReader(file)]
    recorded = [line["aer/alpha"].hex() for line in metric_lines(straight / "out")]
    assert replayed == recorded
    assert len(set(recorded)) > 2


def test_a_resumed_run_records_and_replays_the_same(straight: Path, tmp_path: Path) -> None:
    """Resumed from the checkpoint of step 4 with records of steps 4 and 5 and half of another left by a kill."""
    resumed = tmp_path / "resumed"
    shutil.copytree(straight / "out", resumed)
    (resumed / "replay.csv").unlink(missing_ok=True)
    shutil.rmtree(max((resumed / "checkpoints").iterdir()))
    with (resumed / "flight.jsonl").open("a") as file:
        file.write('{"step":6,"format":1,"obs')
    done = train(straight / "run.toml", f"--run.output_dir={resumed}", "--eval.sets={}")
    assert done.returncode == 0, done.stderr
    assert (resumed / "flight.jsonl").read_bytes() == (straight / "out" / "flight.jsonl").read_bytes()
    assert "steps 0-5: alpha reproduced exactly" in replay(resumed).stdout


def test_another_controller_differs_and_a_run_without_recorder_says_so(straight: Path, tmp_path: Path) -> None:
    picture = tmp_path / "other.png"
    done = replay(straight / "out", "--algo.entropy.update=sign", "--algo.entropy.tau=2", f"--output={picture}")
    assert done.returncode == 0, done.stderr
    assert "they differ most at step" in done.stdout and picture.is_file()
    with picture.with_suffix(".csv").open(newline="") as file:
        alphas = [float(row["replayed_alpha"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(alphas, 1e-3 * np.arange(1, 7))  # far below twice H_0: one step of eta each
    folder = tmp_path / "off"
    done = train(
        straight / "run.toml",
        f"--run.output_dir={folder}",
        "--run.num_steps=1",
        "--eval.sets={}",
        "--report.flight_recorder=false",
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "flight.jsonl").exists()
    missing = replay(folder)
    assert missing.returncode == 2
    assert "report.flight_recorder=true" in missing.stderr
