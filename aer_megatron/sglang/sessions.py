"""What the transports that stream weights into a server have in common: its update session.

Servers from 0.5.21 load only between /begin_weight_update and /end_weight_update; older ones answer 404 to it and need
none. A transfer that fails leaves no session open, as far as the server still answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from aer_megatron.sglang.buckets import Bucket, buckets
from aer_megatron.sglang.transports import BaseTransport, TransportOptions
from aer_megatron.sglang.weight_servers import Untransferred, WeightServers


class SessionTransport(BaseTransport):
    """A transport whose servers load buckets inside a session. Nothing is kept of the weights."""

    def __init__(self, servers: WeightServers, options: TransportOptions) -> None:
        super().__init__(servers, options)
        self._has_sessions: dict[int, bool] = {}

    def send(self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]) -> dict[int, str]:
        """Streams the weights, a bucket at a time; the next one is made while one is under way."""
        label = self._servers.labels.unverified(version)
        refused = self._servers.in_parallel(self._begin, indices)

        def give(bucket: Bucket, prepared: Any) -> dict[int, str]:
            fields = {"load_format": "flattened_bucket", "flush_cache": True, "weight_version": label}
            alive = [index for index in indices if index not in refused]
            return self._servers.in_parallel(lambda index: self._load(index, bucket, prepared, fields), alive)

        with ThreadPoolExecutor(1, thread_name_prefix="weight-transfer") as sender:
            under_way: Future[dict[int, str]] | None = None
            for bucket in buckets(named_tensors, self._options.bucket_bytes):
                prepared = self._prepared(bucket)
                refused |= under_way.result() if under_way else {}
                under_way = sender.submit(give, bucket, prepared)
            refused |= under_way.result() if under_way else {}
        refused |= self._servers.in_parallel(self._end, [index for index in indices if index not in refused])
        for index in refused:
            self._abandon(index)
        return refused

    def _prepared(self, bucket: Bucket) -> Any:
        """Returns what ``_load`` needs of a bucket and is the same for every server."""
        return None

    def _load(self, index: int, bucket: Bucket, prepared: Any, fields: dict[str, Any]) -> None:
        """Has a server load a bucket; ``fields`` belong into the body of its call. Raises Untransferred."""
        raise NotImplementedError

    def _begin(self, index: int) -> None:
        """Begins a session where the server has them; one that was left open is ended first."""
        reply = self._servers.control(index, "/begin_weight_update", {})
        if reply.status == 400:
            self._servers.control(index, "/end_weight_update", {})
            reply = self._servers.control(index, "/begin_weight_update", {})
        self._has_sessions[index] = reply.status != 404
        if reply.status not in (200, 404):
            raise Untransferred(f"/begin_weight_update answers {reply.status}: {reply.text}")

    def _end(self, index: int) -> None:
        if self._has_sessions[index]:
            self._servers.post(index, "/end_weight_update", {})

    def _abandon(self, index: int) -> None:
        """Ends the session of a server that failed, as far as it answers."""
        if self._has_sessions.get(index):
            self._servers.try_post(index, "/end_weight_update", {})
