"""Megatron-Core's distributed checkpoint format (torch_dist) on disk, read and written one tensor at a time.

    metadata.json    names the format            common.pt   what is not sharded (empty here)
    .metadata        pickle: key -> whole shape, chunks; (key, offset) -> file, byte range
    __0_N.distcp     chunks one after another, each as torch.save wrote it

``megatron.core.dist_checkpointing.load`` reads what ``MegatronWriter`` wrote, in any parallel layout, and
``MegatronFolder`` reads what ``dist_checkpointing.save`` wrote. Megatron's own functions are not used because they
want the whole model in memory, a process group and, to save, worker processes.

This file does NOT know parameter names or layouts; convert/stream.py does.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from aer_megatron.convert.megatron_metadata import MAX_BYTES, CheckpointTables, Chunk, read_tables
from aer_megatron.files.bounded import read_bounded
from aer_megatron.files.json_input import read_json_object

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FORMAT_NAME, _METADATA_NAME, _COMMON_NAME = "metadata.json", ".metadata", "common.pt"
# what reading a chunk that is none can raise, torch.load with weights_only included
_NO_TENSOR = (
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, TypeError, struct.error),
    *(AttributeError, ArithmeticError, AssertionError),
)


class MegatronWriter:
    """A distributed checkpoint in the folder ``work``: ``add`` every chunk, then ``finish``, in a ``with`` block.

    A file is closed before it would exceed ``max_file_bytes`` (one larger chunk gets a file of its own).
    """

    def __init__(self, work: Path, *, max_file_bytes: int) -> None:
        self._work = work
        self._max_file_bytes = max_file_bytes
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._file: IO[bytes] | None = None
        self._num_files = 0

    def __enter__(self) -> MegatronWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, key: str, chunk: Tensor, *, offset: Sequence[int], whole: Sequence[int]) -> None:
        """Writes the block of tensor ``key`` (of shape ``whole``) that starts at ``offset``.

        Leading axes of length 1 are added to ``chunk`` where it has fewer axes than ``whole``.
        """
        stacked = chunk.detach().reshape((1,) * (len(whole) - chunk.dim()) + tuple(chunk.shape)).contiguous()
        entry = self._entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(whole), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), stacked.shape))
        if stacked.untyped_storage().nbytes() != stacked.nbytes:
            stacked = stacked.clone()  # torch.save writes a storage, not a view
        self._store(MetadataIndex(key, torch.Size(offset)), stacked, stacked.nbytes)

    def add_empty_object(self, key: str) -> None:
        """Writes the extra state of a module that has none, which Megatron-Core nevertheless asks for."""
        self._entries[key] = BytesStorageMetadata()
        self._store(MetadataIndex(key), [None], 0)

    def finish(self) -> None:
        """Returns once the tables that make the folder a checkpoint are written."""
        if self._file is not None:
            self._file.close()
        metadata = Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._storage,
            storage_meta=StorageMeta(checkpoint_id=None, save_id=str(uuid.uuid4())),
        )
        (self._work / _METADATA_NAME).write_bytes(pickle.dumps(metadata))
        common = io.BytesIO()  # torch's own files say nothing of a full disk
        torch.save({}, common)
        (self._work / _COMMON_NAME).write_bytes(common.getvalue())
        (self._work / _FORMAT_NAME).write_text(json.dumps(_FORMAT), encoding="utf-8")

    def _store(self, index: MetadataIndex, content: object, num_bytes: int) -> None:
        if self._file is None or (self._file.tell() and self._file.tell() + num_bytes > self._max_file_bytes):
            if self._file is not None:
                self._file.close()
            self._file = (self._work / f"__0_{self._num_files}.distcp").open("wb")
            self._num_files += 1
        start = self._file.tell()
        stream = _RecordingStream(self._file)
        try:
            with _no_checksums():
                torch.save(content, stream)  # type: ignore[arg-type]
        except RuntimeError:
            if stream.failure is not None:  # torch's writer hides what the disk said
                raise stream.failure from None
            raise
        self._storage[index] = _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)


class MegatronFolder:
    """Read-only access to a distributed checkpoint. Example: ``MegatronFolder(path).read("output_layer.weight", ())``.

    Raises ValueError at construction where ``path`` is not one, or a file that it names is missing or too short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_megatron_folder(path):
            raise ValueError(f"{path} is not a distributed checkpoint of Megatron-Core: it has no {_FORMAT_NAME}")
        backend = read_json_object(path / _FORMAT_NAME).get("sharded_backend")
        if backend != "torch_dist":
            raise ValueError(f"{path} has the format {str(backend)[:40]!r}; supported: torch_dist")
        self._tensors, self._byte_ranges = _read_tables(path / _METADATA_NAME)
        self._check_files()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> whole shape of all tensors."""
        return {key: entry.shape for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of tensor ``key``."""
        return self._tensors[key].dtype

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """Tensor ``key`` with its leading axes fixed at ``index`` (a layer; a layer and an expert; or nothing).

        Raises ValueError where chunks do not cover it or cannot be read.
        """
        if key not in self._tensors:
            raise ValueError(f"{self.path} holds no tensor {key}")
        entry = self._tensors[key]
        whole = entry.shape[len(index) :]
        for chunk in entry.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(entry.shape) or not _lies_within(chunk, entry.shape):
                raise ValueError(f"{self.path}: chunk {tuple(chunk)} of {key} lies outside its shape {entry.shape}")
        chunks = [chunk for chunk in entry.chunks if _contains(chunk, index)]
        covered = sum(math.prod(chunk.sizes[len(index) :]) for chunk in chunks)
        if covered != math.prod(whole):
            raise ValueError(f"{self.path}: chunks of {key} {index} cover {covered} of {math.prod(whole)} elements")
        if len(chunks) == 1:
            return self._chunk(key, chunks[0], index)
        result = torch.empty(whole, dtype=entry.dtype)
        for chunk in chunks:
            place = zip(chunk.offsets[len(index) :], chunk.sizes[len(index) :], strict=True)
            result[tuple(slice(start, start + size) for start, size in place)] = self._chunk(key, chunk, index)
        return result

    def _chunk(self, key: str, chunk: Chunk, index: tuple[int, ...]) -> Tensor:
        bytes_of = self._byte_ranges.get((key, chunk.offsets))
        if bytes_of is None:
            raise ValueError(f"{self.path}: {_METADATA_NAME} names no place of {key} at {chunk.offsets}; copy it again")
        try:
            with (self.path / bytes_of.file_name).open("rb") as file:
                tensor = _mapped_tensor(file, bytes_of.start, bytes_of.length)
        except _NO_TENSOR as error:
            raise ValueError(f"{self.path / bytes_of.file_name} is damaged at {key}: {error}") from error
        if tuple(tensor.shape) != chunk.sizes:
            raise ValueError(f"{self.path}: a chunk of {key} has shape {tuple(tensor.shape)}, expected {chunk.sizes}")
        picked: Tensor = tensor[tuple(i - start for i, start in zip(index, chunk.offsets, strict=False))]
        return picked

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for part in self._byte_ranges.values():
            needed[part.file_name] = max(needed.get(part.file_name, 0), part.start + part.length)
        for name, size in sorted(needed.items()):
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{self.path} lacks {name} of {len(needed)} files; copy it again")
            if file.stat().st_size < size:
                raise ValueError(f"{file} is truncated: {file.stat().st_size} bytes, at least {size} expected")


