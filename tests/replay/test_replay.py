"""The replay command: its own settings reproduce a run exactly, others draw and write what the rule says."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.algo.options import AlgoSection
from aer_megatron.config import Config
from aer_megatron.config_section import describe
from aer_megatron.replay import command
from aer_megatron.report.flight import FlightWriter
from aer_megatron.report.writer import write_run_manifest
from tests.support.flights import flight_records

OPTIONS = {"update": "pi", "k_p": 0.3, "eta": 0.02, "tau": 0.9, "alpha_max": 0.2}


def make_run(folder: Path, options: dict[str, Any], *, num_steps: int = 12, first_step: int = 0) -> Path:
    config = Config.from_table(
        {
            "run": {"name": "synthetic"},
            "model": {"path": "unused"},
            "data": {"train": {"task": "countdown"}},
            "algo": {"entropy": options},
        }
    )
    write_run_manifest(folder, config, {}, command=["aer_megatron.train"], num_ranks=1)
    writer = FlightWriter(folder)
    for record in flight_records(config.algo.entropy, num_steps)[first_step:]:
        writer.write(record)
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        {"update": "proportional", "eta": 0.05, "tau": 0.9},
        {"update": "sign", "tau": 0.95, "max_change": 5e-4},
        {"difficulty": "complement", "difficulty_floor": 0.5, "tau": 1.2},
        {"kind": "skywork", "target": 0.4},
        {"kind": "fixed", "coefficient": 0.003},
        {"kind": "none"},
        {"shadow": True, **OPTIONS},
    ],
    ids=str,
)
@pytest.mark.parametrize("first_step", [0, 5])
def test_the_runs_own_settings_reproduce_it_exactly(
    tmp_path: Path,
    options: dict[str, Any],
    first_step: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_draw", lambda *args, **kwargs: None)  # the slow part, drawn below
    run = make_run(tmp_path, options, first_step=first_step)
    assert command.main([str(run)]) == 0
    summary = capsys.readouterr().out.splitlines()
    assert "alpha reproduced exactly" in summary[0] and "open loop" in summary[0]
    assert summary[1] == str(run / "replay.png")
    trace = rows(run / "replay.csv")
    assert [int(row["step"]) for row in trace] == list(range(first_step + bool(first_step), 12))
    for row in trace:
        assert row["recorded_alpha"] == row["replayed_alpha"]
        assert row["recorded_target"] == row["replayed_target"]
    records = flight_records(AlgoSection.model_validate({"entropy": options}).entropy, 12)[-len(trace) :]
    assert [float(row["replayed_alpha"]) for row in trace] == [record.state.alpha for record in records]


def test_another_controller_is_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", OPTIONS)
    options = {"kind": "aer", "update": "sign", "eta": 0.01, "tau": 0.95, "alpha_max": 0.03}
    arguments = [f"--algo.entropy.{name}={value}" for name, value in options.items()]
    picture = tmp_path / "other.png"
    assert command.main([str(run), *arguments, f"--output={picture}"]) == 0
    assert "they differ most at step" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (run / "replay.png").exists()
    trace = rows(tmp_path / "other.csv")
    assert tuple(trace[0]) == command.COLUMNS
    alpha = 0.0
    for row in trace:  # the sign rule, by hand
        target = 0.95 * float(trace[0]["token_entropy"])
        assert float(row["replayed_target"]) == pytest.approx(target, rel=1e-12)
        alpha = min(max(alpha + (0.01 if float(row["token_entropy"]) < target else -0.01), 0.0), 0.03)
        assert float(row["replayed_alpha"]) == pytest.approx(alpha, abs=1e-12)
    assert alpha > 0


def test_the_picture_says_that_the_loop_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    texts: list[str] = []
    save = Figure.savefig

    def watched(figure: Figure, *args: Any, **kwargs: Any) -> None:
        texts.extend(text.get_text() for text in figure.texts)
        assert [len(axes.lines) for axes in figure.axes] == [3, 2]
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    assert command.main([str(make_run(tmp_path, OPTIONS)), "--algo.entropy.tau=0.5"]) == 0
    assert any("OPEN LOOP" in text and "different" in text for text in texts)
    assert any(text.startswith("recorded: aer, tau 0.9, update pi") for text in texts)
    assert any(text.startswith("replayed: aer, tau 0.5, update pi") for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algo.entropy.tua=0.5"], ["unknown option algo.entropy.tua", "algo.entropy.tau"]),
        (["--tau=0.5"], ["--tau is no option of aer replay", "did you mean --algo.entropy.tau?"]),
        (["--run.seed=1"], ["--run.seed=1", "algo.entropy alone"]),
        (["--output"], ["--output needs a value"]),
        (["--algo.entropy.eta=-1"], ["algo.entropy.eta=-1"]),
        (["--algo.entropy.kind=pid"], ["pid", "skywork"]),
        (["second"], ["'second' is not understood", "is already"]),
        (["--output", "trace.csv"], ["--output=trace.csv", ".png"]),
        (["--output", "/nonexistent/folder/a.png"], ["/nonexistent/folder/a.png", "cannot be written"]),
    ],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(make_run(tmp_path, OPTIONS, num_steps=2)), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("aer_megatron: ") and "Traceback" not in message
    for word in words:
        assert word in message


def test_a_run_without_recording_or_manifest_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert "report.flight_recorder=true" in capsys.readouterr().err
    run = make_run(tmp_path / "run", OPTIONS)
    (run / "run.json").unlink()
    assert command.main([str(run)]) == 2
    assert "run.json" in capsys.readouterr().err


def test_options_that_changed_during_the_run_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, OPTIONS)
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["algo"]["entropy"]["tau"] = 0.99
    (run / "run.json").write_text(json.dumps(manifest))
    assert command.main([str(run)]) == 0
    assert "it was resumed with other options" in capsys.readouterr().out


def test_only_the_steps_after_a_gap_are_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, OPTIONS)
    file = run / "flight.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[6:]))
    assert command.main([str(run)]) == 0
    assert capsys.readouterr().out.startswith("steps 7-11: alpha reproduced exactly")
    assert (run / "replay.png").is_file()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in [key for key, *_ in describe(Config) if key.startswith("algo.entropy.")]:
        assert f"--{key} [" in text
    assert "OPEN LOOP" in text


def test_a_run_whose_first_records_are_unusable_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path, {**OPTIONS, "kind": "aer"}, num_steps=1)
    record = flight_records(Aer(**OPTIONS), 1)[0]
    broken = dataclasses.replace(
        record,
        observation=dataclasses.replace(record.observation, entropy_sum=float("nan")),
        state=dataclasses.replace(record.state, alpha=0.0, integral=0.0, initial_entropy=None),
    )
    (run / "flight.jsonl").unlink()
    FlightWriter(run).write(broken)
    assert command.main([str(run)]) == 0
    row = rows(run / "replay.csv")[0]
    assert (row["token_entropy"], row["replayed_target"], row["held"]) == ("", "", "1")


def test_a_record_that_names_code_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", OPTIONS)
    imported = tmp_path / "imported"
    (tmp_path / "planted_rule.py").write_text(f"open({str(imported)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    manifest["config"]["algo"]["policy_loss"] = {"kind": "planted_rule:Loss"}
    (run / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    expected = r"algo\.policy_loss\.kind='planted_rule:Loss'; if it is yours, give --trust-code"
    with pytest.raises(ValueError, match=expected):
        command.replay_run(str(run), (), None)
    assert not imported.exists()
    with pytest.raises(ValueError, match="planted_rule:Loss"):  # imported, and no policy loss
        command.replay_run(str(run), (), None, trusted=True)
    assert imported.exists()
