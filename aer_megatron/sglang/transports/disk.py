"""Weights through a folder that trainer and servers share: safetensors files and /update_weights_from_disk.

The folder of the version in service stays until the next one is in service: a restarted server is restored from it.
What lies where: ``sglang/transfer_folder.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor

from aer_megatron.convert.fp8_weights import fp8_config, fp8_specs
from aer_megatron.convert.hf_writer import fill_hf_folder
from aer_megatron.convert.mapping import hf_specs
from aer_megatron.sglang.transfer_folder import TransferFolder
from aer_megatron.sglang.transports import BaseTransport, TransportOptions
from aer_megatron.sglang.weight_servers import WeightServers


class Transport(BaseTransport):
    """Publishes through ``options.folder``; a folder of this run's is made and removed in it."""

    keeps_weights = True

    def __init__(self, servers: WeightServers, options: TransportOptions) -> None:
        super().__init__(servers, options)
        self._folder = TransferFolder(options.folder, run_id=servers.labels.run, owner=options.owner)

    def close(self) -> None:
        """Removes what this run wrote."""
        self._folder.close()

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]) -> dict[int, str]:
        """Writes the weights and has the servers load them."""
        self._folder.open()
        target = self._folder.make_version(version)
        # not flushed to disk: the files live for a step, and a checkpoint holds what must survive
        self._write(target, named_tensors)
        refused = self._servers.in_parallel(lambda index: self.load(index, version), indices)
        if len(refused) < len(indices):
            self._folder.keep_only(version)
        return refused

    def load(self, index: int, version: int) -> None:
        """Has one server load the folder of a version; raises Untransferred."""
        body = {
            "model_path": str(self._folder.version_path(version)),
            "weight_version": self._servers.labels.unverified(version),
            "abort_all_requests": True,  # nothing of this run is under way while weights are transferred
            "flush_cache": True,
        }
        self._servers.post(index, "/update_weights_from_disk", body)

    def _write(self, target: Path, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        fp8, config = self._servers.fp8, self._options.hf_config
        first_name, first = next(named_tensors)
        # all of one dtype, the model's; the first is an embedding, which FP8 leaves alone
        specs = hf_specs(self._servers.arch, first.dtype)
        fill_hf_folder(
            target,
            chain([(first_name, first)], named_tensors),
            fp8_specs(specs) if fp8 else specs,
            config=fp8_config(config) if fp8 else config,
            max_shard_bytes=self._options.max_shard_bytes,
        )
