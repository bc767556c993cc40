"""A rank's tensors on their way into safetensors files: through host memory that is kept, or one tensor at a time.

Both write the same bytes: tensors of a file stand in the order of falling element size, then of their names, so that
each is aligned and the data of a file is one range of the buffer. A file is hashed while it is written.

This file does NOT know folders, ranks or what the tensors are.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aer_megatron.checkpoint.folder import new_file
from aer_megatron.checkpoint.manifest import FileEntry
from aer_megatron.convert.safetensors_writer import TensorSpec, raw_bytes, safetensors_header

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64
_COPY_BYTES, _COPY_THREADS = 1 << 24, 4
_BLOCK_BYTES = 1 << 22  # hashed, then written while it is still in the cache


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one file by name, in their order on disk; ``data`` is their bytes where they lie together."""

    part: str
    tensors: Mapping[str, Tensor]
    data: memoryview | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, path: Path, rank: int) -> FileEntry:
        """Returns the entry of the file, newly written, once it is on disk.

        Raises:
            OSError: it cannot be written, or something stands at ``path``.
        """
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        content = map(_host_bytes, self.tensors.values()) if self.data is None else [self.data]
        digest, num_bytes = hashlib.sha256(), 0
        with new_file(path) as file:
            for block in chain([memoryview(safetensors_header(specs))], content):
                for start in range(0, len(block), _BLOCK_BYTES):
                    piece = block[start : start + _BLOCK_BYTES]
                    digest.update(piece)
                    file.write(piece)
                num_bytes += len(block)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(part=self.part, rank=rank, num_bytes=num_bytes, sha256=digest.hexdigest())


def tensor_file(part: str, tensors: Mapping[str, Tensor]) -> TensorFile:
    """Returns the file of ``tensors``, which it reads when it is written."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    return TensorFile(part, {name: tensors[name] for name in order})


class HostBuffer:
    """Host memory that holds a rank's part of one checkpoint; kept between saves, page-locked beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    @property
    def nbytes(self) -> int:
        return self._flat.numel()

    def reserve(self, files: Mapping[str, TensorFile]) -> None:
        """Makes room for ``files``, once for all saves of a run. Raises RuntimeError where the host has none."""
        needed = sum(_aligned(file.num_bytes) for file in files.values())
        if needed <= self.nbytes:
            return
        self.release()
        try:
            self._flat = torch.empty(needed, dtype=torch.uint8)
        except RuntimeError as error:
            raise RuntimeError(
                f"no host memory for the {needed / 1e9:.2f} GB buffer of asynchronous checkpoints ({error}); set "
                "run.async_checkpoint=false, which writes them while training waits"
            ) from None
        if self._device.type == "cuda":
            self._lock()

    def copy(self, files: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
        """Returns ``files`` as they are now, in this buffer; once it returns their tensors may change."""
        self.reserve(files)
        copies, start = {}, 0
        on_host: list[tuple[Tensor, Tensor]] = []
        for name, file in files.items():
            end = start + file.num_bytes
            views = _views(self._flat[start:end], file.tensors)
            for key, view in views.items():
                tensor = file.tensors[key]
                if tensor.device.type == "cpu" and tensor.is_contiguous():
                    on_host.append((view, tensor))
                else:
                    view.copy_(tensor, non_blocking=True)
            copies[name] = TensorFile(file.part, views, raw_bytes(self._flat[start:end]))
            start += _aligned(file.num_bytes)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        _copy_on_host(on_host)
        return copies

    def release(self) -> None:
        """Gives the memory back."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())
        self._flat, self._locked = torch.empty(0, dtype=torch.uint8), False

    def _lock(self) -> None:
        """Page-locks the buffer: copies from the GPU then run at the bus's speed. PyTorch's own pool would round up."""
        status: Any = torch.cuda.cudart().cudaHostRegister(self._flat.data_ptr(), self.nbytes, 0)
        self._locked = int(status) == 0
        if not self._locked:
            _LOG.warning("the checkpoint buffer cannot be page-locked (CUDA error %d): copies are slower", int(status))


def _views(region: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        views[name] = region[start:end].view(tensor.dtype).view(tensor.shape)
        start = end
    return views


def _copy_on_host(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies each (to, from) as bytes, on a few cores: faster than PyTorch's kernel, which reads what it overwrites."""
    blocks = [
        (to[start : start + _COPY_BYTES], source[start : start + _COPY_BYTES])
        for to, source in ((raw_bytes(to), raw_bytes(source)) for to, source in pairs)
        for start in range(0, len(to), _COPY_BYTES)
    ]
    with ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="checkpoint-copy") as pool:
        for _ in pool.map(lambda block: np.copyto(np.asarray(block[0]), np.asarray(block[1])), blocks):
            pass


def _host_bytes(tensor: Tensor) -> memoryview:
    return raw_bytes(tensor.detach().to("cpu"))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
