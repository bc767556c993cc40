"""The device under Megatron-Core: CUDA as it is, or the CPU over gloo.

Megatron-Core hard-codes ``device="cuda"`` in factory calls, ``torch.cuda`` for streams and random state, and
tensor type names. ``install_platform`` redirects those to the CPU, once, when no CUDA device is present, so that the
unmodified library trains over gloo and the code above this module need not know the device; kernels choose by their
tensors' one. With a CUDA device it changes nothing.

Commands that run the model call it, and tests; never an import.
This file does NOT know models, groups or configuration.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SPARE_WEIGHT_BYTES = 1250 * 10**6
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


@dataclass(frozen=True, slots=True)
class Platform:
    """What the run stands on. Example on a laptop: ``Platform("cpu", "gloo", rank=0, world_size=2, local_rank=0)``."""

    device_type: str
    backend: str
    rank: int
    world_size: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type, self.local_rank) if self.device_type == "cuda" else torch.device("cpu")

    @property
    def spare_weight_bytes(self) -> int:
        """Bytes of weights that may be kept for a while beside the model; a device has less to spare than a host."""
        return _SPARE_WEIGHT_BYTES // (8 if self.device_type == "cuda" else 1)


def install_platform() -> Platform:
    """Returns the platform of this process and prepares torch for it; idempotent.

    Ranks come from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK); without it the process is rank 0 of 1.

    Raises:
        ValueError: the environment is incomplete or contradicts itself, or names a device that is not there.
    """
    rank, world_size, local_rank = read_ranks()
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if local_rank >= devices:
            raise ValueError(
                f"LOCAL_RANK={local_rank}, but this process sees {devices} CUDA devices, numbered from 0; start "
                f"at most {devices} ranks on this machine, or look at CUDA_VISIBLE_DEVICES"
            )
        if world_size > 1 and devices > 1 and "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"LOCAL_RANK is not set, but WORLD_SIZE={world_size} and {devices} CUDA devices are visible: every "
                "rank would take the first one; set it to the rank's number on its machine"
            )
        torch.cuda.set_device(local_rank)
        return Platform("cuda", "nccl", rank, world_size, local_rank)
    _redirect_cuda_to_cpu()
    return Platform("cpu", "gloo", rank, world_size, local_rank)


def free_memory_bytes(platform: Platform) -> int:
    """Returns the bytes that this rank may still take: of its device, or its share of the machine's memory."""
    if platform.device_type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // platform.world_size


def read_ranks() -> tuple[int, int, int]:
    """Returns (rank, world size, local rank) of the launcher's environment; (0, 1, 0) without it.

    Raises:
        ValueError: a variable is no number or out of range, or one of those that belong together is missing.
    """
    remedy = "start ranks with aer launch, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each"
    missing = "is not; unset it for a process on its own, else " + remedy
    values = {name: _number_of(name, remedy) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    world_size = values["WORLD_SIZE"]
    if world_size is None:
        for name in ("RANK", "LOCAL_RANK"):
            if values[name] is not None:
                raise ValueError(f"{name}={values[name]} is set, but WORLD_SIZE {missing}")
        return 0, 1, 0
    if world_size == 0:
        raise ValueError(f"WORLD_SIZE=0 must be at least 1; {remedy}")
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ValueError(f"WORLD_SIZE={world_size} is set, but {name} {missing}")
        if not 0 < (_number_of("MASTER_PORT", remedy) or 0) < 65536:
            raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} must lie between 1 and 65535; {remedy}")
    rank, local_rank = values["RANK"] or 0, values["LOCAL_RANK"] or 0
    if rank >= world_size:
        raise ValueError(f"RANK={rank} must be below WORLD_SIZE={world_size}: ranks are counted from 0; {remedy}")
    name = "WORLD_SIZE" if values["LOCAL_WORLD_SIZE"] is None else "LOCAL_WORLD_SIZE"
    if local_rank >= (values[name] or 0):
        raise ValueError(f"LOCAL_RANK={local_rank} must be below {name}={values[name]}: it counts the machine's ranks")
    return rank, world_size, local_rank


def _number_of(name: str, remedy: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{name}={text!r} must be a whole number, 0 or more; {remedy}")
    return int(text)


def job_id() -> str | None:
    """Returns the scheduler's name of this job, as ``SLURM_JOB_ID 4711``; None outside of one."""
    return next((f"{name} {os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name)), None)


def initialize_process_group(platform: Platform, *, init_method: str | None = None, timeout_s: float = 600.0) -> None:
    """Joins the default process group of ``platform``; a single process gets a private one, without a socket."""
    import datetime

    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    if init_method is None and platform.world_size == 1:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    torch.distributed.init_process_group(
        platform.backend, init_method=init_method, rank=platform.rank, world_size=platform.world_size, timeout=timeout
    )


def set_collective_timeout(timeout_s: float) -> None:
    """Gives the default process group another limit for one collective than the one that it was joined with."""
    import datetime

    if torch.distributed.get_world_size() > 1:
        torch.distributed.distributed_c10d._set_pg_timeout(
            datetime.timedelta(seconds=timeout_s), torch.distributed.group.WORLD
        )


# Everything below exists only where no CUDA device is present.

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CpuForCuda(TorchFunctionMode):
    """Maps a CUDA device argument to the CPU in every torch call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs and kwargs.get("pin_memory"):  # nothing is copied to a device, so nothing is pinned
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer compares the type's name with its CUDA spelling
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NullStream:
    """Stands for a CUDA stream or event where everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, stream: Any) -> None:
        del stream

    def wait_event(self, event: Any) -> None:
        del event

    def record(self, stream: Any = None) -> None:
        del stream

    def record_event(self, event: Any = None) -> _NullStream:
        del event
        return self

    def wait(self, stream: Any = None) -> None:
        del stream

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _null_stream_context(stream: Any) -> Iterator[None]:
    del stream
    yield


def _set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(state)


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    del device, clone, graph_safe
    return torch.get_rng_state()


@functools.cache
def _redirect_cuda_to_cpu() -> None:
    """Installs the redirection for the life of the process (cached: a second call does nothing)."""
    _CpuForCuda().__enter__()
    cuda = torch.cuda
    null = _NullStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": _NullStream,
        "Event": _NullStream,
        "current_stream": lambda device=None: null,
        "default_stream": lambda device=None: null,
        "stream": _null_stream_context,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]

    # imported after the redirection: the module reads torch.cuda while it is imported
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    recompute = megatron_random.CheckpointFunction.backward

    def recompute_on_cpu(ctx: Any, *grads: Any) -> Any:
        with _CpuForCuda():  # torch leaves function modes out of a backward pass
            return recompute(ctx, *grads)

    megatron_random.CheckpointFunction.backward = staticmethod(recompute_on_cpu)


@functools.cache
def redirect_experts_to_cpu() -> None:
    """Has Megatron-Core's expert layers run without a device; does nothing where one is present.

    The token dispatcher turns split sizes into NumPy arrays on their way off the device and hands them to
    torch.distributed, which takes no tensors; the router's product is TransformerEngine's where that is installed; and
    parts of unequal size, which tensor-parallel experts exchange, are nothing that gloo gathers or scatters.
    """
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        del record_stream
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # gloo moves parts of one size: they are padded to the largest, or reduced whole and cut
    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(own: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather_equal(own, group, output_split_sizes, use_global_buffer)
        padded = own.new_zeros(int(max(output_split_sizes)), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[: int(size)] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter(whole: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter_equal(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter
    moe_utils.te_general_gemm = None
