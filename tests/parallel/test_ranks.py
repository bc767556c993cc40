"""The launcher's variables: complete and consistent, or refused by name and value."""

from __future__ import annotations

import pytest
import torch

from aer_megatron.parallel.platform import initialize_process_group, install_platform, read_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = dict(zip(NAMES, ("3", "4", "1", "2", "node0", "9")))


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch):
    def set_to(values: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "1"}, (0, 1, 0)),  # exported for something else
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        (COMPLETE, (3, 4, 1)),
        ({name: COMPLETE[name] for name in NAMES if name != "LOCAL_WORLD_SIZE"}, (3, 4, 1)),  # srun
    ],
)
def test_a_complete_environment(place, values: dict[str, str], expected: tuple[int, int, int]) -> None:
    place(values)
    assert read_ranks() == expected


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in COMPLETE.items() if key != name}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK is not"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE=2", "MASTER_ADDR is not"]),
        (without("MASTER_PORT"), ["WORLD_SIZE=4", "MASTER_PORT is not"]),
        (without("RANK"), ["RANK is not"]),
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE is not"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE is not"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "WORLD_SIZE is not"]),
        (COMPLETE | {"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        (COMPLETE | {"RANK": "-1"}, ["RANK='-1'"]),
        (COMPLETE | {"RANK": "one"}, ["RANK='one'"]),
        (COMPLETE | {"RANK": ""}, ["RANK=''"]),
        (COMPLETE | {"RANK": "9" * 5000}, ["RANK="]),
        (COMPLETE | {"WORLD_SIZE": "2.0"}, ["WORLD_SIZE='2.0'"]),
        (COMPLETE | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        (COMPLETE | {"LOCAL_RANK": "x"}, ["LOCAL_RANK='x'"]),
        (COMPLETE | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        (without("LOCAL_WORLD_SIZE") | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "WORLD_SIZE=4"]),
        (COMPLETE | {"MASTER_PORT": "0"}, ["MASTER_PORT=0"]),
        (COMPLETE | {"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
    ],
)
def test_an_incomplete_or_contradictory_one_is_refused(place, values: dict[str, str], words: list[str]) -> None:
    place(values)
    with pytest.raises(ValueError) as refused:
        read_ranks()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("devices", "values", "words"),
    [
        (2, {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}, ["LOCAL_RANK=2", "2 CUDA devices"]),
        (8, {"LOCAL_RANK": None}, ["LOCAL_RANK is not set", "8 CUDA devices"]),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    place, monkeypatch: pytest.MonkeyPatch, devices: int, values: dict[str, str | None], words: list[str]
) -> None:
    place({name: value for name, value in (COMPLETE | values).items() if value is not None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError) as refused:
        install_platform()
    for word in words:
        assert word in str(refused.value)


def test_a_process_on_its_own_opens_no_store(place, monkeypatch: pytest.MonkeyPatch) -> None:
    place({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1"})
    initialize_process_group(install_platform())
    try:
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()
