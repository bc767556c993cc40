"""What every weight transport to servers has in common: who leads, what is verified, which servers may serve.

    withdraw all -> transfer -> checksum of every tensor -> version label -> serve

A server carries the label of a version only after every checksum agreed; until then its label says "unverified", and no
rank accepts a token of it. So a transfer that fails anywhere leaves a server out of service, never in service with a
mixture. One rank leads; the others take part in gathering the weights and are told the outcome. Where no server answers
at all, the leader waits for one to come back.

FP8 is made here, of whole tensors. A server that holds weights in another form than the one sent is refused: it would
take them without a word, and on a GPU its checksums could not tell.

A label names the run, too. What another run has given weights since is that run's server, and refused from then on.

This file does NOT know how bytes travel: transports give ``_send`` and ``_resend``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.fp8_weights import iter_fp8_weights
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.metering import Meter
from aer_megatron.sglang.protocol import WeightLabels
from aer_megatron.sglang.replies import Reply
from aer_megatron.sglang.served_weights import ServedChecksums, by_rank, first_difference, holds_fp8, probe_of_fp8

_LOG = logging.getLogger(__name__)
_RECOVERY_POLL_S = 0.5
_IDLE_S = 30.0  # how long a server may take to finish what it was asked


class Untransferred(Exception):
    """A server that did not take the weights, verified; the message is the reason."""


@dataclass(frozen=True, slots=True)
class SyncContext:
    """What every transport is given."""

    arch: ModelArchitecture
    labels: WeightLabels
    timeout_s: float  # of one transfer call
    recovery_s: float  # how long a transfer waits when no server answers
    leads: bool  # whether this rank talks to the servers
    exchange: Callable[[Any], list[Any]]  # a JSON value -> every rank's
    replace: Callable[[int], None]  # has a server restarted that answered garbage
    max_unhashed_bytes: int  # tensors that were sent and wait for their checksum
    fp8: bool  # projections are sent in blocks of FP8 with their scales


@dataclass(slots=True)
class Published:
    """What the servers were last given."""

    version: int
    # tp size -> rank -> name -> checksum; may become known while the servers compute theirs
    expected: Future[dict[int, list[dict[str, str]]]] = field(default_factory=Future)
    agreed: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # the same, of the first CUDA server


class ServerSync:
    """Publishes policy weights to the servers of a fleet; subclasses are the transports."""

    def __init__(self, fleet: ServerFleet, context: SyncContext) -> None:
        self._fleet = fleet
        self._context = context
        self._lock = threading.Lock()  # between publishing and restoring a restarted server
        self._published: Published | None = None
        self._tp_size: dict[int, int] = {}
        self._is_cpu: dict[int, bool] = {}
        self._released: set[int] = set()  # servers without their memory
        self._owned: set[int] = set()  # servers that carried this run's label
        self._silent: set[int] = set()  # servers that gave no answer to the last call

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Puts the tensors into service as policy ``version``: ``transfer``."""
        self.transfer(named_tensors, version)

    def transfer(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> Mapping[str, int]:
        """Returns the checksum of every parameter that the servers now serve as policy ``version``, by their names.

        Every rank calls it with the same stream of tensors. Servers that did not take the weights are out of service.

        Raises:
            RuntimeError: on every rank, if no server took them, or the weights could not be written or gathered.
        """
        with self._lock:
            self._fleet.withdraw(f"policy version {version} is being transferred")
            self._report_distrusted()
            outcome: dict[str, Any] = {}
            if self._context.leads:
                outcome = self._lead(iter(named_tensors), version)
            else:
                for _ in named_tensors:
                    pass
            outcome = self._context.exchange(outcome)[0]
            if "error" in outcome:
                raise RuntimeError(f"weight transfer of policy version {version}: {outcome['error']}")
            self._fleet.serve(version, {int(index): reason for index, reason in outcome["refused"].items()})
            return {name: int(value, 16) for name, value in outcome["checksums"].items()}

    def restore(self, index: int) -> None:
        """Gives the last published weights to a server that lost them; RuntimeError where it does not take them."""
        with self._lock:
            if self._published is None:
                return  # the first publication is still to come
            try:
                if not self._carries(index, self._published):  # a publication may have reached it first
                    self._released.discard(index)
                    self._resend(index, self._published)
            except Untransferred as error:
                raise RuntimeError(f"server {index}: {error}") from None

    def suspend(self) -> None:
        """Has the servers give their memory back until the next transfer; every rank calls it, and none generates.

        A server that cannot is out of service and replaced.
        """
        with self._lock:
            self._fleet.withdraw("its memory is released for training")
            self._context.exchange(None)  # no rank has a request under way any more
            if self._context.leads:
                for index in self._in_parallel(self._release, [i for i in self._all() if self._fleet.may_transfer(i)]):
                    self._context.replace(index)

    def close(self) -> None:
        """Releases what the transport holds."""

    # -- transports -------------------------------------------------------------------------------------------------

    def _send(
        self, named_tensors: Iterator[tuple[str, Tensor]], version: int, indices: Sequence[int]
    ) -> dict[int, str]:
        """Takes the weights to servers, exhausting the stream; returns the reasons of those that did not take them.

        Raises OSError, ValueError or RuntimeError where nobody can have taken them.
        """
        raise NotImplementedError

    def _resend(self, index: int, published: Published) -> None:
        """Takes the published weights to one server and verifies them; raises Untransferred."""
        raise NotImplementedError

    # -- shared -----------------------------------------------------------------------------------------------------

    def _report_distrusted(self) -> None:
        """Has the leader look after the servers that any rank caught with garbage: it sees them restarted."""
        reports = self._context.exchange([i for i in self._all() if not self._fleet.may_transfer(i)])
        for index in {index for report in reports for index in report}:
            if self._context.leads:
                self._fleet.require_restart(index)
                self._context.replace(index)
            else:
                self._fleet.allow_transfer(index)  # it is out of service until the leader has verified it

    def _lead(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        published = Published(version)
        try:
            refused = self._attend()
            indices = [i for i in self._all() if i not in refused]
            if not indices:
                raise RuntimeError(f"no server can take weights: {refused}")
            sizes = {self._tp_size[i] for i in indices}
            digests = {size: ServedChecksums(self._context.arch, tp_size=size) for size in sorted(sizes)}

            def add(name: str, tensor: Tensor) -> None:
                for digest in digests.values():
                    digest.add(name, tensor)

            def finish() -> dict[int, list[dict[str, str]]]:
                meter.finish()
                return {size: digest.result() for size, digest in digests.items()}

            sent = iter_fp8_weights(named_tensors) if self._context.fp8 else named_tensors
            with Meter(add, max_bytes=self._context.max_unhashed_bytes) as meter, ThreadPoolExecutor(1) as pool:
                refused |= self._send(meter.stream(sent), version, indices)
                published.expected = pool.submit(finish)
                indices = [i for i in indices if i not in refused]
                refused |= self._in_parallel(lambda index: self._verify(index, published), indices)
                published.expected.result()
            if len(refused) == len(self._fleet.servers) and self._silent:
                refused = self._send_later(published)
        except (OSError, ValueError, RuntimeError) as error:
            return {"error": str(error)}
        finally:
            for _ in named_tensors:  # the other ranks gather until the stream ends
                pass
        if len(refused) == len(self._fleet.servers):
            return {"error": f"no server took the weights: {refused}"}
        self._published = published
        return {"refused": refused, "checksums": next(iter(published.expected.result().values()))[0]}

    def _attend(self) -> dict[int, str]:
        """Returns the reasons of the servers that cannot take weights now; waits while none can."""
        return self._repeat(self._awaken)

    def _send_later(self, published: Published) -> dict[int, str]:
        """Returns the reasons of the servers that did not take the weights after all of them were lost meanwhile."""
        return self._repeat(lambda index: self._resend(index, published))

    def _repeat(self, action: Callable[[int], None]) -> dict[int, str]:
        """Returns the reasons of the servers for which ``action`` failed; repeats while none answers at all."""
        deadline = time.monotonic() + self._context.recovery_s
        level = logging.WARNING
        while True:
            distrusted = {
                i: "it answered garbage and was not restarted" for i in self._all() if not self._fleet.may_transfer(i)
            }
            indices = [i for i in self._all() if i not in distrusted]
            refused = distrusted | self._in_parallel(action, indices, level=level)
            awaited = self._silent or distrusted
            if len(refused) < len(self._fleet.servers) or not awaited or time.monotonic() > deadline:
                return refused
            level = logging.DEBUG
            time.sleep(_RECOVERY_POLL_S)

    def _all(self) -> range:
        return range(len(self._fleet.servers))

    def _in_parallel(
        self, action: Callable[[int], None], indices: Sequence[int], *, level: int = logging.WARNING
    ) -> dict[int, str]:
        """Returns the reasons of the servers for which ``action`` failed, logged at ``level``."""

        def reason(index: int) -> str:
            self._silent.discard(index)
            try:
                action(index)
            except (Untransferred, RuntimeError) as error:
                if not isinstance(error, Untransferred):
                    self._silent.add(index)
                _LOG.log(level, "server %d does not take weights: %s", index, error)
                return str(error)
            return ""

        if not indices:
            return {}
        with ThreadPoolExecutor(len(indices)) as pool:
            reasons = list(pool.map(reason, indices))
        return {index: text for index, text in zip(indices, reasons, strict=True) if text}

    def _release(self, index: int) -> None:
        # a server that is not idle would end itself
        idle = self._fleet.control(index, f"/flush_cache?timeout={_IDLE_S:g}", {}, timeout_s=2 * _IDLE_S)
        if idle.status != 200:
            raise Untransferred(f"it is not idle: {idle.text}")
        self._memory(index, "/release_memory_occupation")
        self._released.add(index)

    def _awaken(self, index: int) -> None:
        """Gives a server its memory back, if it is still the process that released it."""
        if index in self._released:
            if self._published is not None and self._carries(index, self._published):
                self._memory(index, "/resume_memory_occupation")
            self._released.discard(index)
        self._learn(index)

    def _memory(self, index: int, path: str) -> None:
        reply = self._fleet.control(index, path, {}, timeout_s=self._context.timeout_s)
        if reply.status != 200:
            raise Untransferred(f"{path} answers {reply.status}: {reply.text}")

    def _learn(self, index: int) -> None:
        """Notes the tensor-parallel size and the device of a server; raises Untransferred where it is not fit."""
        table = self._get(index, "/server_info")
        self._tp_size[index] = self._checked_tp_size(table.get("tp_size"))
        self._is_cpu[index] = table.get("device") == "cpu"
        label = self._get(index, "/model_info").get("weight_version")
        self._check_owner(index, label)
        if self._published is None or label != self._context.labels.verified(self._published.version):
            self._check_form(index)  # it was not checked before

    def _checked_tp_size(self, size: Any) -> int:
        """Returns a server's tensor-parallel size; raises Untransferred for what no server of this model can have."""
        heads = self._context.arch.num_heads
        size = 1 if size is None else size
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= heads or heads % size:
            raise Untransferred(f"it reports tp_size {_shown(size)}, which must divide the model's {heads} heads")
        return size

    def _check_owner(self, index: int, label: Any) -> None:
        """Raises Untransferred for a server that this run gave weights and another one has taken since."""
        if not self._context.labels.is_foreign(label):
            return
        if index not in self._owned:
            _LOG.warning("server %d served %s, weights of another run; it is this run's now", index, label)
            return
        self._context.replace(index)  # a launched one is taken back, by a new process
        raise Untransferred(
            f"it serves {_shown(label)}, weights of another run (this one is {self._context.labels.run}): two runs "
            "share a server; give each run servers of its own"
        )

    def _check_form(self, index: int) -> None:
        """Raises Untransferred for a server whose weights are not in the form that it would be sent."""
        fp8 = holds_fp8(self._post(index, "/weights_checker", probe_of_fp8()).get("ranks"))
        if fp8 is None or fp8 == self._context.fp8:
            return
        where = f"server {index} of: {self._fleet.describe()}"
        if fp8:
            raise Untransferred(
                "rollout.quantization='none' sends weights as they are, but a server holds them in FP8; set "
                f"rollout.quantization='fp8', or start it from an unquantised checkpoint ({where})"
            )
        raise Untransferred(
            "rollout.quantization='fp8' needs servers that were started from an FP8 checkpoint, but one was not; start "
            "it from the folder that tools/convert_hf_to_fp8.py makes of model.path, or set "
            f"rollout.quantization='none' ({where})"
        )

    def _verify(self, index: int, published: Published) -> None:
        """Labels a server that holds exactly what was sent; raises Untransferred otherwise."""
        size = self._tp_size[index]
        ranks = self._post(index, "/weights_checker", {"action": "checksum"}).get("ranks")
        expected = published.expected.result()[size]
        is_our_hash = self._is_cpu[index]
        difference = first_difference(expected, ranks, names_only=not is_our_hash)
        if not difference and not is_our_hash:  # all that can be asked beside the names is that the servers agree
            difference = first_difference(published.agreed.setdefault(size, by_rank(ranks)), ranks)
        if difference:
            raise Untransferred(f"what it holds is not what was sent: {difference}")
        label = self._context.labels.verified(published.version)
        self._post(index, "/update_weight_version", {"new_version": label, "abort_all_requests": False})
        held = self._get(index, "/model_info").get("weight_version")
        if held != label:
            raise Untransferred(f"it reports weight version {_shown(held)} after {label!r} was set")
        self._owned.add(index)

    def _carries(self, index: int, published: Published) -> bool:
        """Returns whether a server is labelled with the published version."""
        label = self._context.labels.verified(published.version)
        return bool(self._get(index, "/model_info").get("weight_version") == label)

    def _post(self, index: int, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the JSON table of a successful call; raises Untransferred."""
        return _checked(self._fleet.control(index, path, body, timeout_s=self._context.timeout_s), path)

    def _get(self, index: int, path: str) -> Mapping[str, Any]:
        return _checked(self._fleet.control(index, path), path)


def _shown(value: Any) -> str:
    """Returns a value that a server reported for a message, short whatever it is."""
    if isinstance(value, (str, int, float)):
        return ascii(value)[:80]
    return f"a {type(value).__name__}"


def _checked(reply: Reply, path: str) -> Mapping[str, Any]:
    table = reply.json()
    if reply.status != 200 or not isinstance(table, Mapping) or table.get("success") is False:
        raise Untransferred(f"{path} answers {reply.status}: {reply.text}")
    return table
