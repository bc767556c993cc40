"""Weights through a folder that trainer and servers share: safetensors files and /update_weights_from_disk.

The folder of the version in service stays until the next one is in service: a restarted server is restored from it.
What lies where: ``sglang/transfer_folder.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from aer_megatron.convert.fp8_weights import fp8_config, fp8_specs
from aer_megatron.convert.mapping import hf_names
from aer_megatron.convert.safetensors_writer import SafetensorsWriter, TensorSpec
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.transfer_folder import TransferFolder
from aer_megatron.sglang.weight_sync import Published, ServerSync, SyncContext, Untransferred


class DiskSync(ServerSync):
    """Publishes through ``folder``, which every server must be able to read under the same path.

    Args:
        fleet, context: see ``sync.servers``.
        folder: one of this run's is made and removed in it.
        owner: what tells this run from others that use ``folder``: its output folder.
        hf_config: content of the model's config.json.
        max_shard_bytes: of one safetensors file.
    """

    def __init__(
        self,
        fleet: ServerFleet,
        context: SyncContext,
        *,
        folder: Path,
        owner: str,
        hf_config: Mapping[str, Any],
        max_shard_bytes: int,
    ) -> None:
        super().__init__(fleet, context)
        self._folder = TransferFolder(folder, run_id=context.labels.run, owner=owner)
        self._hf_config = hf_config
        self._max_shard_bytes = max_shard_bytes

    def close(self) -> None:
        """Removes what this run wrote."""
        self._folder.close()

    def _send(
        self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]
    ) -> dict[int, str]:
        self._folder.open()
        target = self._folder.make_version(version)
        # not flushed to disk: the files live for a step, and a checkpoint holds what must survive
        self._write(target, named_tensors)
        refused = self._in_parallel(lambda index: self._load(index, version), indices)
        if len(refused) < len(indices):
            self._folder.keep_only(version)
        return refused

    def _write(self, target: Path, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        config = fp8_config(self._hf_config) if self._context.fp8 else self._hf_config
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        first_name, first = next(named_tensors)
        # all of one dtype, the model's; the first is an embedding, which FP8 leaves alone
        specs = {name: TensorSpec(shape, first.dtype) for name, shape in hf_names(self._context.arch).items()}
        specs = fp8_specs(specs) if self._context.fp8 else specs
        with SafetensorsWriter(target, specs, max_shard_bytes=self._max_shard_bytes) as writer:
            for name, tensor in chain([(first_name, first)], named_tensors):
                writer.write(name, tensor)
            writer.finish()

    def _resend(self, index: int, published: Published) -> None:
        self._learn(index)
        if self._tp_size[index] not in published.expected.result():
            raise Untransferred(f"it came back with tp_size {self._tp_size[index]}, another one than before")
        self._load(index, published.version)
        self._verify(index, published)

    def _load(self, index: int, version: int) -> None:
        body = {
            "model_path": str(self._folder.version_path(version)),
            "weight_version": self._context.labels.unverified(version),
            "abort_all_requests": True,  # nothing of this run is under way while weights are transferred
            "flush_cache": True,
        }
        self._post(index, "/update_weights_from_disk", body)
