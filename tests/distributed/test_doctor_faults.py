"""The doctor finds a healthy policy fit, and names the cause of each planted fault: two gloo ranks, one spawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.doctor_faults import (
    ENGINE_TEMPERATURE,
    FAULTS,
    FIRST_Q,
    SECOND_Q,
    STALE,
    examine,
    few_layouts,
    run_config,
    write_policy,
)
from tests.support.sglang_double import SGLangDouble
from tests.support.spawn import run_distributed

LAYOUTS = ("tp 2", "pp 2 vpp 2")


SERVERS = "made-up log-probabilities of a server"


def _examinations(rank: int, world_size: int, run_file: Path, url: str) -> dict[str, Any]:
    outcomes = {}
    config = run_config(run_file)
    with few_layouts(*LAYOUTS):
        for name, fault in FAULTS.items():
            with fault():
                outcomes[name] = examine(config, rank, world_size)
        servers = run_config(run_file, "--rollout.engine=sglang", f'--sglang.urls=["{url}"]')
        outcomes[SERVERS] = examine(servers, rank, world_size)
        fp8 = ["--megatron.fp8=hybrid", "--rollout.quantization=fp8"]
        bf16 = run_config(run_file, "--model.dtype=bf16", "--rollout.logprob_gate=0", *fp8)
        outcomes["bf16 without transformers"] = examine(bf16, rank, world_size, reference="never")
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_file = write_policy(tmp_path_factory.mktemp("doctor"))
    with SGLangDouble(run_file.parent / "base", vocab_size=22) as server:
        return run_distributed(_examinations, 2, run_file, server.url, timeout_s=400)


def test_a_healthy_policy_is_fit(outcomes: list[dict[str, Any]]) -> None:
    for of_rank in outcomes:
        assert of_rank["none"].fit
    healthy = outcomes[0]["none"]
    assert healthy.causes == ()
    assert {check.status for check in healthy.checks} == {"pass"}
    areas = {check.area for check in healthy.checks}
    assert areas == {"round trip", "transformers", "layouts", "repeat", "weight sync", "rollout"}
    assert {check.subject for check in healthy.checks if check.area == "layouts"} >= set(LAYOUTS)


def test_bf16_holds_without_transformers_and_fp8_is_left_out(outcomes: list[dict[str, Any]]) -> None:
    outcome = outcomes[0]["bf16 without transformers"]
    assert outcome.fit, outcome.causes
    (left_out,) = [check for check in outcome.checks if check.area == "transformers"]
    assert (left_out.status, left_out.note) == ("skipped", "--reference=never")
    for option in ("megatron.fp8", "rollout.quantization"):
        (fp8,) = [check for check in outcome.checks if check.subject == option]
        assert fp8.status == "skipped"


# the fault -> what its one cause says, and which areas have failed rows
EXPECTED = {
    "swapped weight": (f"{FIRST_Q} and {SECOND_Q} are exchanged", {"round trip", "transformers"}),
    "wrong rope base": (r"training computes with rope base 1e\+06 instead of 10000", {"transformers", "rollout"}),
    "dropped gradient all-reduce": (
        "gradient reduction is dropped or doubled: data parallelism changes the gradient",
        {"layouts", "transformers"},
    ),
    "stale rollout weight": (f"{STALE} is still that of policy version 0, version 1 was", {"weight sync"}),
    "wrong temperature": (
        f"rollout engine samples with temperature {ENGINE_TEMPERATURE} instead of 1",
        {"transformers", "rollout"},
    ),
    SERVERS: ("do not hold the same policy, although every checksum agrees", {"transformers", "rollout"}),
    "exchanged both ways": (r"training computes with \S*gate\S* and \S*up\S* exchanged", {"transformers", "rollout"}),
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_the_one_cause_of_a_fault_is_named(fault: str, outcomes: list[dict[str, Any]]) -> None:
    said, areas = EXPECTED[fault]
    assert [of_rank[fault].fit for of_rank in outcomes] == [False, False]
    outcome = outcomes[0][fault]
    assert [cause.cause for cause in outcome.causes if re.search(said, cause.cause)], outcome.causes
    assert len(outcome.causes) == 1
    assert {check.area for check in outcome.checks if check.status == "fail"} == areas


def test_every_failed_row_has_a_cause(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes[0].values():
        failed = [check for check in outcome.checks if check.status == "fail"]
        blamed = [check for cause in outcome.causes for check in cause.accounts_for]
        assert sorted(map(str, failed)) == sorted(map(str, blamed))
