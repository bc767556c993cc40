"""The sink of examples/extend in a run that is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from aer_megatron.config import Config
from aer_megatron.report.reporter import Reporter
from aer_megatron.report.sinks.opening import check_sinks

NAME = "examples.extend.csv_sink:CsvSink"


def config(**options: object) -> Config:
    report = {"sinks": [NAME], "sink_options": {NAME: options}, "picture": False}
    return Config.from_table({"model": {"path": "base"}, "data": {"train": {"task": "countdown"}}, "report": report})


def test_its_table_follows_the_run_and_its_resume(tmp_path: Path) -> None:
    chosen = config(metrics=["reward/mean", "aer/alarm"])
    for steps in (range(3), range(2, 4)):
        with Reporter.open(chosen, folder=tmp_path, num_steps=4, start_step=steps.start) as reporter:
            for step in steps:
                reporter.step({"step": step, "reward/mean": step + steps.start / 8})
    rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert rows == ["step,reward/mean,aer/alarm", "0,0.0,", "1,1.0,", "2,2.25,", "3,3.25,"]


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"sink_options\..*CsvSink: got an unexpected keyword argument 'columns'"):
        check_sinks(config(columns=["a"]).report)
