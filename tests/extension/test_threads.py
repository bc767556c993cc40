"""Threads that share one ledger: nothing is lost, nothing is torn, and the GIL is free meanwhile."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aer_megatron._C import DifficultyLedger

PROMPTS = np.arange(512, dtype=np.uint64)
ONE = np.ones(512, dtype=np.int64)


def add_once(ledger: DifficultyLedger) -> None:
    ledger.update(PROMPTS, 2 * ONE, ONE, np.full(512, 0.1), 3 * ONE, step=4)


def test_concurrent_updates_lose_nothing_and_equal_a_serial_run() -> None:
    shared, serial = DifficultyLedger(0.9, 0), DifficultyLedger(0.9, 0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: add_once(shared), range(200)))
    for _ in range(200):
        add_once(serial)
    assert shared == serial


def test_readers_see_whole_batches_only() -> None:
    ledger = DifficultyLedger(0.9, 0)
    torn: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            attempts = ledger.lookup(PROMPTS).attempts
            if attempts.min() != attempts.max():
                torn.append(int(attempts.max()))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        add_once(ledger)
    done.set()
    for reader in readers:
        reader.join()
    assert torn == []
    assert set(ledger.lookup(PROMPTS).attempts.tolist()) == {600}


def test_copies_taken_meanwhile_hold_whole_batches() -> None:
    ledger = DifficultyLedger(0.9, 0)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(add_once, ledger) if i % 2 else pool.submit(ledger.copy) for i in range(200)]
        copies = [job.result(timeout=60) for job in jobs]
    for copy in copies[::2]:
        attempts = copy.lookup(PROMPTS).attempts
        assert attempts.min() == attempts.max()
    assert set(ledger.lookup(PROMPTS).attempts.tolist()) == {200}


def test_python_runs_while_the_extension_works() -> None:
    ledger = DifficultyLedger(0.9, 0)
    prompts = np.random.default_rng(0).integers(0, 2**63, 1_500_000, dtype=np.uint64)
    ones = np.ones(len(prompts), dtype=np.int64)
    worker = threading.Thread(target=ledger.update, args=(prompts, ones, ones, ones * 1.0, ones), kwargs={"step": 0})
    worker.start()
    ticks = 0
    while worker.is_alive():
        ticks += 1
        time.sleep(0.001)
    worker.join()
    assert ticks >= 5  # with the GIL held the loop would not have run before the update ended
