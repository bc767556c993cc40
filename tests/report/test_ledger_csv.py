"""``aer export-ledger``: the columns, its sources, and errors that leave no file behind."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.report import ledger_csv


def save_ledger(path: Path) -> None:
    ledger = DifficultyLedger(0.5, 0)
    ids = np.array([2**64 - 1, 10], dtype=np.uint64)
    ledger.update(ids, np.array([8, 0]), np.array([6, 0]), np.array([12.0, 0.0]), np.array([48, 0]), step=3)
    ledger.update(ids[:1], np.array([4]), np.array([1]), np.array([2.0]), np.array([8]), step=5)
    ledger.save(str(path))


EXPECTED = [
    # posterior of an unseen outcome at step 5: 1 / 2; sums of the other: 6/4 + 1 = 2.5 and 2/4 + 3 = 3.5
    ["000000000000000a", "0", "0", "", "0.5", "0.0", "0.0", "3", "", ""],
    ["ffffffffffffffff", "12", "7", str(7 / 12), str(3.5 / 8), "2.5", "3.5", "5", "0.25", str(56 / 12)],
]


@pytest.mark.parametrize("as_folder", [False, True])
def test_rows_of_a_file_and_of_a_checkpoint_folder(tmp_path: Path, as_folder: bool) -> None:
    save_ledger(tmp_path / "ledger")
    out = tmp_path / "out.csv"
    assert ledger_csv.main([str(tmp_path if as_folder else tmp_path / "ledger"), str(out)]) == 0
    with out.open(newline="") as file:
        header, *lines = list(csv.reader(file))
    assert tuple(header) == ledger_csv.COLUMNS
    assert lines == EXPECTED
    assert sorted(os.listdir(tmp_path)) == ["ledger", "out.csv"]


def test_an_empty_ledger_is_a_header(tmp_path: Path) -> None:
    DifficultyLedger(0.9, 0).save(str(tmp_path / "empty"))
    assert ledger_csv.main([str(tmp_path / "empty"), str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text() == ",".join(ledger_csv.COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("absent", None, "absent does not exist; give a ledger file or a checkpoint folder"),
        (".", None, "has no file 'ledger'; give a ledger file"),
        ("other.bin", b"something else entirely", r"other.bin: not a difficulty ledger file"),
    ],
)
def test_errors_are_one_line_and_keep_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, text: str
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert ledger_csv.main([str(tmp_path / name), str(out)]) == 2
    message = capsys.readouterr().err
    assert text in message
    assert message.count("\n") == 1
    assert out.read_text() == "old"


def test_a_missing_output_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_ledger(tmp_path / "ledger")
    assert ledger_csv.main([str(tmp_path / "ledger"), str(tmp_path / "no" / "out.csv")]) == 2
    assert "out.csv does not exist; make it" in capsys.readouterr().err
