"""What W&B keeps of an offline run: a log of LevelDB's form with records as protocol buffers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FILE_HEADER, _CHUNK_HEADER = 7, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def history(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns (run id, step, values) of every row below ``folder``, launch by launch."""
    rows = []
    for file in sorted(folder.rglob("*.wandb")):
        run_id = ""
        for record in _records(file):
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            elif record.WhichOneof("record_type") == "history":
                # a name is a key, or a path of keys
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                rows.append((run_id, record.history.step.num, values))
    return rows


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), _FILE_HEADER, b""
    while place + _CHUNK_HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _CHUNK_HEADER:
            place += _BLOCK - place % _BLOCK
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + content[place + _CHUNK_HEADER :][:length]
        place += _CHUNK_HEADER + length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
