"""The ledger's file: identity, canonical bytes, and a named cause for every way in which it can be wrong."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from aer_megatron._C import DifficultyLedger

HEADER = struct.Struct("<8sIIdQ")  # magic, format version, record bytes, decay, count
RECORD = struct.Struct("<QddqIIIi")  # key, decayed sums, entropy / 2^-30, tokens, attempts, wins, step


def make_ledger(num_prompts: int = 100, decay: float = 0.9) -> DifficultyLedger:
    rng = np.random.default_rng(5)
    ledger = DifficultyLedger(decay, 0)
    prompts = rng.permutation(num_prompts).astype(np.uint64) * np.uint64(2**57 + 1)
    attempts = rng.integers(1, 9, num_prompts)
    successes = rng.integers(0, attempts + 1)
    for step in (3, 8):
        ledger.update(prompts, attempts, successes, rng.random(num_prompts), attempts * 7, step=step)
    return ledger


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    ledger = make_ledger()
    path = tmp_path / "ledger.bin"
    ledger.save(str(path))
    loaded = DifficultyLedger.load(str(path), decay=0.9)
    assert loaded == ledger
    assert loaded.decay == 0.9
    for name, column in ledger.export().as_dict().items():
        assert getattr(loaded.export(), name).tolist() == column.tolist()


def test_the_bytes_are_the_documented_ones(tmp_path: Path) -> None:
    ledger = DifficultyLedger(0.5, 0)
    for prompt in (9, 2**64 - 1, 4):
        ledger.update(
            np.array([prompt], np.uint64),
            np.array([4]),
            np.array([1]),
            np.array([1.5]),
            np.array([30]),
            step=6,
        )
    path = tmp_path / "ledger.bin"
    ledger.save(str(path))
    content = path.read_bytes()
    assert HEADER.unpack_from(content) == (b"AERLEDGR", 2, RECORD.size, 0.5, 3)
    records = [RECORD.unpack_from(content, HEADER.size + i * RECORD.size) for i in range(3)]
    keys = sorted(splitmix64(prompt) for prompt in (4, 9, 2**64 - 1))
    assert records == [(key, 1.0, 3.0, 3 * 2**29, 30, 4, 1, 6) for key in keys]
    assert len(content) == HEADER.size + 3 * RECORD.size + 8


def splitmix64(x: int) -> int:
    """The finaliser of Steele, Lea and Flood 2014, on Python's integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_checksum_of_an_empty_ledger_is_xxh64(tmp_path: Path) -> None:
    path = tmp_path / "empty.bin"
    DifficultyLedger(1.0, 0).save(str(path))
    content = path.read_bytes()
    assert struct.unpack("<Q", content[HEADER.size :])[0] == xxh64_of_32_bytes(content[: HEADER.size])
    assert len(DifficultyLedger.load(str(path))) == 0


def xxh64_of_32_bytes(data: bytes) -> int:
    """XXH64 (seed 0) of exactly one stripe, straight from its specification."""
    p1, p2, p3, p4 = (
        11400714785074694791,
        14029467366897019727,
        1609587929392839161,
        9650029242287828579,
    )
    mask = 2**64 - 1

    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (64 - r))) & mask

    def mix(acc: int, word: int) -> int:
        return rotl((acc + word * p2) & mask, 31) * p1 & mask

    words = struct.unpack("<4Q", data)
    lanes = [mix(seed & mask, word) for seed, word in zip((p1 + p2, p2, 0, -p1), words)]
    acc = sum(rotl(lane, r) for lane, r in zip(lanes, (1, 7, 12, 18))) & mask
    for lane in lanes:
        acc = ((acc ^ mix(0, lane)) * p1 + p4) & mask
    acc = (acc + len(data)) & mask
    acc = (acc ^ (acc >> 33)) * p2 & mask
    acc = (acc ^ (acc >> 29)) * p3 & mask
    return acc ^ (acc >> 32)


def test_equal_ledgers_write_equal_files_however_they_were_filled(tmp_path: Path) -> None:
    one = make_ledger()
    two = DifficultyLedger(0.9, 5000)
    two.merge(one)
    one.save(str(tmp_path / "one"))
    two.save(str(tmp_path / "two"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_save_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    make_ledger(50).save(str(path))
    make_ledger(60).save(str(path))
    assert len(DifficultyLedger.load(str(path))) == 60
    assert os.listdir(tmp_path) == ["ledger.bin"]


def test_a_failed_save_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        make_ledger(5).save(str(target))
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(FileNotFoundError, match="absent"):
        make_ledger(5).save(str(tmp_path / "absent" / "ledger.bin"))
    with pytest.raises(FileNotFoundError, match="absent"):
        DifficultyLedger.load(str(tmp_path / "absent"))


@pytest.mark.parametrize("size", [0, 5, 8, 31, 32, 100, 32 + 48 * 100, 32 + 48 * 100 + 7])
def test_every_truncation_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "ledger.bin"
    make_ledger().save(str(path))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"ledger\.bin: (truncated|not a difficulty ledger file)"):
        DifficultyLedger.load(str(path))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    make_ledger(20).save(str(path))
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"ledger\.bin: "):
            DifficultyLedger.load(str(path))


def test_flipped_record_byte_is_called_a_checksum_failure(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    make_ledger().save(str(path))
    content = bytearray(path.read_bytes())
    content[HEADER.size + 10] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"ledger\.bin: corrupt: its XXH64 checksum"):
        DifficultyLedger.load(str(path))


def test_other_format_version_other_decay_and_trailing_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.bin"
    make_ledger().save(str(path))
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"ledger\.bin: was written with decay 0.9, expected decay 0.8"):
        DifficultyLedger.load(str(path), decay=0.8)
    path.write_bytes(content[:8] + struct.pack("<I", 1) + content[12:])
    with pytest.raises(ValueError, match=r"ledger\.bin: format version 1; this build reads version 2; start a new"):
        DifficultyLedger.load(str(path))
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"ledger\.bin: corrupt: .* bytes where 100 prompts need"):
        DifficultyLedger.load(str(path))
    path.write_bytes(HEADER.pack(b"AERLEDGR", 2, RECORD.size, 0.9, 2**62) + content[HEADER.size :])
    with pytest.raises(ValueError, match=r"ledger\.bin: corrupt header"):
        DifficultyLedger.load(str(path))
