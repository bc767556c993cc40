"""The command line under its real launcher: supervised stage, AER steps, kill and resume, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from aer_megatron.conversion.command import main as convert
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.report.samples import read_samples
from tests.support.runs import environment, metric_lines, train, train_command, write_run_file

pytestmark = pytest.mark.integration

SCORE = "eval/countdown/pass@1"
ARGUMENTS = ("--parallel.tp=2", "--eval.sets.countdown.every=2", f"--run.keep_best={SCORE}", "--run.export_every=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file, a supervised base model and the metrics of a straight TP=2 run."""
    folder = tmp_path_factory.mktemp("straight")
    run_file = write_run_file(folder)
    made = train(run_file, "--stage=sft", ranks=2)
    assert made.returncode == 0, made.stderr
    straight = train(run_file, *ARGUMENTS, ranks=2)
    assert straight.returncode == 0, straight.stderr
    return folder


def test_the_supervised_stage_lowers_the_loss_and_is_cached(base: Path) -> None:
    losses = [line["loss/supervised"] for line in metric_lines(base / "out" / "sft")]
    assert len(losses) == 20
    assert losses[-1] < 0.85 * losses[0]
    again = train(base / "run.toml", "--stage=sft")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout


def test_metrics_hold_what_the_run_promises(base: Path) -> None:
    lines = metric_lines(base / "out")
    assert [line["step"] for line in lines] == list(range(7))
    required = {
        "reward/mean",
        "entropy/token_mean",
        "entropy/initial",
        "entropy/target",
        "aer/alpha",
        "aer/difficulty_mean",
        "rollout/logprob_diff_max",
    }
    for line in lines[:-1]:
        assert required <= line.keys()
        assert line["rollout/logprob_diff_max"] < 1e-3  # fp32: the engine holds the trainer's weights at every step
        assert line["entropy/target"] == pytest.approx(1.1 * lines[0]["entropy/token_mean"])
    evaluated = [line["step"] for line in lines if {"eval/countdown/pass@1", "eval/countdown/pass@4"} <= line.keys()]
    assert evaluated == [0, 2, 4, 6]
    assert all(name == "step" or name.startswith("eval/countdown/") for name in lines[-1])  # of the last policy
    assert any(line["aer/coefficient"] > 0 for line in lines[:-1])
    assert all("time/step_s" in json.loads(text) for text in (base / "out" / "metrics.jsonl").read_text().splitlines())
    manifest = json.loads((base / "out" / "run.json").read_text())
    assert manifest["config"]["algo"]["entropy"]["tau"] == 1.1
    assert manifest["versions"]["megatron-core"]


def test_the_policy_is_exported_with_its_card_and_the_best_checkpoint_is_kept(base: Path, tmp_path: Path) -> None:
    scores = {line["step"]: line[SCORE] for line in metric_lines(base / "out") if SCORE in line}
    exports = base / "out" / "export"
    assert sorted(path.name for path in exports.iterdir()) == ["step_00000004", "step_00000006"]
    # what the checkpoint of the same step converts to, bit for bit, and usable as it is
    assert convert(["megatron-to-hf", str(base / "out"), str(tmp_path / "converted")]) == 0
    last = exports / "step_00000006"
    exported, converted = HFFolder(last), HFFolder(tmp_path / "converted")
    assert sorted(exported.names()) == sorted(converted.names())
    assert all(torch.equal(exported.get(name), converted.get(name)) for name in exported.names())
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= {path.name for path in last.iterdir()}
    card = (last / "README.md").read_text()
    assert "Of the policy after 6 steps." in card  # evaluated after its weights were written
    assert f"| countdown | pass@1 | {scores[6]:.3f} |" in card and "| `algo.entropy.tau` | `1.1` |" in card
    # step 2 is there beside the newest two if it was better than 4; 6 is evaluated after its checkpoint
    kept = {int(path.name[5:]) for path in (base / "out" / "checkpoints").glob("step_????????")}
    assert kept == {4, 6} | ({2} if scores[2] > scores[4] else set())


