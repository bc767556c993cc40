"""Checkpoint tensors inside the parameters of a transformers module, where the two are not one to one.

From version 5 on, transformers keeps the experts of a layer in two joined parameters; checkpoints, servers and the
weight stream have them expert by expert. This file does NOT import transformers.
"""

from __future__ import annotations

from torch import Tensor

# a joined parameter's last name -> what each expert's slice of it is made of, along its rows
_JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def checkpoint_views(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Returns the checkpoint tensors that make up a parameter, as contiguous views of it, by their checkpoint names.

    Example: ``...mlp.experts.down_proj`` [E, H, I] holds E times ``...mlp.experts.{e}.down_proj.weight`` [H, I];
    ``model.norm.weight`` holds itself.
    """
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts") or last not in _JOINED:
        return {name: parameter}
    return {
        f"{prefix}.{expert}.{part}.weight": view
        for expert, joined in enumerate(parameter)
        for part, view in zip(_JOINED[last], joined.chunk(len(_JOINED[last])), strict=True)
    }
