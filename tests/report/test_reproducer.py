"""Kept updates: what is written is read back, and what is damaged is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aer_megatron.report.reproducer import (
    BATCH_FILE,
    DESCRIPTION_FILE,
    KeptUpdate,
    prune_reproducers,
    read_reproducer,
    write_reproducer,
)
from aer_megatron.types import Experience
from tests.support.experiences import with_context
from tests.support.policies import fixed_batch, policy_config


def _kept(folder: Path, **changes: Any) -> KeptUpdate:
    folder.mkdir(parents=True)
    config = policy_config(sglang={"environment": {"HF_TOKEN": "secret"}}, parallel={"tp": 2})
    batch = with_context(fixed_batch()) if changes.get("masked") else fixed_batch()
    batch.advantage_B[3] = np.nan
    update = KeptUpdate(12, 19, changes.get("minibatch"), 40, True, batch)
    write_reproducer(folder, update, config, {"diagnosis": None, "ranks": 2, "weights": "weights"})
    return update


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_written_is_read_back_bit_for_bit(masked: bool, tmp_path: Path) -> None:
    update = _kept(tmp_path / "kept", minibatch=1, masked=masked)
    found = read_reproducer(tmp_path / "kept", ["--parallel.pp=2"])
    assert (found.update.step, found.update.seed, found.update.minibatch, found.update.num_updates) == (12, 19, 1, 40)
    assert (found.config.parallel.tp, found.config.parallel.pp) == (2, 2)
    assert found.update.folder_name == "step_000012-1"
    for name in ("advantage_B", "entropy_weight_B", "old_logprob_T"):
        assert getattr(found.update.batch, name).tobytes() == getattr(update.batch, name).tobytes()
    assert found.update.batch.experience.prompt_id_B.dtype == np.uint64
    for field in dataclasses.fields(Experience):
        mine, theirs = (getattr(each.batch.experience, field.name) for each in (found.update, update))
        np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
    assert ("experience.sampled_L" in load_file(tmp_path / "kept" / BATCH_FILE)) == masked


def test_no_secret_of_the_run_goes_into_the_folder(tmp_path: Path) -> None:
    _kept(tmp_path / "kept")
    assert all(b"secret" not in file.read_bytes() for file in (tmp_path / "kept").iterdir())


def _change(folder: Path, key: str, value: Any) -> None:
    table = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    (folder / DESCRIPTION_FILE).write_text(json.dumps(table | {key: value}), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", -1, "seed=-1"),
        ("step", True, "step=True"),
        ("num_updates", "7", "num_updates='7'"),
        ("config", {}, "model"),
        ("config", [], "does not describe"),
        ("format", 9, "format 9"),
        ("entropy_gradient", 1, "entropy_gradient=1"),
    ],
)
def test_a_wrong_description_is_named(key: str, value: Any, said: str, tmp_path: Path) -> None:
    _kept(tmp_path / "kept")
    _change(tmp_path / "kept", key, value)
    with pytest.raises(ValueError, match=f"{DESCRIPTION_FILE}.*{said}"):
        read_reproducer(tmp_path / "kept")


def test_a_description_that_is_no_json_is_named(tmp_path: Path) -> None:
    _kept(tmp_path / "kept")
    for text in ("", "[" * 100_000, "3", "{"):
        (tmp_path / "kept" / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=DESCRIPTION_FILE):
            read_reproducer(tmp_path / "kept")


def _with_arrays(folder: Path, **arrays: Any) -> None:
    save_file(load_file(folder / BATCH_FILE) | arrays, folder / BATCH_FILE)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"advantage_B": np.zeros(3)}, "advantage_B has 3 entries"),
        ({"advantage_B": np.zeros(12, dtype=np.float32)}, "advantage_B is float32"),
        ({"extra": np.zeros(1)}, "unexpected"),
        ({"experience.prompt_length_B": np.full(12, -4, dtype=np.int64)}, "no token"),
        ({"experience.response_length_B": np.full(12, 2**62, dtype=np.int64)}, "more than there are"),
    ],
)
def test_arrays_that_do_not_fit_are_named(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    _kept(tmp_path / "kept")
    _with_arrays(tmp_path / "kept", **arrays)
    with pytest.raises(ValueError, match=said):
        read_reproducer(tmp_path / "kept")


@pytest.mark.parametrize("fault", ["a prompt's token", "no token of a response", "a token less", "of bytes"])
def test_a_mask_that_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    experience = _kept(tmp_path / "kept", masked=True).batch.experience
    assert experience.sampled_L is not None
    sampled_L = experience.sampled_L.copy()
    end = int(experience.prompt_length_B[0] + experience.response_length_B[0])
    said = "names a token of a prompt, or no token"
    match fault:
        case "a prompt's token":
            sampled_L[0] = True
        case "no token of a response":
            sampled_L[:end] = False
        case "a token less":
            sampled_L[np.argmax(sampled_L)] = False
            said = "no token|expected"
        case "of bytes":
            sampled_L, said = sampled_L.astype(np.uint8), "sampled_L is uint8"
    _with_arrays(tmp_path / "kept", **{"experience.sampled_L": sampled_L})
    with pytest.raises(ValueError, match=said):
        read_reproducer(tmp_path / "kept")


def test_a_truncated_batch_is_named(tmp_path: Path) -> None:
    _kept(tmp_path / "kept")
    file = tmp_path / "kept" / BATCH_FILE
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=BATCH_FILE):
        read_reproducer(tmp_path / "kept")


def test_pruning_keeps_the_newest_and_touches_nothing_else(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / f"step_00000{number}"
        _kept(folder)
        os.utime(folder / DESCRIPTION_FILE, (1000 - number, 1000 - number))
    (tmp_path / "step_000009").mkdir()  # not one of ours: it holds no description
    (tmp_path / "notes").mkdir()
    prune_reproducers(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_000000", "step_000001", "step_000009"]
