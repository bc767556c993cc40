"""report.png: drawn for whole, short and incomplete runs, and for several at once."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aer_megatron.config import Config
from aer_megatron.report.command import main
from aer_megatron.report.picture import draw_comparison, draw_report, load_runs, smooth
from aer_megatron.report.writer import MetricsWriter, write_run_manifest


def make_run(folder: Path, num_steps: int, *, eval_every: int = 0, name: str = "demo", **entropy: Any) -> Path:
    table = {
        "run": {"name": name},
        "model": {"path": "base"},
        "data": {"train": {"task": "countdown"}},
        "algo": {"entropy": entropy},
    }
    write_run_manifest(folder, Config.from_table(table), {}, command=["x"], num_ranks=1)
    writer = MetricsWriter(folder)
    for step in range(num_steps):
        metrics: dict[str, Any] = {
            "step": step,
            "reward/mean": 0.2 + 0.01 * step,
            "entropy/token_mean": 0.5 - 0.01 * step,
            "entropy/initial": 0.5,
            "entropy/target": 0.35,
            "aer/alpha": 0.001 * step,
            "aer/coefficient": 0.001 * step,
            "aer/difficulty_mean": 0.6,
            "aer/alarm": "collapse" if step == 1 else None,
        }
        if eval_every and step % eval_every == 0:
            metrics |= {"eval/a/pass@1": 0.2, "eval/a/pass@8": 0.7, "eval/a/pass@8_low": 0.6, "eval/a/pass@8_high": 0.8}
        writer.write(metrics)
    return folder


def size(path: Path) -> tuple[int, int]:
    """Returns (width, height) of a PNG, from its header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize(("num_steps", "eval_every"), [(1, 0), (2, 1), (25, 5)])
def test_a_run_of_any_length_is_drawn(tmp_path: Path, num_steps: int, eval_every: int) -> None:
    path = draw_report(make_run(tmp_path / "run", num_steps, eval_every=eval_every))
    assert path == tmp_path / "run" / "report.png"
    assert size(path) == (1650, 1080)


def test_a_run_that_measured_nothing_but_steps_is_drawn(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write({"step": 0, "reward/mean": None})
    assert size(draw_report(tmp_path)) == (1650, 1080)


def test_a_run_without_steps_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds no step yet"):
        draw_report(tmp_path)


def test_runs_are_read_with_label_facts_and_curves(tmp_path: Path) -> None:
    aer = make_run(tmp_path / "a", 6, eval_every=5, update="pi", tau=0.7, eta=0.003, k_p=0.3)
    none = make_run(tmp_path / "b", 3, kind="none")
    first, second = load_runs([aer, none])
    assert (first.label, second.label) == ("demo", "demo (b)")
    assert first.facts == r"AER, pi update, $\tau$ = 0.7, $\eta$ = 0.003, $k_p$ = 0.3"
    assert second.facts == "no entropy bonus"
    assert first.passes == [("a", 1), ("a", 8)]
    steps, values = first.series("eval/a/pass@8")
    assert (steps.tolist(), values.tolist()) == ([0.0, 5.0], [0.7, 0.7])
    assert second.series("eval/a/pass@8")[0].size == 0


def test_several_runs_share_one_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 12, eval_every=4, name=name) for name in ("a", "b", "c")]
    output = tmp_path / "all.png"
    assert draw_comparison(runs, output) == output
    assert size(output) == (1650, 1080)


def test_drawing_needs_no_global_state_and_repeats(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 8)
    first = draw_report(run).read_bytes()
    assert draw_report(run).read_bytes() == first


def test_smoothing_is_the_mean_of_what_the_window_covers() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3.0, 11 / 3, 4.5], rtol=1e-12)
    np.testing.assert_array_equal(smooth(values, 1), values)


def test_the_command_draws_one_run_and_names_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 3)
    assert main([str(run), "--png"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.png'}\n"


def test_the_command_draws_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(make_run(tmp_path / name, 3)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main([*runs, "--png"]) == 0
    assert main([*runs, "--png", "--output", "other.png"]) == 0
    assert size(tmp_path / "comparison.png") == size(tmp_path / "other.png") == (1650, 1080)


def test_the_command_says_in_one_line_that_a_folder_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "does not exist; give the folder of a run" in message
