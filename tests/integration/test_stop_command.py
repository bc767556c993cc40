"""SIGTERM, SIGINT, SIGUSR1 and the time limit: the step is finished and saved, and the same command goes on as if
nothing had happened; a second Ctrl-C ends the run at once."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time
from pathlib import Path

import pytest

from tests.support.runs import MODEL, environment, metric_lines, train, train_command, write_run_file
from tests.support.signalled_runs import PATIENCE_S, num_lines, started

pytestmark = pytest.mark.integration

STEPS = 18
OPTIONS = (
    f"--run.num_steps={STEPS}",
    "--run.checkpoint_every=0",
    "--rollout.prompts_per_step=16",
    '--report.sinks=["console"]',
)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, random_policy: Path) -> Path:
    return write_run_file(tmp_path_factory.mktemp("stopped"), base=random_policy)


def test_stopped_three_times_equals_never_stopped(run_file: Path, tmp_path: Path) -> None:
    straight = train(run_file, *OPTIONS, f"--run.output_dir={tmp_path}/straight")
    assert straight.returncode == 0, straight.stderr
    out = tmp_path / "out"
    arguments = (run_file, *OPTIONS, f"--run.output_dir={out}")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)):
        before = num_lines(out / "metrics.jsonl")
        with started(tmp_path / number.name, *arguments) as (rank,):
            rank.until(lambda: num_lines(out / "metrics.jsonl") >= before + 2)  # noqa: B023
            rank.send(number)
            assert rank.wait() == code, rank.said
        done = num_lines(out / "metrics.jsonl")
        assert before + 2 <= done < STEPS
        for line in (
            f"{number.name}: finishing ",
            f"{number.name}: saved {out}/checkpoints/step_{done:08d}; the same command goes on at step {done}\n",
        ):
            assert line in rank.said
        assert "Traceback" not in rank.said
        assert (out / "checkpoints" / f"step_{done:08d}" / "manifest.json").is_file()
    last = train(*arguments)
    assert last.returncode == 0, last.stderr
    assert metric_lines(out) == metric_lines(tmp_path / "straight")
    assert (out / "flight.jsonl").read_text() == (tmp_path / "straight" / "flight.jsonl").read_text()


def test_a_signal_to_one_rank_stops_both_at_the_same_step(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (run_file, *OPTIONS, "--run.num_steps=400", f"--run.output_dir={out}", "--parallel.tp=2")
    with started(tmp_path, *arguments, ranks=2) as (first, second):
        first.until(lambda: num_lines(out / "metrics.jsonl") >= 2)
        second.send(signal.SIGTERM)
        assert (first.wait(), second.wait()) == (143, 143), first.said + second.said
    done = num_lines(out / "metrics.jsonl")
    assert f"SIGTERM: saved {out}/checkpoints/step_{done:08d}" in first.said
    assert second.said.count("SIGTERM") == 0  # rank 0 speaks


def test_a_second_ctrl_c_ends_the_run_inside_a_step(run_file: Path, tmp_path: Path) -> None:
    """The first step takes a minute here: its answers are judged one after the other, a second each."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"problem": "{i},2,3,4=9>", "answer": "{i}"}}\n' for i in range(1, 10)))
    table = f'[data.train]\npath = "{data}"\n'
    text = run_file.read_text()
    text = text[: text.index("[data.train]")] + table + text[text.index("[rollout]") :]
    slow = tmp_path / "slow.toml"
    slow.write_text(text.replace("every = 3", "every = 0"))
    out = tmp_path / "out"
    with started(
        tmp_path, slow, *OPTIONS, f"--run.output_dir={out}", "--data.verifier=tests.support.bad_verifiers:slow"
    ) as (rank,):
        rank.until((out / "run.json").is_file)
        time.sleep(3.0)
        rank.send(signal.SIGINT)
        rank.until(lambda: "press Ctrl-C again to end at once" in rank.said)
        time.sleep(1.5)
        assert rank.process.poll() is None
        again = time.monotonic()
        rank.send(signal.SIGINT)
        assert rank.wait() == 130
        assert time.monotonic() - again < 10
    assert "SIGINT: finishing step 0, then saving" in rank.said
    assert "Traceback" not in rank.said


