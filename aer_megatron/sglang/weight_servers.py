"""The servers as a weight transfer sees them: what each of them is, and whether it holds exactly what was sent.

A server carries the label of a version only after every checksum agreed; until then its label says "unverified", and no
rank accepts a token of it. So a transfer that fails anywhere leaves a server out of service, never in service with a
mixture. A label names the run, too: what another run has given weights since is that run's server, and refused.

A server that holds weights in another form than the one sent (FP8 or not) is refused: it would take them without a
word, and on a GPU its checksums could not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.replies import Reply, shown
from aer_megatron.sglang.served_weights import by_rank, first_difference, holds_fp8, probe_of_fp8
from aer_megatron.sglang.server import ServerGroup

_LOG = logging.getLogger(__name__)
_CLEANUP_S = 5.0  # for a call after a failure that may fail, too


class Untransferred(Exception):
    """A server that did not take the weights, verified; the message is the reason."""


@dataclass(slots=True)
class Published:
    """What the servers were last given."""

    version: int
    # tp size -> rank -> name -> checksum; may become known while the servers compute theirs
    expected: Future[dict[int, list[dict[str, str]]]] = field(default_factory=Future)
    agreed: dict[int, list[dict[str, str]]] = field(default_factory=dict)  # the same, of the first CUDA server


class WeightServers:
    """The servers of a fleet, each by its index.

    Args:
        fleet: makes the calls.
        arch: of the model that they serve.
        labels: of this run's weights.
        timeout_s: of one call of a transfer.
        fp8: whether projections are sent in blocks of FP8 with their scales.
        group: the servers' processes, where this rank has launched them.
    """

    def __init__(
        self,
        fleet: ServerFleet,
        arch: ModelArchitecture,
        labels: WeightLabels,
        *,
        timeout_s: float,
        fp8: bool,
        group: ServerGroup | None = None,
    ) -> None:
        self.fleet = fleet
        self.arch = arch
        self.labels = labels
        self.timeout_s = timeout_s
        self.fp8 = fp8
        self.indices = range(len(fleet.servers))
        self.tp_size: dict[int, int] = {}
        self.silent: set[int] = set()  # servers that gave no answer to the last call
        self._group = group
        self._is_cpu: dict[int, bool] = {}
        self._owned: set[int] = set()  # servers that carried this run's label

    # -- calls ------------------------------------------------------------------------------------------------------

    def in_parallel(
        self, action: Callable[[int], None], indices: Sequence[int], *, level: int = logging.WARNING
    ) -> dict[int, str]:
        """Returns the reasons of the servers for which ``action`` failed, logged at ``level``."""

        def reason(index: int) -> str:
            self.silent.discard(index)
            try:
                action(index)
            except (Untransferred, RuntimeError) as error:
                if not isinstance(error, Untransferred):
                    self.silent.add(index)
                _LOG.log(level, "server %d does not take weights: %s", index, error)
                return str(error)
            return ""

        if not indices:
            return {}
        with ThreadPoolExecutor(len(indices)) as pool:
            reasons = list(pool.map(reason, indices))
        return {index: text for index, text in zip(indices, reasons, strict=True) if text}

    def control(self, index: int, path: str, body: Mapping[str, Any]) -> Reply:
        """Returns the reply to a call of a transfer, whatever its status."""
        return self.fleet.control(index, path, body, timeout_s=self.timeout_s)

    def post(self, index: int, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the JSON table of a successful call of a transfer; raises Untransferred."""
        return _table(self.control(index, path, body), path)

    def get(self, index: int, path: str) -> Mapping[str, Any]:
        """Returns the JSON table of a successful query; raises Untransferred."""
        return _table(self.fleet.control(index, path), path)

    def try_post(self, index: int, path: str, body: Mapping[str, Any]) -> None:
        """Makes a call whose failure changes nothing any more."""
        try:
            self.fleet.control(index, path, body, timeout_s=_CLEANUP_S)
        except RuntimeError as error:
            _LOG.debug("server %d: %s", index, error)

    def replace(self, index: int) -> None:
        """Has a server that this rank launched run in a new process, soon."""
        if self._group is not None:
            self._group.replace(index)

    # -- what a server is -------------------------------------------------------------------------------------------

    def identify(self, index: int, published: Published | None) -> None:
        """Notes the tensor-parallel size and the device of a server; raises Untransferred where it is not fit."""
        table = self.get(index, "/server_info")
        self.tp_size[index] = self._checked_tp_size(table.get("tp_size"))
        self._is_cpu[index] = table.get("device") == "cpu"
        label = self.get(index, "/model_info").get("weight_version")
        self._check_owner(index, label)
        if published is None or label != self.labels.verified(published.version):
            self._check_form(index)  # it was not checked before

    def _checked_tp_size(self, size: Any) -> int:
        """Returns a server's tensor-parallel size; raises Untransferred for what no server of this model can have."""
        heads = self.arch.num_heads
        size = 1 if size is None else size
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= heads or heads % size:
            raise Untransferred(f"it reports tp_size {shown(size)}, which must divide the model's {heads} heads")
        return size

    def _check_owner(self, index: int, label: Any) -> None:
        """Raises Untransferred for a server that this run gave weights and another one has taken since."""
        if not self.labels.is_foreign(label):
            return
        if index not in self._owned:
            _LOG.warning("server %d served %s, weights of another run; it is this run's now", index, label)
            return
        self.replace(index)  # a launched one is taken back, by a new process
        raise Untransferred(
            f"it serves {shown(label)}, weights of another run (this one is {self.labels.run}): two runs share a "
            "server; give each run servers of its own"
        )

    def _check_form(self, index: int) -> None:
        """Raises Untransferred for a server whose weights are not in the form that it would be sent."""
        fp8 = holds_fp8(self.post(index, "/weights_checker", probe_of_fp8()).get("ranks"))
        if fp8 is None or fp8 == self.fp8:
            return
        where = f"server {index} of: {self.fleet.describe()}"
        if fp8:
            raise Untransferred(
                "rollout.quantization='none' sends weights as they are, but a server holds them in FP8; set "
                f"rollout.quantization='fp8', or start it from an unquantised checkpoint ({where})"
            )
        raise Untransferred(
            "rollout.quantization='fp8' needs servers that were started from an FP8 checkpoint, but one was not; start "
            "it from the folder that aer convert hf-to-fp8 makes of model.path, or set "
            f"rollout.quantization='none' ({where})"
        )

    # -- what it holds ----------------------------------------------------------------------------------------------

    def verify(self, index: int, published: Published) -> None:
        """Labels a server that holds exactly what was sent; raises Untransferred otherwise."""
        # compare checksums; a CUDA server has a hash of its own: then names, and that all such servers agree
        size = self.tp_size[index]
        ranks = self.post(index, "/weights_checker", {"action": "checksum"}).get("ranks")
        expected = published.expected.result()[size]
        difference = first_difference(expected, ranks, names_only=not self._is_cpu[index])
        if not difference and not self._is_cpu[index]:
            difference = first_difference(published.agreed.setdefault(size, by_rank(ranks)), ranks)
        if difference:
            raise Untransferred(f"what it holds is not what was sent: {difference}")
        # label it, and read the label back
        label = self.labels.verified(published.version)
        self.post(index, "/update_weight_version", {"new_version": label, "abort_all_requests": False})
        held = self.get(index, "/model_info").get("weight_version")
        if held != label:
            raise Untransferred(f"it reports weight version {shown(held)} after {label!r} was set")
        self._owned.add(index)

    def carries(self, index: int, published: Published | None) -> bool:
        """Returns whether a server is labelled with the published version."""
        if published is None:
            return False
        return bool(self.get(index, "/model_info").get("weight_version") == self.labels.verified(published.version))


def _table(reply: Reply, path: str) -> Mapping[str, Any]:
    table = reply.json()
    if reply.status != 200 or not isinstance(table, Mapping) or table.get("success") is False:
        raise Untransferred(f"{path} answers {reply.status}: {reply.text}")
    return table
