"""The command line of training with a fault planted: a resume that forgets the optimizer's moments."""

from __future__ import annotations

import sys
from typing import Any

from aer_megatron import train
from aer_megatron.checkpoint import store as checkpoint

_apply = checkpoint.apply_actor_tensors


def _forget(actor: Any, *arguments: Any) -> None:
    _apply(actor, *arguments)
    for optimizer in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


if __name__ == "__main__":
    checkpoint.apply_actor_tensors = _forget
    sys.exit(train.main(sys.argv[1:]))
