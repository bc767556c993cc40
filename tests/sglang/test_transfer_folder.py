"""The transfer folder lies beside what others have there, and nothing but the run's own files is ever removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aer_megatron.sglang.transfer_folder import TransferFolder

RUN, OTHER, DEAD = (f"aer-{digit * 16}" for digit in "abc")


def opened(parent: Path, run: str = RUN, owner: str = "/runs/one") -> TransferFolder:
    folder = TransferFolder(parent, run_id=run, owner=owner)
    folder.open()
    return folder


def publish(folder: TransferFolder, version: int) -> Path:
    path = folder.make_version(version)
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (path / name).write_text("x")
    folder.keep_only(version)
    return path


def killed(parent: Path, run: str = DEAD, owner: str = "/runs/one") -> Path:
    """Leaves what a killed launch leaves: its folder, which nobody holds the lock of."""
    folder = opened(parent, run, owner)
    path = publish(folder, 3)
    os.close(folder._lock)
    return path.parent


def tree(parent: Path) -> list[str]:
    return sorted(str(path.relative_to(parent)) for path in parent.rglob("*"))


def test_what_others_have_there_stays(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    for name in ("other/weights.bin", "version-7/config.json", f"{OTHER}/version-1/config.json", "aer-notes/a"):
        (shared / name).parent.mkdir(parents=True)
        (shared / name).write_text("precious")
    (shared / "notes.txt").write_text("mine")
    before = tree(shared)
    folder = opened(shared)
    publish(folder, 0)
    path = publish(folder, 1)
    assert sorted(os.listdir(path.parent)) == ["run.json", "version-1"]
    folder.close()
    folder.close()
    assert tree(shared) == before


def test_what_was_put_into_the_run_s_folder_stays_and_is_in_nobody_s_way(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    path = publish(folder, 0)
    (path / "notes.txt").write_text("mine")
    (path.parent / "mine").mkdir()
    publish(folder, 1)
    folder.close()
    assert tree(tmp_path) == [RUN, f"{RUN}/mine", f"{RUN}/version-0", f"{RUN}/version-0/notes.txt"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious" / "config.json"
    precious.parent.mkdir()
    precious.write_text("mine")
    shared = tmp_path / "shared"
    folder = opened(shared)
    path = publish(folder, 0)
    (path.parent / "version-9").symlink_to(precious.parent)
    (path / "model.safetensors").symlink_to(precious)
    (shared / DEAD).symlink_to(killed(tmp_path / "elsewhere"))
    publish(folder, 1)
    opened(shared, OTHER).close()
    folder.close()
    assert precious.read_text() == "mine"
    assert (path / "model.safetensors").is_symlink() and (path.parent / "version-9").is_symlink()
    assert (tmp_path / "elsewhere" / DEAD / "version-3" / "config.json").exists()


def test_what_a_killed_launch_of_this_run_left_is_removed(tmp_path: Path) -> None:
    left = killed(tmp_path / "weights")
    opened(tmp_path / "weights").close()
    assert not left.exists()


def test_what_may_be_somebody_else_s_is_not_removed(tmp_path: Path) -> None:
    alive = opened(tmp_path, OTHER)  # another launch of the same run
    publish(alive, 5)
    foreign = killed(tmp_path, owner="/runs/two")
    damaged = killed(tmp_path, f"aer-{'d' * 16}")
    (damaged / "run.json").write_text("[" * 100_000)
    unmarked = killed(tmp_path, f"aer-{'e' * 16}")
    (unmarked / "run.json").unlink()
    piped = killed(tmp_path, f"aer-{'f' * 16}")
    (piped / "run.json").unlink()
    os.mkfifo(piped / "run.json")
    opened(tmp_path).close()
    for path in (alive.version_path(5), foreign / "version-3", damaged, unmarked, piped):
        assert path.exists()


def test_an_old_version_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = opened(tmp_path)
    publish(folder, 0)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        publish(folder, 1)
    assert "version-0 stays" in caplog.text
    publish(folder, 2)
    folder.close()
    assert tree(tmp_path) == []


def test_folders_above_go_as_far_as_the_run_made_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = opened(tmp_path / "a" / "b" / "c")
    publish(folder, 0)
    folder.close()
    assert tree(tmp_path) == ["a"]


def test_what_is_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for parent in (file, file / "below"):
        with pytest.raises(RuntimeError, match=r"sglang\.transfer_dir='.*file"):
            opened(parent)
    assert file.read_text() == "mine"
