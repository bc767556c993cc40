"""Megatron-Core's distributed AdamW and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from aer_megatron.actor.model import TORCH_DTYPES, PolicyModel
from aer_megatron.options.training import OptimizerSection


def learning_rate(step: int, num_steps: int, options: OptimizerSection) -> float:
    """Returns the learning rate of optimizer step ``step`` (from 0) of ``num_steps``: warm-up, then the decay."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.decay == "constant":
        return options.lr
    span = max(1, num_steps - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / span)
    share = 1.0 - progress if options.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr + (options.lr - options.min_lr) * share


def wrap_distributed(chunks: Sequence[PolicyModel]) -> list[DistributedDataParallel]:
    """Returns the model chunks under Megatron's data parallelism, gradients kept and added in fp32."""
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,
    )
    wrapped = [DistributedDataParallel(config=chunk.config, ddp_config=options, module=chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(chunks: Sequence[DistributedDataParallel], options: OptimizerSection, dtype: str) -> Any:
    """Returns Megatron's distributed optimizer over ``chunks``; clip_grad = 0 still measures the norm."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        bf16=dtype == "bf16",
        params_dtype=TORCH_DTYPES[dtype],
        use_distributed_optimizer=True,
        clip_grad=options.clip_grad or math.inf,
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    for group in optimizer.param_groups:
        # Megatron leaves this to its scheduler, which is not used here: norms and biases have wd_mult 0
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    return optimizer


def gradient_norm(optimizer: Any) -> float:
    """Returns the global norm of the gradients in the buffers, the same on every rank; no weight has moved yet.

    Megatron's own ``step`` looks at no number: with fp32 and bf16 there is no loss scaling, so it applies NaN as it is.
    """
    return math.inf if optimizer.prepare_grads() else float(optimizer.get_grad_norm())


def apply_gradients(optimizer: Any, norm: float) -> None:
    """Clips the gradients by ``norm``, which ``gradient_norm`` gave, and takes the optimizer step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    if not optimizer.step_with_ready_grads():
        raise RuntimeError("Megatron-Core's optimizer refused a step whose gradients are finite")
