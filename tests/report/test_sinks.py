"""Sinks: which there are, what is refused at the start, and what one that fails or hangs costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.config import Config
from aer_megatron.options.report import SINK_NAMES
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.sinks import guard
from aer_megatron.report.sinks.opening import SINKS, check_sinks
from aer_megatron.report.writer import read_metrics
from tests.support.sinks import CALLS, Hanging

OWN = "tests.support.sinks:"


def config(*sinks: str, picture: bool = False, **options: Any) -> Config:
    report = {"sinks": sinks, "picture": picture, "sink_options": {sink: options for sink in sinks if options}}
    table = {"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "report": report}
    return Config.from_table(table | {"sglang": {"environment": {"HF_TOKEN": "the-secret"}}})


@pytest.fixture(autouse=True)
def calls() -> Iterator[None]:
    CALLS.clear()
    Hanging.go_on.clear()
    yield
    Hanging.go_on.set()


def run(folder: Path, wanted: Config, steps: range) -> None:
    with Reporter.open(wanted, folder=folder, num_steps=9, start_step=steps.start) as reporter:
        for step in steps:
            reporter.step({"step": step, "reward/mean": 0.5 * step})


def handed() -> list[Any]:
    return [call[1] for call in CALLS if call[0] == "step"]


def test_a_name_of_the_run_file_is_a_sink() -> None:
    assert set(SINK_NAMES) == set(SINKS)
    check_sinks(config(*SINK_NAMES).report)


def test_a_sink_of_ones_own_gets_every_step_the_picture_and_the_end(tmp_path: Path) -> None:
    run(tmp_path, config(OWN + "Listing", picture=True), range(2))
    assert CALLS == [("made", 0), ("step", 0), ("step", 1), ("picture", "report.png"), ("close", False)]
    with pytest.raises(KeyError), Reporter.open(config(OWN + "Listing"), folder=tmp_path, num_steps=9, start_step=2):
        raise KeyError
    assert CALLS[-1] == ("close", True)
    assert not (tmp_path / "run_id").exists()  # nobody asked


def test_a_remote_sink_gets_a_step_once_and_keeps_its_id(tmp_path: Path) -> None:
    for steps in (range(4), range(2, 6)):
        run(tmp_path, config(OWN + "Sent"), steps)
    assert handed() == [0, 1, 2, 3, 4, 5]
    ids = [call[1] for call in CALLS if call[0] == "id"]
    assert ids[0] == ids[1] and len(ids[0]) == 32
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    # a local one gets what is made again, and a run that begins anew is another run
    CALLS.clear()
    run(tmp_path, config(OWN + "Listing"), range(3, 6))
    assert handed() == [3, 4, 5]
    run(tmp_path, config(OWN + "Sent"), range(2))
    assert handed() == [3, 4, 5, 0, 1]
    assert [call[1] for call in CALLS if call[0] == "id"] != ids[:1]


def test_an_id_that_a_file_spoils_is_made_anew(tmp_path: Path) -> None:
    run(tmp_path, config(OWN + "Sent"), range(1))
    for spoiled in (b"../../etc", b"\xff" * 32, b"a" * 10**6):
        (tmp_path / "run_id").write_bytes(spoiled)
        run(tmp_path, config(OWN + "Sent"), range(1, 2))
        assert len((tmp_path / "run_id").read_text()) == 32


def test_secrets_do_not_reach_a_sink(tmp_path: Path) -> None:
    run(tmp_path, config(OWN + "Sent"), range(1))
    assert "the-secret" not in str(CALLS)
    assert "'HF_TOKEN': '***'" in str(CALLS)


@pytest.mark.parametrize(
    ("sinks", "options", "error", "words"),
    [
        (["wandbb"], {}, ValueError, "there is no sink 'wandbb'; sinks are 'console', 'tensorboard'"),
        (["console", "console"], {}, ValueError, "names one twice"),
        ([OWN + "Absent"], {}, RuntimeError, r"needs the package no_such.*pip install 'aer-megatron\[absent\]'"),
        (["no.such:Sink"], {}, ValueError, "'no.such:Sink' cannot be imported: ModuleNotFoundError"),
        (["pathlib:Path"], {}, ValueError, "must be a class derived from aer_megatron.report.sinks.base.Sink"),
        ([OWN + "Unfinished"], {}, ValueError, "must define step"),
        ([OWN + "Listing"], {"speed": 1}, ValueError, "unexpected keyword argument 'speed'; its options are fails_at"),
        (["console"], {"width": 1}, ValueError, "sink_options.console: got an unexpected.*its options are none"),
    ],
)
def test_what_cannot_be_a_sink_is_refused_before_anything_starts(
    sinks: list[str], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_sinks(config(*sinks, **options).report)


@pytest.mark.parametrize(("option", "sink"), [("tensorboard", "tensorboard"), ("progress", "console")])
def test_former_switches_name_the_list(option: str, sink: str) -> None:
    with pytest.raises(ValueError, match=f'report.{option}=false is no longer there: write "{sink}" into the list'):
        Config.from_table({"report": {option: False}})


def test_a_configuration_that_names_a_sink_imports_nothing() -> None:
    """So commands that read run.json do not run what it names."""
    assert config("no.such:Sink").report.sinks == ("no.such:Sink",)


def test_a_sink_that_cannot_start_ends_the_run_and_the_sinks_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Refusing' cannot start: ConnectionError: \*\*\* is no key; repair it"):
        run(tmp_path, config(OWN + "Listing", OWN + "Refusing"), range(1))
    assert CALLS == [("made", 0), ("close", True)]


@pytest.mark.parametrize("kind", ["Listing", "Sent"])
def test_a_sink_that_fails_costs_its_own_lines_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    run(tmp_path, config(OWN + kind, fails_at=1), range(4))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert handed() == [0, 1]
    assert CALLS[-1] == ("close", True)
    said = [record.message for record in caplog.records]
    place = f"report.sinks: {OWN}{kind} ends at step 1: ConnectionError: server gone, key ***; metrics.jsonl goes on"
    assert said == [place]


def test_a_sink_that_hangs_costs_no_step_and_little_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_CLOSE_S", 0.2)
    begin = time.monotonic()
    run(tmp_path, config(OWN + "Hanging"), range(4))
    assert time.monotonic() - begin < 30  # it hangs for a minute
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert "Hanging ends at step 0: it has not ended within 0.2 s" in caplog.text


def test_a_sink_that_does_not_keep_up_does_not_take_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_WAITING_CALLS", 3)
    run(tmp_path, config(OWN + "Hanging"), range(9))
    assert caplog.text.count("it does not keep up, 3 calls wait") == 1
