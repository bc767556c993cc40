"""The two flat collectives under the names that the installed torch does not warn about."""

from __future__ import annotations

import torch.distributed as dist

# torch 2.13 renamed both; the old names warn where the new ones exist
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
