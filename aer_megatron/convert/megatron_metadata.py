"""The tables of a torch_dist checkpoint (its ``.metadata``), read from a pickle that anybody may have written.

A pickle is a program. This one is run by a machine that has no way to do harm: a global is looked up in a table of
names and becomes a token, nothing is imported, called or given attributes; a token with its arguments is a ``_Node``,
which says what would have been made. Keys of dicts are texts and nodes, so that no hash is computed over a structure of
the file. What comes out is checked field by field and holds ints, texts, tuples and dtypes of our own.

This file does NOT open files; convert/megatron_folder.py does.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple

import torch

MAX_BYTES = 1 << 28
_MAX_AXES = 16
_MAX_SIZE = 2**62

_TORCH = "torch.distributed.checkpoint."
_DTYPES = {name: found for name, found in vars(torch).items() if isinstance(found, torch.dtype)}
# what torch and Megatron-Core write; "" marks what is read and not used
_KINDS: Mapping[tuple[str, str], str] = {
    (f"{_TORCH}metadata", "Metadata"): "metadata",
    (f"{_TORCH}metadata", "TensorStorageMetadata"): "tensor",
    (f"{_TORCH}metadata", "ChunkStorageMetadata"): "chunk",
    (f"{_TORCH}metadata", "TensorProperties"): "properties",
    (f"{_TORCH}metadata", "MetadataIndex"): "index",
    (f"{_TORCH}filesystem", "_StorageInfo"): "storage",
    ("torch", "Size"): "size",
    (f"{_TORCH}metadata", "BytesStorageMetadata"): "",
    (f"{_TORCH}metadata", "StorageMeta"): "",
    (f"{_TORCH}metadata", "_MEM_FORMAT_ENCODING"): "",
    (f"{_TORCH}planner", "SavePlan"): "",
    (f"{_TORCH}planner", "WriteItem"): "",
    (f"{_TORCH}planner", "WriteItemType"): "",
    (f"{_TORCH}planner", "TensorWriteData"): "",
    ("torch.serialization", "_get_layout"): "",
    ("collections", "OrderedDict"): "",
}
_OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
INT BININT BININT1 BININT2 LONG1 BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL
REDUCE NEWOBJ BUILD
"""
# all that running a program which is none, or another one, can raise in this machine
_BROKEN = (
    *(pickle.UnpicklingError, struct.error, EOFError, ValueError, LookupError, TypeError, AttributeError),
    ArithmeticError,
)


class Chunk(NamedTuple):
    """A block of a tensor: where it starts and how large it is, along every axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A whole tensor and the chunks that make it up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class ByteRange(NamedTuple):
    """Where a chunk lies: bytes [start, start + length) of a file of the folder."""

    file_name: str
    start: int
    length: int


class CheckpointTables(NamedTuple):
    """What ``.metadata`` says: tensors by key, byte ranges by key and offsets (None: an object that is no tensor)."""

    tensors: Mapping[str, TensorEntry]
    byte_ranges: Mapping[tuple[str, tuple[int, ...] | None], ByteRange]


def read_tables(raw: bytes) -> CheckpointTables:
    """Returns the tables in ``raw``, the content of a ``.metadata`` file.

    Raises:
        ValueError: it is no such file, or names what does not belong there.
    """
    machine = _Machine(raw)
    try:
        root = machine.load()
        if max(machine.memo, default=0) > len(raw):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("a memo number beyond the size of the file")  # other readers reserve that much
    except _BROKEN as error:
        raise ValueError(f"not the metadata of a checkpoint: {str(error)[:200] or type(error).__name__}") from None
    fields = _fields(root, "metadata")
    listed = sum(_num_chunks(node) for _, node in _items(fields.get("state_dict_metadata"), "state_dict_metadata"))
    if listed > len(raw):  # a list of a few bytes that many tensors share
        raise ValueError("not the metadata of a checkpoint: it repeats its chunks more often than its size allows")
    tensors = {
        _text(key, "a key"): _tensor(node, _text(key, "a key"))
        for key, node in _items(fields.get("state_dict_metadata"), "state_dict_metadata")
        if isinstance(node, _Node) and node.kind == "tensor"
    }
    byte_ranges = {_index(key): _byte_range(node) for key, node in _items(fields.get("storage_data"), "storage_data")}
    return CheckpointTables(tensors, byte_ranges)


class _Token(NamedTuple):
    """A global that the program named."""

    module: str
    name: str
    kind: str


class _Node:
    """What would have been made by calling a token. Hashed by identity."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, token: Any, arguments: Any) -> None:
        if not isinstance(token, _Token) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("something is called that is no class")
        self.kind, self.arguments, self.state = token.kind, arguments, None


