"""The accelerators that a plan can be made for: data-sheet figures, one record each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator in its usual 8-way node; bandwidths are per GPU and direction. Example: ``gpu_named("h100")``."""

    name: str
    memory_bytes: float
    bf16_flops: float  # dense, per second
    memory_bandwidth: float  # bytes per second
    nvlink_bandwidth: float  # bytes per second, inside a node
    network_bandwidth: float  # bytes per second, between nodes
    gpus_per_node: int


# NVIDIA's data sheets; a data sheet's NVLink figure adds both directions, its tensor-core figure assumes sparsity, so
# both are halved here. Network: one adapter per GPU, as the DGX system of that generation has it.
#   A100 80GB SXM  data sheet: 312 TFLOPS dense, 2,039 GB/s, NVLink 600 GB/s;       DGX A100: 8 x 200 Gb/s
#   H100 SXM       data sheet: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s;     DGX H100: 8 x 400 Gb/s
#   H200 SXM       data sheet: 1,979 TFLOPS sparse, 4.8 TB/s, NVLink 900 GB/s;      DGX H200: 8 x 400 Gb/s
#   B200 SXM       DGX B200: 36 PFLOPS sparse, 1,440 GB, 64 TB/s, NVLink 14.4 TB/s over 8 GPUs; 8 x 400 Gb/s
GPUS = (
    Gpu("a100", 80e9, 312e12, 2.039e12, 300e9, 25e9, 8),
    Gpu("h100", 80e9, 989.4e12, 3.35e12, 450e9, 50e9, 8),
    Gpu("h200", 141e9, 989.4e12, 4.8e12, 450e9, 50e9, 8),
    Gpu("b200", 180e9, 2250e12, 8.0e12, 900e9, 50e9, 8),
)


def gpu_of_device(name: str) -> Gpu | None:
    """Returns the data sheet of a device by CUDA's name for it, such as "NVIDIA H100 80GB HBM3"; None = not known.

    PCIe and NVL cards of these names are slower than the modules above, so they count as unknown.
    """
    words = name.lower().replace("-", " ").split()
    if {"pcie", "nvl"} & set(words):
        return None
    return next((gpu for gpu in GPUS if gpu.name in words), None)


def gpu_named(name: str) -> Gpu:
    """Returns the accelerator of that name, in any case. Raises ValueError naming the known ones."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise ValueError(f"--gpu={name} is not known; use one of {', '.join(gpu.name for gpu in GPUS)}")
