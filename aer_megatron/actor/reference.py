"""A frozen copy of the policy's weights that takes their place while the reference policy is scored.

The copy is this rank's shard, in host memory; there is no second model, no second set of activations and no optimizer
state. Works for every layout, because a shard changes places with a shard of the same shape.

This file does NOT know where weights come from or what they are scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ReferenceWeights:
    """The weights that ``load`` writes into ``parameters``, which have their own back when the constructor returns."""

    def __init__(self, parameters: Iterable[Tensor], load: Callable[[], None]) -> None:
        self._parameters = list(parameters)
        self._held = [
            torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
            for parameter in self._parameters
        ]
        with torch.no_grad():
            for parameter, held in zip(self._parameters, self._held, strict=True):
                held.copy_(parameter)
        try:
            load()
        finally:
            self._exchange()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Returns a context in which the model has the reference weights; afterwards its own, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, held in zip(self._parameters, self._held, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(held)
            held.copy_(current)
