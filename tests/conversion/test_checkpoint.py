"""Where the checkpoint that is converted lies, and where its config.json comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aer_megatron.conversion.checkpoint import locate, open_checkpoint


def run_folder(folder: Path, record: object) -> Path:
    """Returns a run's folder with finished checkpoints of steps 2 and 4 and an unfinished one of step 6."""
    for step in (2, 4, 6):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        if step < 6:
            (folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_run_is_its_newest_checkpoint_with_the_model_that_it_recorded(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", {"config": {"model": {"path": "some/base"}}})
    newest, second = run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002"
    assert locate(run, None) == (newest, Path("some/base"))
    assert locate(second, None) == (second, Path("some/base"))
    assert locate(run, "other") == (newest, Path("other"))
    with pytest.raises(
        ValueError, match=r"step_00000004 is a run's checkpoint, and some/base has no config\.json .*--hf"
    ):
        open_checkpoint(*locate(run, None))


@pytest.mark.parametrize("record", [{}, {"config": 1}, {"config": {"model": "x"}}, {"config": {"model": {}}}])
def test_a_record_without_a_model_is_no_help(tmp_path: Path, record: object) -> None:
    run = run_folder(tmp_path / "run", record)
    path, hf = locate(run, None)
    assert (path, hf) == (run / "checkpoints" / "step_00000004", path)


def test_any_other_folder_is_its_own_model(tmp_path: Path) -> None:
    assert locate(tmp_path, None) == (tmp_path, tmp_path)
    assert locate(tmp_path, "hf") == (tmp_path, Path("hf"))