class _Machine(pickle._Unpickler):  # the one in C reserves memory for the largest memo number that a file names
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _KINDS:
            return _Token(module, name, _KINDS[module, name])
        raise pickle.UnpicklingError(f"{module[:80]}.{name[:80]} does not belong into a checkpoint's metadata")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1] = _Node(self.stack[-1], arguments)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        node = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(node, _Node):
            raise pickle.UnpicklingError("something is given a state that is no object")
        node.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())  # type: ignore[attr-defined]

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, _Node) or type(target) not in (dict, _Node):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key")
            if type(target) is dict:  # the items of an OrderedDict are of no use here
                target[key] = value


def _allowed_opcodes() -> Iterator[tuple[int, Callable[..., None]]]:
    for name in _OPCODES.split():
        code: int = getattr(pickle, name)[0]
        yield code, pickle._Unpickler.dispatch[code]


_Machine.dispatch |= dict(_allowed_opcodes())
_Machine.dispatch |= {
    pickle.REDUCE[0]: _Machine.load_reduce,
    pickle.NEWOBJ[0]: _Machine.load_reduce,
    pickle.BUILD[0]: _Machine.load_build,
    pickle.SETITEM[0]: _Machine.load_setitem,
    pickle.SETITEMS[0]: _Machine.load_setitems,
}


def _num_chunks(node: Any) -> int:
    chunks = node.state.get("chunks") if isinstance(node, _Node) and isinstance(node.state, dict) else None
    return len(chunks) if isinstance(chunks, list) else 0


def _tensor(node: _Node, key: str) -> TensorEntry:
    fields = _fields(node, "tensor")
    properties, chunks = fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, _Node) and properties.kind == "properties" else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise ValueError(f"tensor {key[:80]!r} has no dtype or no list of chunks")
    shape = _sizes(fields.get("size"), f"the size of {key[:80]!r}")
    found = []
    for chunk in chunks:
        parts = _fields(chunk, "chunk")
        found.append(Chunk(_sizes(parts.get("offsets"), "offsets"), _sizes(parts.get("sizes"), "sizes")))
    return TensorEntry(shape, dtype, tuple(found))


def _index(node: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(node, "index")
    offset = fields.get("offset")
    return _text(fields.get("fqn"), "fqn"), None if offset is None else _sizes(offset, "offset")


def _byte_range(node: Any) -> ByteRange:
    fields = _fields(node, "storage")
    name = _text(fields.get("relative_path"), "relative_path")
    if PurePosixPath(name).name != name or name.startswith("."):
        raise ValueError(f"relative_path={name[:80]!r} must be the name of a file in the folder")
    return ByteRange(name, *(_size(fields.get(key), key) for key in ("offset", "length")))


def _fields(node: Any, kind: str) -> dict[str, Any]:
    if not isinstance(node, _Node) or node.kind != kind or not isinstance(node.state, dict):
        raise ValueError(f"not the metadata of a checkpoint: a {kind} is missing where one belongs")
    return node.state


def _items(table: Any, where: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table")
    return iter(table.items())


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 4096 or "\0" in value:
        raise ValueError(f"{where} must be a name")
    return value


def _sizes(node: Any, where: str) -> tuple[int, ...]:
    values = node.arguments[0] if isinstance(node, _Node) and node.kind == "size" and node.arguments else None
    if not isinstance(values, tuple | list) or len(values) > _MAX_AXES:
        raise ValueError(f"{where} must be a shape of at most {_MAX_AXES} axes")
    return tuple(_size(value, where) for value in values)


def _size(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < _MAX_SIZE:
        raise ValueError(f"{where} must be an integer from 0 to 2^62")
    return value
