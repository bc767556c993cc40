"""Weight transport to an engine in the same process, verified tensor by tensor.

The engine keeps the new weights beside the old ones; they go into service only after the checksum of every tensor sent
equals the checksum of what the engine received. A failure at any point leaves the old weights whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from aer_megatron.convert.fp8_weights import iter_rounded_weights
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.rollout.embedded import EmbeddedEngine


class InProcessSync:
    """Publishes policy weights to an engine of this process.

    Args:
        engine: receives the weights.
        fp8: the engine is given the values that projections have in blocks of FP8, in the model's dtype.
    """

    def __init__(self, engine: EmbeddedEngine, *, fp8: bool) -> None:
        self._engine = engine
        self._fp8 = fp8

    def publish(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Puts the tensors into service as policy ``version``; they are streamed, one at a time.

        Memory: the engine holds its old and its new weights until this returns.

        Raises:
            ValueError: the engine refuses a name, shape or dtype.
            RuntimeError: the engine holds something else than what was sent (the first such tensor is named),
                or reports another version. In every case but the last the old weights are still in service,
                whole.
        """
        sent: dict[str, int] = {}
        if self._fp8:
            named_tensors = iter_rounded_weights(named_tensors)
        try:
            held = self._engine.receive_weights(self._metered(named_tensors, sent))
            self._verify(sent, held)
            self._engine.commit_weights(version)
        finally:
            self._engine.discard_weights()
        if self._engine.policy_version != version:
            raise RuntimeError(
                f"weight sync: the engine reports policy version {self._engine.policy_version} after version "
                f"{version} was committed; restart the engine"
            )

    def suspend(self) -> None:
        """Does nothing: the engine's memory is the trainer's."""

    def _metered(
        self, named_tensors: Iterable[tuple[str, Tensor]], sent: dict[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors:
            sent[name] = tensor_checksum(tensor)
            yield name, tensor

    def _verify(self, sent: Mapping[str, int], held: Mapping[str, int]) -> None:
        for name, value in sent.items():
            if held.get(name) != value:
                found = f"{held[name]:#018x}" if name in held else "nothing"
                raise RuntimeError(
                    f"weight sync: tensor {name!r} was sent with checksum {value:#018x} but the engine holds "
                    f"{found}; policy version {self._engine.policy_version} stays in service"
                )
        extra = [name for name in held if name not in sent]
        if extra:
            raise RuntimeError(f"weight sync: the engine reports tensor {extra[0]!r}, which was never sent")