def _read_tables(file: Path) -> CheckpointTables:
    """Raises ValueError naming the file where it is no metadata."""
    raw = read_bounded(file, MAX_BYTES, what="the metadata of a checkpoint", remedy="copy the checkpoint again")
    try:
        return read_tables(raw)
    except ValueError as error:
        raise ValueError(
            f"{file.parent} is not a whole distributed checkpoint: {file.name} is {error}; copy it again"
        ) from None


def is_megatron_folder(path: Path) -> bool:
    """Whether ``path`` looks like a distributed checkpoint of Megatron-Core."""
    return (path / _FORMAT_NAME).is_file() and (path / _METADATA_NAME).is_file()


class _RecordingStream(io.RawIOBase):
    """Passes writes on and keeps the first failure."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self.tell())]
        return self._file.readinto(view)  # type: ignore[attr-defined, no-any-return]


def _mapped_tensor(file: IO[bytes], start: int, length: int) -> Tensor:
    """Returns the tensor that torch.save wrote at bytes [start, start + length), its data mapped and not read.

    A read would fill fresh memory, whose page faults cost as much as the copy. The mapping is private: writing to the
    tensor changes no file. It goes with the tensor.
    """
    window: Any = _Window(file, start, length)
    with FakeTensorMode():  # reads the layout and leaves the data, but says where it begins
        layout = torch.load(window, map_location="cpu", weights_only=True)
    storage = layout.untyped_storage()
    begin, size = storage._checkpoint_offset, storage.nbytes()
    if begin is None or begin + size > length:
        raise EOFError(f"the data of {size} bytes ends beyond its {length}")
    if not size:
        return torch.empty(layout.shape, dtype=layout.dtype)
    before = (start + begin) % mmap.ALLOCATIONGRANULARITY
    data = mmap.mmap(file.fileno(), before + size, offset=start + begin - before, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(data, dtype=layout.dtype, count=size // layout.dtype.itemsize, offset=before)
    return flat.as_strided(layout.shape, layout.stride(), layout.storage_offset())


def _lies_within(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    return all(start + size <= whole for start, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True))


def _contains(chunk: Chunk, index: tuple[int, ...]) -> bool:
    places = zip(index, chunk.offsets, chunk.sizes, strict=False)
    return all(start <= wanted < start + size for wanted, start, size in places)


@contextmanager
def _no_checksums() -> Iterator[None]:
    """torch.save spends three quarters of its time on a CRC that torch.load never checks."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
