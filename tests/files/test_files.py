"""Lines and files of a run on a full disk, beside planted links, and without the secrets of the configuration."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.config import Config
from aer_megatron.files.whole_files import LineFile, replace_file
from aer_megatron.report.flight import FlightWriter
from aer_megatron.report.masking import is_secret_name, mask_arguments, mask_table, mask_text
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.writer import (
    MetricsWriter,
    changed_options,
    read_metrics,
    read_run_manifest,
    write_run_manifest,
)
from aer_megatron.train import main
from tests.support.small_disk import fill, small_disk

SECRETS = ("s3cr3t-value", "hf_AbCdEfGhIjKlMnOpQrSt", "p4ss")


def config(**run: Any) -> Any:
    return Config.from_table(
        {
            "run": run,
            "model": {"path": "base"},
            "data": {"train": {"task": "countdown"}},
            "sglang": {
                "urls": [f"http://user:{SECRETS[2]}@host:1"],
                "launch": {"api_key": SECRETS[0], "tp_size": 2, "extra": f'{{"admin_api_key": "{SECRETS[0]}"}}'},
                "environment": {"HF_TOKEN": SECRETS[0], "PROXY": f"http://u:{SECRETS[2]}@proxy:1", "A": SECRETS[1]},
            },
            "megatron": {"moe_token_dispatcher_type": "alltoall"},
        }
    )


@pytest.mark.processes
def test_no_line_is_torn_or_lost_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        writer = MetricsWriter(disk)
        record = {"aer/reason": "x" * 900}
        for step in range(3):
            writer.write({"step": step} | record)
        filler = fill(disk)
        for step in range(3, 9):
            writer.write({"step": step} | record)
            steps = [line["step"] for line in read_metrics(writer.path)]
            assert steps == list(range(len(steps))) and 3 <= len(steps) <= 7
            assert writer.path.read_bytes().endswith(b"}\n")
        warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
        assert warnings and "No space left" in warnings[0] and "wait in memory" in warnings[0]
        assert f"{disk} has 0 bytes free" in warnings[0]
        with pytest.raises(RuntimeError, match=r"the last \d line\(s\) are lost: .*No space left"):
            LineFileTwin(writer).close()
        filler.unlink()
        writer.write({"step": 9} | record)
        writer.close()
        assert [line["step"] for line in read_metrics(writer.path)] == list(range(10))


class LineFileTwin(LineFile):
    """The lines that wait in a writer, closed without taking them from it."""

    def __init__(self, writer: MetricsWriter) -> None:
        super().__init__(writer.path)
        self._waiting = list(writer._lines._waiting)


def test_a_limit_in_the_middle_of_a_line_takes_the_line_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LineFile(tmp_path / "lines")
    lines.append("first")
    whole = os.write
    room = [5]

    def short(descriptor: int, content: Any) -> int:  # as the kernel does at RLIMIT_FSIZE: what fits, then EFBIG
        if not room[0]:
            raise OSError(errno.EFBIG, "File too large")
        written = whole(descriptor, bytes(content)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", short)
    lines.append("second")
    assert lines.path.read_text() == "first\n"
    monkeypatch.setattr(os, "write", whole)
    lines.close()
    assert lines.path.read_text() == "first\nsecond\n"


def test_a_disk_that_fails_otherwise_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        LineFile(tmp_path / "metrics.jsonl").append("line")


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_ends_neither_events_nor_picture_nor_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with Reporter.open(config_without_progress(), folder=disk, num_steps=3, start_step=0) as reporter:
            reporter.step({"step": 0, "reward/mean": 0.5})
            filler = fill(disk)
            for step in range(1, 200):
                reporter.step({"step": step, "reward/mean": 0.5, "aer/reason": "y" * 200})
            os.truncate(filler, filler.stat().st_size - (1 << 16))
        assert len(read_metrics(disk / "metrics.jsonl")) == 200
    assert "report.sinks: tensorboard ends at step" in caplog.text
    assert "no picture of the run: [Errno 28] No space left" in caplog.text


def config_without_progress() -> Any:
    table = {"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "report": {"sinks": ["tensorboard"]}}
    return Config.from_table(table)


def test_lines_that_went_with_a_killed_run_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricsWriter(tmp_path).write({"step": 0})
    MetricsWriter(tmp_path).truncate_from(3)
    assert "has no line of 2 step(s) before step 3, the first of them 1" in caplog.text


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "flight.jsonl"])
@pytest.mark.parametrize("plant", ["link", "dangling", "folder", "file"])
def test_a_planted_temporary_name_is_not_followed(tmp_path: Path, name: str, plant: str) -> None:
    victim, planted = tmp_path / "victim", tmp_path / f"{name}.new"
    victim.write_text("precious")
    if plant == "folder":
        planted.mkdir()
    elif plant == "file":
        planted.write_text("left by a killed process")
    else:
        planted.symlink_to(victim if plant == "link" else tmp_path / "nowhere")
    (tmp_path / name).write_text('{"step": 0}\n')
    if name == "run.json":
        write_run_manifest(tmp_path, config(), {}, command=["x"], num_ranks=1)
    else:
        (MetricsWriter if name == "metrics.jsonl" else FlightWriter)(tmp_path).truncate_from(1)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / name).is_symlink()


def test_a_linked_run_json_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("{}")
    (tmp_path / "run.json").symlink_to(tmp_path / "victim")
    write_run_manifest(tmp_path, config(), {}, command=["x"], num_ranks=1)
    assert (tmp_path / "victim").read_text() == "{}"
    assert read_run_manifest(tmp_path)["num_ranks"] == 1


def test_secrets_of_an_earlier_launch_go_too(tmp_path: Path) -> None:
    before = {"name": "old", "command": ["x", f"--sglang.launch.api_key={SECRETS[0]}"],
              "config": {"sglang": {"environment": {"HF_TOKEN": SECRETS[0]}}}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert not any(SECRETS[0] in change for change in changed_options(tmp_path, config()))
    write_run_manifest(tmp_path, config(), {}, command=["x"], num_ranks=1)
    assert SECRETS[0] not in (tmp_path / "run.json").read_text()
    assert len(read_run_manifest(tmp_path)["launches"]) == 2


@pytest.mark.processes
def test_a_file_that_finds_no_room_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        replace_file(disk / "a", "old")
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            replace_file(disk / "a", "new" * 10_000)
        assert sorted(path.name for path in disk.iterdir()) == ["a", "filler"]
        assert (disk / "a").read_text() == "old"


def test_run_json_is_the_owners_and_holds_no_secret(tmp_path: Path) -> None:
    command = ["aer_megatron.train", "run.toml", f"--sglang.environment.WANDB_API_KEY={SECRETS[0]}",
               f'--sglang.launch={{api_key = "{SECRETS[0]}"}}', "--run.seed=1"]  # fmt: skip
    path = write_run_manifest(tmp_path, config(), {}, command=command, num_ranks=1)
    text = path.read_text("utf-8")
    assert [secret for secret in SECRETS if secret in text] == []
    assert path.stat().st_mode & 0o777 == 0o600
    table = json.loads(text)
    assert table["config"]["sglang"]["launch"] == {"api_key": "***", "tp_size": 2, "extra": '{"admin_api_key": "***"}'}
    assert table["config"]["megatron"] == {"moe_token_dispatcher_type": "alltoall"}
    assert table["command"][-1] == "--run.seed=1"
    assert Config.from_table(table["config"]).sglang.urls == ("http://***@host:1",)


def test_the_dry_run_prints_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).resolve().parents[2] / "examples/quickstart"
    secrets = [f"--sglang.environment.HF_TOKEN={SECRETS[0]}", f"--sglang.launch.api_key={SECRETS[0]}"]
    main([str(folder / "countdown.toml"), "--dry-run", f"--model.path={folder / 'model'}", *secrets])
    printed = capsys.readouterr()
    assert "HF_TOKEN" in printed.out and SECRETS[0] not in printed.out + printed.err


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("--admin-api-key", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("PGPASSWORD", True),
        ("OPENAI_API_KEY_2", True),
        ("apiKey", True),
        ("max_new_tokens", False),
        ("api_key_env", False),
        ("stop_token_ids", False),
        ("ssl_keyfile", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("keep_checkpoints", False),
        ("monkey", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret
    assert mask_table({"megatron": {name: "v"}}) == {"megatron": {name: "***" if secret else "v"}}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://u:p@h:1/x", "http://***@h:1/x"),
        ("https://h/y?token=abc&z=1", "https://h/y?token=***&z=1"),
        ('{"api_key": "a b", "x": 3}', '{"api_key": "***", "x": 3}'),
        ("--x 1 --api-key abc --tp 2", "--x 1 --api-key *** --tp 2"),
        ("Authorization: Bearer abc.def", "Authorization: *** ***"),
        ("use hf_AbCdEfGhIjKlMnOpQrSt now", "use *** now"),
        ("Solve {problem}. The token is red; key: value", "Solve {problem}. The token is red; key: value"),
    ],
)
def test_secrets_inside_a_text(text: str, masked: str) -> None:
    assert mask_text(text) == masked


def test_words_after_a_secret_flag() -> None:
    words = mask_arguments(["--api-key", "v", "--tp", "2", "--token=v"])
    assert words == ["--api-key", "***", "--tp", "2", "--token=***"]
