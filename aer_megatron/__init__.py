"""AER-Megatron: RLVR training with adaptive entropy regularization on Megatron-Core."""

__version__ = "0.2.0"
