"""Two ranks under the hang watchdog; one of them sleeps in front of a collective. Run by a launcher from a test:

    aer launch --nproc 2 -m tests.support.hanging_ranks TIMEOUT_S KIND

KIND "sleep": rank 1 sleeps while rank 0 waits; "late": rank 1 has just begun its sleep when rank 0's time is up;
"none": nobody hangs.
"""

from __future__ import annotations

import functools
import sys
import time

import numpy as np
import torch

from aer_megatron.parallel.exchange import all_gather_ragged
from aer_megatron.parallel.platform import initialize_process_group, install_platform
from aer_megatron.parallel.watchdog import Watchdog, distributed_store
from aer_megatron.report.timer import PhaseTimer


def sleep_in_front_of_the_collective(seconds: float) -> None:
    time.sleep(seconds)


def main(timeout_s: float, kind: str) -> None:
    platform = install_platform()
    initialize_process_group(platform)
    watchdog = Watchdog(
        rank=platform.rank,
        num_ranks=platform.world_size,
        timeout_s=timeout_s,
        say=functools.partial(print, file=sys.stderr, flush=True),
        store=distributed_store(),
        advice=lambda: "the newest checkpoint is step_00000004",
    )
    with watchdog:
        timer = PhaseTimer(on_phase=watchdog.enter_phase, first_step=7)
        for _ in range(2):
            with timer.phase("reward"):
                all_gather_ragged(np.arange(3), device=torch.device("cpu"))
            timer.take()
        if platform.rank == 1 and kind == "late":
            for _ in range(10):  # busy, and alive
                with timer.phase("rollout"):
                    time.sleep(timeout_s * 0.07)
        with timer.phase("score"):
            if platform.rank == 1 and kind != "none":
                sleep_in_front_of_the_collective(100 * timeout_s)
            all_gather_ragged(np.arange(3), device=torch.device("cpu"))
        if kind == "none":  # quiet for longer than the timeout in all, but never in one place
            for _ in range(4):
                with watchdog.waiting("a short call"):
                    time.sleep(timeout_s * 0.4)
    torch.distributed.destroy_process_group()
    print(f"rank {platform.rank} is done")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
