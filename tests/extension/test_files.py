"""The ledger's file: identity, canonical bytes, and a named cause for every way in which it can be wrong."""

import os
import struct
import threading
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
    one, two = DifficultyLedger(0.9, 0), DifficultyLedger(0.9, 5000)
    prompts, ones = np.arange(3000, dtype=np.uint64), np.ones(3000, dtype=np.int64)
    for ledger, order in ((one, prompts), (two, prompts[::-1].copy())):
        ledger.update(order, ones, ones, ones * 1.0, ones, step=0)
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


def xxh64(data: bytes) -> int:
    """XXH64 (seed 0) of any data, from its specification: a file with a recomputed checksum."""
    p1, p2, p3, p4 = 11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579
    mask = 2**64 - 1

    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (64 - r))) & mask

    def mix(acc: int, word: int) -> int:
        return rotl((acc + word * p2) & mask, 31) * p1 & mask

    lanes = [(p1 + p2) & mask, p2, 0, -p1 & mask]
    end = len(data) // 32 * 32
    for start in range(0, end, 32):
        lanes = [mix(lane, word) for lane, word in zip(lanes, struct.unpack_from("<4Q", data, start), strict=True)]
    acc = sum(rotl(lane, r) for lane, r in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
    for lane in lanes:
        acc = ((acc ^ mix(0, lane)) * p1 + p4) & mask
    acc = (acc + len(data)) & mask
    while len(data) - end >= 8:
        acc = (rotl(acc ^ mix(0, struct.unpack_from("<Q", data, end)[0]), 27) * p1 + p4) & mask
        end += 8
    assert end == len(data)  # records are whole words
    acc = (acc ^ (acc >> 33)) * p2 & mask
    acc = (acc ^ (acc >> 29)) * p3 & mask
    return acc ^ (acc >> 32)


def write_records(path: Path, *records: tuple[object, ...]) -> None:
    content = HEADER.pack(b"AERLEDGR", 2, RECORD.size, 0.9, len(records)) + b"".join(RECORD.pack(*r) for r in records)
    path.write_bytes(content + struct.pack("<Q", xxh64(content)))


GOOD = (7, 1.0, 2.0, 0, 30, 4, 2, 6)  # key, decayed successes and failures, entropy, tokens, attempts, wins, step


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    write_records(tmp_path / "ledger", GOOD, (8, *GOOD[1:]))
    assert DifficultyLedger.load(str(tmp_path / "ledger")).export().attempts.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (1, 2.0000001),  # more decayed successes than successes
        (2, 2.0000001),  # more decayed failures than failures
        (1, -1.0),
        (1, float("nan")),
        (2, float("inf")),
        (3, -1),
        (3, 2**62),
        (6, 5),  # more successes than attempts
        (7, -1),
        (0, 6),  # out of order
    ],
)
def test_impossible_records_are_refused_whatever_their_checksum_says(tmp_path: Path, place: int, value: object) -> None:
    bad = [8, *GOOD[1:]]
    bad[place] = value  # type: ignore[call-overload]
    write_records(tmp_path / "ledger", GOOD, tuple(bad))
    with pytest.raises(ValueError, match=r"ledger: corrupt: record 1 is out of order or out of range"):
        DifficultyLedger.load(str(tmp_path / "ledger"))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            DifficultyLedger.load(str(path))
    for call in (DifficultyLedger.load, make_ledger(3).save):
        with pytest.raises(ValueError, match="zero byte"):
            call(str(tmp_path / "a") + "\0b")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_of_holes_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    path, count = tmp_path / "ledger", 10**9
    with path.open("wb") as file:
        file.write(HEADER.pack(b"AERLEDGR", 2, RECORD.size, 0.9, count))
        file.truncate(HEADER.size + RECORD.size * count + 8)
    with pytest.raises(ValueError, match=r"corrupt: record 1 is out of order"):
        DifficultyLedger.load(str(path))


def test_threads_that_save_to_one_path_leave_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledgers = [make_ledger(20_000, 0.9), make_ledger(30_000, 0.5)]
    errors: list[Exception] = []

    def save(ledger: DifficultyLedger) -> None:
        try:
            for _ in range(20):
                ledger.save(str(path))
                assert len(DifficultyLedger.load(str(path))) in (20_000, 30_000)
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(ledger,)) for ledger in ledgers * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["ledger"]


def test_a_planted_temporary_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"ledger.tmp.{os.getpid()}").symlink_to(victim)
    make_ledger(3).save(str(tmp_path / "ledger"))
    assert victim.read_text() == "mine"
