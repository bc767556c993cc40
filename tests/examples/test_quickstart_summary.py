"""What ``make quickstart`` prints at its end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.report.writer import MetricsWriter
from tests.support.runs import ROOT

FILE = ROOT / "examples" / "quickstart" / "summary.py"
RUN = ROOT / "examples" / "quickstart" / "countdown.toml"


@pytest.fixture(scope="module")
def program() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_summary", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path) -> None:
    writer = MetricsWriter(folder)
    base = {f"eval/countdown/pass@{k}{end}": 0.2 + 0.01 * k for k in (1, 8) for end in ("", "_low", "_high")}
    final = dict.fromkeys(base, 0.4) | {"eval/countdown_cold/pass@1": 0.9}
    entropies = [0.5] * 5 + [0.2, 0.3] * 5
    for step, entropy in enumerate(entropies):
        numbers = {"entropy/token_mean": entropy, "entropy/target": 0.25, "entropy/initial": 0.5}
        writer.write({"step": step, **numbers, **(base if step == 0 else {})})
    writer.write({"step": len(entropies), **final})
    writer.close()


def test_three_lines_say_what_training_did(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "report.png").write_text("")
    assert program.main([str(RUN), f"--run.output_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"quickstart: report  {tmp_path}/report.png",
        "quickstart: base   countdown: pass@1 0.210 (0.210-0.210)  pass@8 0.280 (0.280-0.280)",
        "quickstart: final  countdown: pass@1 0.400 (0.400-0.400)  pass@8 0.400 (0.400-0.400)",
        "quickstart: H / H*  0.250 / 0.250 nats, mean of the last 10 steps (H_0 0.500)",
    ]


def test_a_run_without_evaluation_has_no_passes(program: Any, tmp_path: Path) -> None:
    assert program.summary([{"step": 0, "entropy/token_mean": None}]) == [
        "no evaluation of the base",
        "no evaluation of the final policy",
        "H / H*  0.000 / - nats, mean of the last 0 steps (H_0 -)",
    ]
