"""Samples on disk: what is written is read; cut at a resume step; full disks and foreign files."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aer_megatron.report import samples
from aer_megatron.report.samples import Sample, SampleWriter, read_samples, truncate_samples


def sample(step: int, **given: Any) -> Sample:
    plain: dict[str, Any] = {
        "step": step,
        "set": "train",
        "prompt_id": 2**64 - 5,
        "group": 3,
        "prompt": "3,5,2,8=9>",
        "answer": "9",
        "completion": "3*5+2-8",
        "token_ids": (5, 1),
        "sampled": None,
        "token_ends": (3, 7),
        "reward": 1.0,
        "reason": "correct",
        "advantage": 0.25,
        "difficulty": 0.5,
        "entropy_weight": 1e-3,
        "logprob": (-0.5, -0.25),
        "token_entropy": (1.5, 0.0),
        "policy_version_min": 4,
        "policy_version_max": 5,
        "truncated": False,
    }
    return Sample(**{**plain, **given})


EVALUATED = {"set": "aime24", "advantage": None, "difficulty": None, "entropy_weight": None, "token_entropy": None}


def write(folder: Path, *batches: list[Sample], rank: int = 0) -> None:
    with SampleWriter(folder, rank=rank) as writer:
        for rows in batches:
            writer.write(lambda rows=rows: rows)
            writer.flush()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [sample(1), sample(2, **EVALUATED), sample(2, sampled=(True, False), logprob=(-0.5,), token_entropy=(0.5,))]
    hostile = sample(3, completion="</script>\x1b[2J\u202e", prompt="", token_ids=(), token_ends=(), logprob=())
    write(tmp_path, rows, [hostile])
    write(tmp_path, [sample(2, group=9)], rank=1)
    found = list(read_samples(tmp_path))
    assert sorted(found, key=repr) == sorted([*rows, hostile, sample(2, group=9)], key=repr)
    assert list(read_samples(tmp_path, steps=range(2, 3), sets={"aime24"})) == [rows[1]]


def test_numbers_per_token_are_float16(tmp_path: Path) -> None:
    write(tmp_path, [sample(0, logprob=(-0.1, -12.345), token_entropy=(0.123456, 3.0))])
    [found] = read_samples(tmp_path)
    assert found.logprob == tuple(np.float16([-0.1, -12.345]).tolist())
    assert found.token_entropy == tuple(np.float16([0.123456, 3.0]).tolist())


def test_samples_are_cut_at_the_resume_step(tmp_path: Path) -> None:
    write(tmp_path, [sample(0), sample(1)], [sample(2), sample(3)], [sample(4)])
    write(tmp_path, [sample(3, group=1), sample(5)], rank=1)
    truncate_samples(tmp_path, 3)
    assert sorted(found.step for found in read_samples(tmp_path)) == [0, 1, 2]
    truncate_samples(tmp_path, 0)
    assert list((tmp_path / "samples").iterdir()) == []
    truncate_samples(tmp_path / "new", 0)


def test_two_files_that_begin_with_a_step_stand_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, [sample(2, **EVALUATED)], [sample(2)])
    assert len(list(read_samples(tmp_path))) == 2


def test_a_file_of_something_else_is_named_by_the_reader_and_set_aside_by_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [sample(0)])
    (tmp_path / "samples" / "step_00000007.rank_00000.0.parquet").write_bytes(b"PAR1 half of a file")
    with pytest.raises(ValueError, match=r"step_00000007.*is no file of samples.*move it away"):
        list(read_samples(tmp_path))
    with caplog.at_level(logging.WARNING):
        truncate_samples(tmp_path, 1)
    assert "step_00000007" in caplog.text
    assert [found.step for found in read_samples(tmp_path)] == [0]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    pq.write_table(pa.table({"step": [1]}), tmp_path / "samples" / "a.parquet")
    with pytest.raises(ValueError, match="its columns are others"):
        list(read_samples(tmp_path))


def test_a_run_without_samples_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no samples.*report.samples > 0"):
        list(read_samples(tmp_path))


def test_a_full_disk_costs_samples_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = samples.pq.write_table

    def full(table: Any, where: Any, **options: Any) -> None:
        Path(where).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.ERROR), SampleWriter(tmp_path, rank=0) as writer:
        monkeypatch.setattr(samples.pq, "write_table", full)
        for step in range(3):
            writer.write(lambda step=step: [sample(step)])
            writer.flush()
        assert list((tmp_path / "samples").iterdir()) == []
        monkeypatch.setattr(samples.pq, "write_table", whole)
        writer.write(lambda: [sample(3)])
    assert [found.step for found in read_samples(tmp_path)] == [3]
    assert caplog.text.count("samples are lost, the run goes on") == 1


def test_rows_that_cannot_be_made_cost_themselves_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), SampleWriter(tmp_path, rank=0) as writer:
        writer.write(lambda: [sample(0, completion="\ud800")])  # no UTF-8
        writer.flush()
        writer.write(lambda: [sample(1)])
        writer.flush()
    assert [found.step for found in read_samples(tmp_path)] == [1]
    assert "samples are lost, the run goes on" in caplog.text


def test_half_a_file_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    write(tmp_path, [sample(0)])
    (tmp_path / "samples" / ".step_00000001.rank_00000.0.parquet.partial").write_bytes(b"PAR1")
    truncate_samples(tmp_path, 1)
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_gap_in_a_list_of_numbers_is_named(tmp_path: Path) -> None:
    write(tmp_path, [sample(0)])
    [path] = (tmp_path / "samples").iterdir()
    rows = pq.read_table(path).to_pylist()
    rows[0]["logprob"] = [None, -0.5]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    with pytest.raises(ValueError, match="no logprob, or one with a gap"):
        list(read_samples(tmp_path))
