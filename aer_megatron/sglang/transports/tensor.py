"""Weights as pickled buckets to servers on the same machine: CUDA IPC handles on a GPU, the bytes themselves on a CPU.

A bucket is one vector of bytes with the offset of every tensor in it (the servers' "flattened_bucket"). Servers read it
with an allow-list: plain tensors, ``SimpleNamespace`` and dtypes are on it, so nothing of theirs is needed to write it.

On a GPU only a handle travels: a server copies out of the trainer's memory, which stays as it is until every server has
answered. The device goes by its UUID, because trainer and servers may number the devices differently. Each
tensor-parallel rank gets a handle of its own, as torch counts the users of a handle.

On a CPU the bytes travel inside the request. Torch's shared memory would save copies, but its file descriptors need the
receiver to be a child of the sender, and its files a manager process that may outlive both.
"""

from __future__ import annotations

import base64
import io
import pickle
from itertools import accumulate, pairwise
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from aer_megatron.sglang.buckets import Bucket
from aer_megatron.sglang.sessions import SessionTransport

_DEVICE_ARGUMENT = 6  # of torch's rebuild_cuda_tensor


class Transport(SessionTransport):
    """Publishes to servers on this machine."""

    def _prepared(self, bucket: Bucket) -> str:
        """Returns the bytes of a bucket, the same for everyone; "" on a GPU: a handle is its reader's own."""
        return "" if bucket.flat.is_cuda else serialize(bucket)

    def _load(self, index: int, bucket: Bucket, prepared: Any, fields: dict[str, Any]) -> None:
        ranks = [prepared or serialize(bucket) for _ in range(self._servers.tp_size[index])]
        self._servers.post(index, "/update_weights_from_tensor", {"serialized_named_tensors": ranks, **fields})


def serialize(bucket: Bucket) -> str:
    """Returns the bucket as one tensor-parallel rank of a server reads it: base64 of a pickle."""
    sizes = (prod(shape) * dtype.itemsize for shape, dtype in zip(bucket.shapes, bucket.dtypes, strict=True))
    ends = list(accumulate(sizes, initial=0))
    metadata = [
        SimpleNamespace(name=name, shape=tuple(shape), dtype=dtype, start_idx=start, end_idx=end, numel=end - start)
        for name, shape, dtype, (start, end) in zip(
            bucket.names, bucket.shapes, bucket.dtypes, pairwise(ends), strict=True
        )
    ]
    flat = bucket.flat
    if not flat.is_cuda and flat.untyped_storage().nbytes() > flat.nbytes:
        flat = flat.clone()  # pickle would write all of the memory that it is a part of
    # from 0.19 on Megatron-Core puts a function of its own here, and servers refuse a pickle that says where it is from
    loader = torch.storage._load_from_bytes
    loader.__module__, loader.__qualname__ = "torch.storage", "_load_from_bytes"
    raw = io.BytesIO()
    _HandlePickler(raw).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(raw.getbuffer()).decode("ascii")


class _HandlePickler(pickle.Pickler):
    """Writes a CUDA tensor as a handle to its memory, everything else as pickle does."""

    def reducer_override(self, value: Any) -> Any:
        """Returns how a value is rebuilt; NotImplemented leaves it to pickle."""
        if not (isinstance(value, Tensor) and value.is_cuda):
            return NotImplemented
        rebuild, arguments = reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE_ARGUMENT]).uuid)
        return rebuild, (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])
