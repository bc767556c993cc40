"""Rows of JSONL and Parquet files, one at a time: what a file says, not yet a problem.

Files are hostile: a row is bounded in size, and one that cannot be read is told apart from the file being unreadable.

This file does NOT know what a row must hold (data/records.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aer_megatron.files.json_input import parse_json

MAX_ROW_BYTES = 1 << 24  # 16 MiB: a million words and their answer
_MAX_BATCH_BYTES = 1 << 30
_ROWS_AT_ONCE = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    where: str  # "line 3" or "row 3"
    load: Callable[[], Any]  # raises ValueError where the row is malformed


def read_rows(path: Path) -> Iterator[Row]:
    """Returns the rows of a file, in order; empty lines of JSONL are none.

    Raises:
        ValueError: there is no such file, its name ends in no known way, or it is no readable Parquet file.
    """
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is not a file; give an existing .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    raise ValueError(f"path={str(path)!r} ends with {path.suffix!r}; known are .jsonl, .ndjson and .parquet")


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Split on \n alone: str.splitlines would also cut at U+2028, which JSON allows inside a text.
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW_BYTES)
                yield Row(f"line {number}", _refuse_long_line)
            elif line.strip():
                yield Row(f"line {number}", lambda line=line: parse_json(line))  # type: ignore[misc]


def _refuse_long_line() -> Any:
    raise ValueError(f"it has more than {MAX_ROW_BYTES} bytes; a record has fewer")


def _read_parquet(path: Path) -> Iterator[Row]:
    # pyarrow is slow to import and JSONL does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                if batch.nbytes > _MAX_BATCH_BYTES:
                    raise ValueError(
                        f"path={str(path)!r}, row {number + 1}: this row and those behind it are too large"
                    )
                for load in _loaders(batch):
                    number += 1
                    yield Row(f"row {number}", load)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"path={str(path)!r} is not a readable Parquet file: {reason}; write it again") from None


def _loaders(batch: Any) -> list[Callable[[], Any]]:
    """Returns what gives each row of a record batch; a text that is no UTF-8 costs its row alone."""
    try:
        return [lambda row=row: row for row in batch.to_pylist()]  # type: ignore[misc]
    except (ValueError, OverflowError):
        return [partial(_to_row, batch.slice(index, 1)) for index in range(batch.num_rows)]


def _to_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        raise ValueError(f"it holds a value that cannot be read: {str(error).splitlines()[0]}") from None
