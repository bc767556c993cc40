"""The folder of checkpoints: links, leftovers, what cannot be deleted, and a disk that is full."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from aer_megatron.checkpoint.folder import CheckpointFolder, new_file
from tests.support.small_disk import fill, small_disk


def write(folder: CheckpointFolder, step: int) -> Path:
    fresh = folder.prepare(step, 10)
    (fresh / "model").write_bytes(b"weights")
    return folder.publish(fresh, step, "{}")


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        assert write(folder, step).name == f"step_{step:08d}"
    assert names(folder.path) == ["step_00000002", "step_00000003"]


def test_the_best_is_kept_beside_the_newest_until_another_is_better(tmp_path: Path) -> None:
    best = [1]
    folder = CheckpointFolder(tmp_path / "checkpoints", 1, lambda steps: best[0] if best[0] in steps else None)
    for step in (1, 2, 3):
        write(folder, step)
    assert names(folder.path) == ["step_00000001", "step_00000003"]
    best[0] = 3
    write(folder, 4)
    assert names(folder.path) == ["step_00000003", "step_00000004"]


def test_a_best_that_cannot_be_found_removes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def damaged(steps: Any) -> int:
        raise ValueError("metrics.jsonl, line 3 is not the record of a step")

    folder = CheckpointFolder(tmp_path / "checkpoints", 1, damaged)
    for step in (1, 2, 3):
        write(folder, step)
    assert names(folder.path) == ["step_00000001", "step_00000002", "step_00000003"]
    assert "line 3 is not the record" in caplog.text


def undeletable(monkeypatch: pytest.MonkeyPatch, word: str) -> list[str]:
    """Deleting what has ``word`` in its name fails as on NFS, until the list that is returned is cleared."""
    stuck = [word]
    whole = shutil.rmtree

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        if any(part in str(path) for part in stuck):
            raise OSError(39, "Directory not empty", str(path))
        whole(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return stuck


def test_what_cannot_be_deleted_is_said_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    stuck = undeletable(monkeypatch, "step_00000001")
    for step in (1, 2, 3, 4):
        write(folder, step)
    assert names(tmp_path) == ["step_00000001.tmp-old", "step_00000004"]
    assert len(caplog.records) == 1
    assert "step_00000001.tmp-old cannot be removed now" in caplog.text and "Directory not empty" in caplog.text
    stuck.clear()
    write(folder, 5)
    assert names(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize("kind", ["tmp-new", "tmp-old"])
def test_a_leftover_blocks_no_later_use_of_its_name(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    (tmp_path / f"step_00000001.{kind}" / "sub").mkdir(parents=True)
    stuck = undeletable(monkeypatch, f"step_00000001.{kind}")
    write(folder, 1)
    write(folder, 2)
    assert "step_00000002" in names(tmp_path) and "step_00000001" not in names(tmp_path)
    stuck.clear()
    write(folder, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_an_old_checkpoint_that_cannot_even_be_renamed_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 1)
    whole = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if str(target).endswith(".tmp-old"):
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert write(folder, 2).name == "step_00000002"
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert "step_00000001 cannot be removed now" in caplog.text


def test_a_link_is_pruned_and_what_it_points_at_is_left(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    moved = tmp_path / "other disk"
    write(folder, 1).rename(moved)
    (folder.path / "step_00000001").symlink_to(moved)
    assert folder.finished() == {1: folder.path / "step_00000001"}
    write(folder, 2)
    assert names(folder.path) == ["step_00000002"]
    assert names(moved) == ["manifest.json", "model"]


@pytest.mark.parametrize("target", ["there", "gone"])
def test_a_save_over_a_link_replaces_the_link(tmp_path: Path, target: str) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.path.mkdir()
    moved = tmp_path / target
    if target == "there":
        moved.mkdir()
        (moved / "precious").touch()
    (folder.path / "step_00000001").symlink_to(moved)
    final = write(folder, 1)
    assert not final.is_symlink() and names(final) == ["manifest.json", "model"]
    assert target == "gone" or names(moved) == ["precious"]


@pytest.mark.parametrize("name", ["step_00000001.tmp-new", "step_00000001.tmp-old"])
def test_planted_links_under_temporary_names_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.path.mkdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (folder.path / name).symlink_to(victim)
    write(folder, 1)
    write(folder, 2)
    assert names(victim) == ["precious"]
    assert names(folder.path) == ["step_00000002"]


def test_a_new_file_is_never_one_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "link")
    assert not (tmp_path / "victim").exists()


def test_what_has_no_manifest_is_not_finished(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 25)
    (tmp_path / "step_00000050").mkdir()
    (tmp_path / "step_50").mkdir()
    (tmp_path / "step_000000075").mkdir()  # not how a save spells 75
    assert set(folder.finished()) == {25} and set(folder.unfinished()) == {50}
    write(folder, 50)
    assert set(folder.finished()) == {50} and folder.unfinished() == {}


def test_a_failed_rename_puts_back_what_it_had_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 1)
    fresh = folder.prepare(1, 10)
    whole = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if self == fresh:
            raise OSError(5, "Input/output error")
        return whole(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        folder.publish(fresh, 1, "{}")
    folder.discard(fresh)
    assert names(tmp_path) == ["step_00000001"] and names(tmp_path / "step_00000001") == ["manifest.json", "model"]


def test_a_later_step_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 9)
    with pytest.raises(ValueError, match="holds step 9 of another run"):
        folder.prepare(8, 10)


@pytest.mark.processes
def test_no_save_begins_without_room_for_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        folder = CheckpointFolder(disk / "checkpoints", keep=1)
        write(folder, 1)
        with pytest.raises(OSError, match=r"step_00000002.tmp-new needs 0.10 GB, .* has 0.03 GB free"):
            folder.prepare(2, 100_000_000)
        assert names(folder.path) == ["step_00000001"]


@pytest.mark.processes
def test_a_disk_that_fills_up_at_the_manifest_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        folder = CheckpointFolder(disk / "checkpoints", keep=1)
        write(folder, 1)
        fresh = folder.prepare(2, 10)
        filler = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            folder.publish(fresh, 2, "x" * 10_000)
        folder.discard(fresh)
        assert names(folder.path) == ["step_00000001"]
        os.unlink(filler)
        write(folder, 2)
        assert names(folder.path) == ["step_00000002"]


def test_deleting_goes_on_past_a_file_that_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    old = tmp_path / "step_00000001.tmp-old"
    old.mkdir()
    for name in ("a", "b", "c"):
        (old / name).touch()
    whole = os.unlink

    def unlink(path: Any, *args: Any, **options: Any) -> None:
        if str(path).endswith("a"):
            raise OSError(16, "Device or resource busy", str(path))
        whole(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        CheckpointFolder(tmp_path, keep=1).remove_leftovers()
    assert names(old) == ["a"]
    assert "Device or resource busy" in caplog.text
