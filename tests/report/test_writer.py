"""metrics.jsonl and run.json: exact, ordered, and the same after a kill and a resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aer_megatron.config import Config
from aer_megatron.config_loading import config_digest
from aer_megatron.report.writer import (
    MetricsWriter,
    changed_options,
    mark_trained,
    package_versions,
    read_metrics,
    read_run_manifest,
    source_commit,
    write_run_manifest,
)


def lines(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


def test_a_line_is_ordered_step_first_and_time_last(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write(
        {
            "train/lr": 0.5,
            "time/step_s": 2.0,
            "aer/alarm": None,
            "step": 3,
            "reward/mean": 0.25,
            "aer/held": False,
        }
    )
    assert lines(tmp_path) == (
        b'{"step": 3, "aer/alarm": null, "aer/held": false, "reward/mean": 0.25, "train/lr": 0.5, "time/step_s": 2.0}\n'
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16, 123456789.123456789])
def test_floats_come_back_with_the_same_bits(tmp_path: Path, value: float) -> None:
    MetricsWriter(tmp_path).write({"step": 0, "reward/mean": value})
    found = read_metrics(tmp_path / "metrics.jsonl")[0]["reward/mean"]
    assert isinstance(found, float)
    assert found.hex() == value.hex()
    assert f": {value!r}}}" in lines(tmp_path).decode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    MetricsWriter(tmp_path).write({"step": 0, "entropy/token_mean": value})
    assert lines(tmp_path) == b'{"step": 0, "entropy/token_mean": null}\n'


def test_numpy_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write(
        {
            "step": np.int64(0),
            "loss/total": np.float32(0.5),
            "aer/frozen": np.bool_(True),
            "rollout/refills": np.int32(2),
        }
    )
    assert lines(tmp_path) == b'{"step": 0, "aer/frozen": true, "loss/total": 0.5, "rollout/refills": 2}\n'


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"reward/mean": 1.0}, "metrics without 'step'"),
        ({"step": 0, "reward/maen": 1.0}, "unknown metric 'reward/maen': nearest is 'reward/mean'"),
        ({"step": 0, "reward/mean": "high"}, "reward/mean='high' of type str does not fit its unit 'reward'"),
        ({"step": 0, "aer/reason": 3.0}, "does not fit its unit 'text'"),
        ({"step": 0, "aer/held": 1.0}, "does not fit its unit 'flag'"),
        ({"step": 0, "loss/total": [1.0]}, "of type list does not fit"),
        ({"step": 0.5}, "must be an integer above -1"),
        ({"step": None}, "must be an integer above -1"),
        ({"step": -1}, "must be an integer above -1"),
    ],
)
def test_what_is_no_metric_is_refused_and_leaves_no_line(tmp_path: Path, metrics: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        MetricsWriter(tmp_path).write(metrics)
    assert message in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_step_is_written_once_also_by_a_later_launch(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write({"step": 4})
    later = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="step=4 must be an integer above 4, the last step in"):
        later.write({"step": 4})
    later.write({"step": 5})
    assert lines(tmp_path) == b'{"step": 4}\n{"step": 5}\n'


def record(step: int) -> dict[str, Any]:
    return {"step": step, "reward/mean": math.sin(step), "aer/reason": f"Schritt {step}: alpha ↑"}


@pytest.mark.parametrize("tail", [b"", b'{"step": 7, "aer/reason": "\xe2\x86', b'{"step": 7', b"{", b'"'])
@pytest.mark.parametrize("resume_step", [0, 1, 4, 7, 9])
def test_a_resumed_file_equals_the_one_of_a_run_never_killed(tmp_path: Path, tail: bytes, resume_step: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder, end in ((straight, 10), (killed, 7)):
        writer = MetricsWriter(folder)
        for step in range(end):
            writer.write(record(step))
    with (killed / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    resumed = MetricsWriter(killed)
    resumed.truncate_from(resume_step)
    for step in range(min(resume_step, 7), 10):
        resumed.write(record(step))
    assert lines(killed) == lines(straight)
    assert [path.name for path in killed.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}')
    writer = MetricsWriter(tmp_path)
    writer.truncate_from(2)
    writer.write({"step": 2})
    assert lines(tmp_path) == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "damage",
    [
        b"not json",
        b'["step"]',
        b'{"reward/mean": 1.0}',
        b'{"step": null}',
        b'{"step": true}',
        b'{"step": 1.0}',
        b'{"step": Infinity}',
        b'{"step": 1, "reward/mean": ' + b"[" * 100_000,
        b"",
    ],
    ids=lambda damage: damage[:30],
)
def test_damage_before_the_last_line_is_named_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    content = b'{"step": 0}\n' + damage + b'\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not the record of a step"):
        MetricsWriter(tmp_path)
    assert lines(tmp_path) == content


def test_reading_leaves_out_a_half_written_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "reward/mean": 0.5}\n{"step": 1, "rew')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.5}]


def test_reading_a_run_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give the folder of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.processes
def test_a_line_outlives_the_process_that_is_killed_after_it(tmp_path: Path) -> None:
    program = f"""
        import time
        from aer_megatron.report.writer import MetricsWriter
        MetricsWriter({str(tmp_path)!r}).write({{"step": 0}})
        print("written", flush=True)
        time.sleep(60)
    """
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert lines(tmp_path) == b'{"step": 0}\n'


CONFIG = Config.from_table({"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "run": {"name": "n"}})


def test_the_manifest_holds_what_repeats_the_run(tmp_path: Path) -> None:
    path = write_run_manifest(
        tmp_path / "run",
        CONFIG,
        {"torch": "2.13.0", "megatron-core": None},
        command=["aer_megatron.train", "run.toml", "--run.seed=0"],
        num_ranks=2,
    )
    manifest = read_run_manifest(tmp_path / "run")
    assert path == tmp_path / "run" / "run.json"
    assert json.loads(path.read_text("utf-8")) == manifest
    assert Config.from_table(manifest["config"]) == CONFIG
    assert manifest["config_digest"] == config_digest(CONFIG.model_dump(mode="json"))
    assert manifest["command"] == ["aer_megatron.train", "run.toml", "--run.seed=0"]
    assert manifest["versions"] == {"torch": "2.13.0", "megatron-core": None}
    assert (manifest["name"], manifest["num_ranks"]) == ("n", 2)
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def launch(folder: Path, config: Config, first_step: int) -> dict[str, Any]:
    write_run_manifest(folder, config, {}, command=["x"], num_ranks=1, first_step=first_step)
    return read_run_manifest(folder)


def test_every_launch_is_kept_and_the_newest_that_made_a_step_stands_on_top(tmp_path: Path) -> None:
    other = CONFIG.with_options({"run.seed": 7})
    launch(tmp_path, CONFIG, 0)
    begun = launch(tmp_path, other, 5)  # goes on at step 5 and has not made it yet
    assert [entry["first_step"] for entry in begun["launches"]] == [0, 5]
    assert [entry["config"]["run"]["seed"] for entry in begun["launches"]] == [0, 7]
    assert begun["config"]["run"]["seed"] == 0
    assert changed_options(tmp_path, other) == ["run.seed 0 -> 7"]
    mark_trained(tmp_path)
    assert read_run_manifest(tmp_path)["config"]["run"]["seed"] == 7
    assert read_run_manifest(tmp_path)["launches"] == begun["launches"]
    assert changed_options(tmp_path, other) == []
    again = launch(tmp_path, CONFIG, 0)  # no checkpoint was there: it begins anew
    assert again["config"]["run"]["seed"] == 0
    assert len(again["launches"]) == 3


def test_the_record_of_an_older_version_becomes_the_first_launch(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "old", "config": CONFIG.model_dump(mode="json")}))
    record = launch(tmp_path, CONFIG, 3)
    assert [entry["name"] for entry in record["launches"]] == ["old", "n"]
    assert record["name"] == "old"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"launches": 3}', '{"launches": [3]}', "[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not .*move it away"):
        read_run_manifest(tmp_path)


def test_a_folder_without_a_manifest_has_an_empty_one(tmp_path: Path) -> None:
    assert read_run_manifest(tmp_path) == {}


def test_versions_of_what_is_not_installed_are_none() -> None:
    assert package_versions(["numpy", "no-such-distribution-here"]) == {
        "numpy": np.__version__,
        "no-such-distribution-here": None,
    }


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_repository_which_tracks_the_file(tmp_path: Path) -> None:
    tracked, foreign = tmp_path / "tracked.py", tmp_path / "foreign.py"
    tracked.write_text("a = 1\n", encoding="utf-8")
    foreign.write_text("b = 1\n", encoding="utf-8")
    assert source_commit(tracked) is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "tracked.py")
    assert source_commit(tracked) is None  # tracked, but nothing is committed yet
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(tracked) == {"commit": commit, "modified": False}
    assert source_commit(foreign) is None  # as a package installed below somebody's repository
    tracked.write_text("a = 2\n", encoding="utf-8")
    assert source_commit(tracked) == {"commit": commit, "modified": True}
