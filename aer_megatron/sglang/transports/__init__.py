"""The table of weight transports: every module of this folder is one, under the name that ``sglang.transport`` gives.

Its class ``Transport`` is a ``BaseTransport``. A new transport is a new file here, and its name in options/rollout.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from aer_megatron.sglang.weight_servers import WeightServers

TRANSPORTS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What transports are given; each takes what it needs."""

    folder: Path  # that the servers can read under the same path
    owner: str  # what tells this run from others that use ``folder``: its output folder
    hf_config: Mapping[str, Any]  # content of the model's config.json
    max_shard_bytes: int  # of one safetensors file
    backend: str  # of process groups: "gloo", or "nccl" where trainer and servers have GPUs
    address: str  # of this process, as the servers reach it
    bucket_bytes: int  # of one broadcast or request (a larger tensor travels alone)


class BaseTransport:
    """Takes weights to servers, which are given by their index; used by the leading rank alone."""

    keeps_weights: ClassVar[bool] = False  # so that ``load`` can give them to a server that comes back

    def __init__(self, servers: WeightServers, options: TransportOptions) -> None:
        self._servers = servers
        self._options = options

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]) -> dict[int, str]:
        """Takes the weights to servers, exhausting the stream; returns the reasons of those that did not take them.

        Raises OSError, ValueError or RuntimeError where nobody can have taken them.
        """
        raise NotImplementedError

    def load(self, index: int, version: int) -> None:
        """Has one server load the weights of a version that was sent; raises Untransferred where it does not."""
        raise NotImplementedError

    def forget(self, index: int) -> None:
        """Drops what is held of a server's process, which has ended."""

    def close(self) -> None:
        """Releases what the transport holds."""


def make_transport(name: str, servers: WeightServers, options: TransportOptions) -> BaseTransport:
    """Returns the transport of that name, one of ``TRANSPORTS``."""
    made: BaseTransport = importlib.import_module(f"{__name__}.{name}").Transport(servers, options)
    return made