def test_killed_and_resumed_equals_never_killed(base: Path, tmp_path: Path) -> None:
    run_file = base / "run.toml"
    folder = tmp_path / "killed"
    arguments = (*ARGUMENTS, f"--run.output_dir={folder}")
    process = subprocess.Popen(
        train_command(run_file, *arguments, ranks=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    metrics = folder / "metrics.jsonl"
    saved = folder / "checkpoints" / "step_00000002" / "manifest.json"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if saved.exists() and metrics.read_text().count("\n") >= 4:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the launcher and both ranks: a new session is a group of its own
    process.wait()
    resumed = train(run_file, *arguments, "--run.profile_steps=[4, 5]", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert metric_lines(folder) == metric_lines(base / "out")
    rows, never_killed = (sorted(map(repr, read_samples(run))) for run in (folder, base / "out"))
    assert rows == never_killed and rows
    profiles = {path.name for path in (folder / "profile").iterdir()}
    assert profiles == {f"steps_4-5.rank{rank}.{form}" for rank in (0, 1) for form in ("json.gz", "txt")}


def test_training_is_the_same_without_evaluation(base: Path, tmp_path: Path) -> None:
    done = train(base / "run.toml", f"--run.output_dir={tmp_path}/out", "--eval.sets={}", "--parallel.tp=2", ranks=2)
    assert done.returncode == 0, done.stderr
    trained = [
        {name: line[name] for name in line if not name.startswith("eval/")} for line in metric_lines(base / "out")
    ]
    assert metric_lines(tmp_path / "out") == trained[:-1]


def test_a_run_killed_before_its_last_evaluation_makes_up_for_it(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(base / "out", folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    arguments = (base / "run.toml", f"--run.output_dir={folder}", "--parallel.tp=2")
    assert "would evaluate the policy of" in train(*arguments, "--dry-run").stdout
    done = train(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"evaluates the policy of {folder}" in done.stdout
    assert metric_lines(folder) == metric_lines(base / "out")
    assert "is finished" in train(*arguments, "--dry-run").stdout


def test_layouts_follow_the_same_run(base: Path, tmp_path: Path) -> None:
    expected = metric_lines(base / "out")
    packed = ("--parallel.cp=2", "--parallel.tokens_per_micro_batch=128")
    for name, ranks, changes in (("whole", 1, ()), ("dp2", 2, ()), ("cp2, packed", 2, packed)):
        folder = f"--run.output_dir={tmp_path / name}"
        done = train(base / "run.toml", folder, "--run.num_steps=2", *changes, ranks=ranks)
        assert done.returncode == 0, done.stderr
        first = metric_lines(tmp_path / name)[0]
        for key in ("loss/policy", "entropy/token_mean", "train/grad_norm", "reward/mean"):
            assert first[key] == pytest.approx(expected[0][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("kind", ["none", "fixed", "skywork"])
def test_baselines_are_one_switch(base: Path, tmp_path: Path, kind: str) -> None:
    done = train(
        base / "run.toml", f"--run.output_dir={tmp_path}/{kind}", "--run.num_steps=1", f"--algo.entropy.kind={kind}"
    )
    assert done.returncode == 0, done.stderr
    assert (metric_lines(tmp_path / kind)[0]["aer/coefficient"] > 0) == (kind == "fixed")


def test_dynamic_sampling_keeps_the_batch_size(base: Path, tmp_path: Path) -> None:
    done = train(
        base / "run.toml",
        f"--run.output_dir={tmp_path}/out",
        "--run.num_steps=1",
        "--rollout.dynamic_sampling=true",
        "--rollout.max_refills=1",
    )
    assert done.returncode == 0, done.stderr
    line = metric_lines(tmp_path / "out")[0]
    assert line["rollout/refills"] <= 1
    assert sum(value for key, value in line.items() if key.startswith("rewards/reason/")) >= 32


def test_a_checkpoint_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "out" / "checkpoints", tmp_path / "out" / "checkpoints")
    other = tmp_path / "model"
    shutil.copytree(base / "base", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    done = train(base / "run.toml", f"--model.path={other}", f"--run.output_dir={tmp_path}/out", "--run.num_steps=8")
    assert done.returncode == 2
    assert "num_layers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_named(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "out" / "checkpoints", tmp_path / "out" / "checkpoints")
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    done = train(base / "run.toml", "--parallel.tp=2", f"--run.output_dir={tmp_path}/out", "--run.num_steps=8", ranks=2)
    assert done.returncode != 0
    assert victim.name in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--algo.entropy.kid=none",), ["algo.entropy.kid", "algo.entropy.kind"]),
        (("--parallel.tp=3",), ["parallel.tp=3", "must divide"]),
        (("--data.train.task=reasoning_gym:no_such_task",), ["no_such_task"]),
        (("--rollout.max_new_tokens=500",), ["rollout.max_new_tokens=500", "64 positions"]),
        (("--model.path=/nonexistent",), ["/nonexistent", "config.json"]),
        (("--stage=pretrain",), ["pretrain", "rl or sft"]),
        (("--run.resume=false",), ["run.resume=false", "checkpoints"]),
    ],
)
def test_bad_input_is_one_clear_message(base: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    done = train(base / "run.toml", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"problem": "1+1", "answer": "2"}\n{"problem": "1+', ["line 2", "JSON"]),
        ('{"problem": "1+1"}\n', ["line 1", "answer"]),
        ("", ["no "]),
    ],
)
def test_bad_data_names_file_and_line(base: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(content)
    text = (base / "run.toml").read_text()
    start, stop = text.index("[data.train]"), text.index("[rollout]")
    run_file = tmp_path / "run.toml"
    run_file.write_text(text[:start] + f'[data.train]\npath = "{file}"\n' + text[stop:])
    done = train(run_file, f"--run.output_dir={tmp_path}/out")
    assert done.returncode == 2
    assert file.name in done.stderr
    for word in words:
        assert word in done.stderr


def test_dry_run_prints_configuration_and_plan(base: Path, tmp_path: Path) -> None:
    done = train(base / "run.toml", "--dry-run", "--parallel.tp=2", f"--run.output_dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert '"tau": 1.1' in done.stdout
    assert "8 prompts x 4 = 32 sequences" in done.stdout
    assert "2 = tp 2 x pp 1 x dp 1" in done.stdout


def test_help_lists_every_option() -> None:
    done = train(Path("--help"))
    assert done.returncode == 0
    assert "--algo.entropy.kind" in done.stdout
    assert "[required]" in done.stdout
