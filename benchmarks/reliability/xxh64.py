"""XXH64 in plain Python, written from its specification: to give a damaged ledger file the checksum of its bytes."""

from __future__ import annotations

import struct

_MASK = (1 << 64) - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def xxh64(data: bytes, seed: int = 0) -> int:
    """Returns the 64-bit hash of ``data``."""
    place, end = 0, len(data)
    if end >= 32:
        lanes = [seed + _P1 + _P2 & _MASK, seed + _P2 & _MASK, seed, seed - _P1 & _MASK]
        while place + 32 <= end:
            words = struct.unpack_from("<4Q", data, place)
            lanes = [_round(lane, word) for lane, word in zip(lanes, words, strict=True)]
            place += 32
        turns = (1, 7, 12, 18)
        value = sum(_rotate(lane, turn) for lane, turn in zip(lanes, turns, strict=True)) & _MASK
        for lane in lanes:
            value = (value ^ _round(0, lane)) * _P1 + _P4 & _MASK
    else:
        value = seed + _P5 & _MASK
    value = value + end & _MASK
    while place + 8 <= end:
        value = _rotate(value ^ _round(0, struct.unpack_from("<Q", data, place)[0]), 27) * _P1 + _P4 & _MASK
        place += 8
    if place + 4 <= end:
        value = _rotate(value ^ struct.unpack_from("<I", data, place)[0] * _P1 & _MASK, 23) * _P2 + _P3 & _MASK
        place += 4
    for byte in data[place:]:
        value = _rotate(value ^ byte * _P5 & _MASK, 11) * _P1 & _MASK
    value = (value ^ value >> 33) * _P2 & _MASK
    value = (value ^ value >> 29) * _P3 & _MASK
    return value ^ value >> 32


def _round(lane: int, word: int) -> int:
    return _rotate(lane + word * _P2 & _MASK, 31) * _P1 & _MASK


def _rotate(value: int, count: int) -> int:
    return (value << count | value >> 64 - count) & _MASK
