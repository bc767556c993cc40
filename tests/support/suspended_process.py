"""A process under the hang watchdog, to be suspended by a test: ``suspended_process TIMEOUT_S KIND``.

It says "waits" and stays in one place until it reads a line, as a rank in a collective, whose peers are suspended, too.
KIND "moves": it is never long in one place, and says "done"; "hangs": it moves for a while and then stays; "held": a
C call keeps the interpreter to itself.
"""

from __future__ import annotations

import functools
import sys
import time

from aer_megatron.parallel import watchdog
from aer_megatron.parallel.watchdog import Watchdog

MOVES = 40


def main(timeout_s: float, kind: str) -> None:
    watchdog._SECOND_LINE_S = 1.0
    say = functools.partial(print, file=sys.stderr, flush=True)
    with Watchdog(rank=0, num_ranks=1, timeout_s=timeout_s, say=say, store=None, advice=lambda: "none") as watched:
        watched.enter_phase("rollout", 0)
        print("waits", flush=True)
        sys.stdin.readline()
        for number in range(MOVES):
            watched.enter_phase("train", number)
            time.sleep(timeout_s / 20)
        if kind == "hangs":
            time.sleep(3600)
        if kind == "held":
            print(9**999_999_999, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