def test_a_signal_while_loading_ends_every_rank_with_one_line(run_file: Path, tmp_path: Path) -> None:
    with started(tmp_path / "one", run_file, *OPTIONS, f"--run.output_dir={tmp_path}/out") as (rank,):
        rank.until(lambda: "loading" in rank.said)
        rank.send(signal.SIGINT)
        assert rank.wait() == 130, rank.said
    line = "SIGINT while loading: there is nothing to save, the run ends; the same command begins again\n"
    assert rank.said.splitlines(keepends=True)[1:] == [line]
    with started(tmp_path / "two", run_file, *OPTIONS, "--parallel.tp=2", ranks=2) as (first, second):
        first.until(lambda: "loading" in first.said)
        second.until(lambda: second.catches(signal.SIGTERM))
        first.send(signal.SIGTERM)  # it will not come to the meeting of the ranks
        second.send(signal.SIGTERM)
        assert (first.wait(), second.wait()) == (143, 143), first.said + second.said
    assert "Traceback" not in first.said + second.said


def test_a_lost_terminal_ends_nothing(run_file: Path, tmp_path: Path) -> None:
    """The controlling terminal goes away, as with a lost ssh connection: SIGHUP, and every write fails with EIO."""
    out = tmp_path / "out"
    command = train_command(run_file, *OPTIONS, "--run.num_steps=4", f"--run.output_dir={out}")
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(command[0], command, environment() | {"TERM": "xterm"})
    try:
        deadline = time.monotonic() + PATIENCE_S
        while num_lines(out / "metrics.jsonl") < 1 and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.read(terminal, 65536)
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 0
    assert num_lines(out / "metrics.jsonl") == 5  # four steps, and the evaluation of the last policy


def test_the_time_limit_saves_and_ends_with_success(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = train(run_file, *OPTIONS, "--run.num_steps=100000", "--run.max_hours=0.003", f"--run.output_dir={out}")
    assert done.returncode == 0, done.stderr
    steps = num_lines(out / "metrics.jsonl")
    assert 1 <= steps < 1000
    assert f"run.max_hours: saved {out}/checkpoints/step_{steps:08d}; the same command goes on at step {steps}\n" in (
        done.stdout
    )


def test_the_supervised_stage_goes_on_where_it_was_stopped(run_file: Path, tmp_path: Path) -> None:
    """Its loss per step and the policy that it writes are those of a stage that was never stopped."""
    options = ("--stage=sft", f"--sft.init={MODEL}", "--sft.num_steps=150", "--sft.batch_size=64")
    straight = (*options, f"--model.path={tmp_path}/policy", f"--run.output_dir={tmp_path}/straight")
    assert train(run_file, *straight).returncode == 0
    out = tmp_path / "out"
    stopped = (*options, f"--model.path={tmp_path}/other", f"--run.output_dir={out}")
    with started(tmp_path, run_file, *stopped) as (rank,):
        rank.until(lambda: num_lines(out / "sft" / "metrics.jsonl") >= 5)
        rank.send(signal.SIGTERM)
        assert rank.wait() == 143, rank.said
    done = num_lines(out / "sft" / "metrics.jsonl")
    assert f"the same command goes on at step {done}\n" in rank.said
    assert not (tmp_path / "other").exists()
    again = train(run_file, *stopped)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {done} of" in again.stdout
    assert metric_lines(out / "sft") == metric_lines(tmp_path / "straight" / "sft")
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() == (tmp_path / "policy" / weights).read_bytes()
    assert not list((out / "sft").glob("stopped-*"))
