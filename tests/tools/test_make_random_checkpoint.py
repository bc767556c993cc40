"""tools/make_random_checkpoint.py: folders in the shapes of a config.json."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from aer_megatron.convert import folders
from aer_megatron.convert.hf_folder import HFFolder
from tests.support.tiny_models import save_tiny_model
from tools import make_random_checkpoint


def test_random_checkpoints_have_the_shapes_of_their_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model")
    arguments = [model / "config.json", tmp_path / "out", "--max-shard-gb", 2e-5]
    monkeypatch.setattr(sys, "argv", ["make_random_checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        make_random_checkpoint.main()
    assert stopped.value.code == 0
    folder, _ = folders.checked_hf_folder(tmp_path / "out", 1)
    assert folder.shapes() == HFFolder(model).shapes()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118
