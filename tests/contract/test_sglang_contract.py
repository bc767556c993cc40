"""The protocol as the trainer uses it, against the double and - marker ``sglang`` - the real server: same tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.server import LaunchOptions, ServerGroup
from aer_megatron.sglang.transports import TRANSPORTS
from aer_megatron.types import Completion, VersionSpan
from tests.support.real_servers import processes_writing
from tests.support.runs import ROOT
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, Rollouts, requests, rollouts, weights

SERVER_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
LAUNCH = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.5,
    "max_total_tokens": 4096,
    "max_running_requests": 16,
    "skip_tokenizer_init": True,
}
KEY = "sesame-0123456789abcdef"
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module", params=["double", pytest.param("real", marks=pytest.mark.sglang)])
def url(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The address of a server with the weights of ``folder``."""
    if request.param == "double":
        with SGLangDouble(folder, token_s=0.002, api_key=KEY) as double:
            yield double.url
        return
    options = LaunchOptions(
        python=str(SERVER_PYTHON),
        model_path=str(folder),
        host="127.0.0.1",
        arguments=LAUNCH,
        environment=dict(os.environ) | ENVIRONMENT,
        log_folder=folder.parent / "logs",
        start_timeout_s=600.0,
        max_restarts=0,
        api_key=KEY,
        reached_at="",
    )
    with ServerGroup(1, options) as group:
        yield group.start()[0]


@pytest.fixture
def server(url: str, folder: Path) -> Iterator[Rollouts]:
    with rollouts([url], folder, api_key=KEY) as made:
        yield made


def test_completions_hold_what_the_engine_promises(server: Rollouts) -> None:
    server.sync.publish(iter(weights(0).items()), 0)
    asked = requests(120)  # enough for both reasons to finish, whatever is sampled
    completions = server.engine.generate(asked, OPTIONS)
    assert len(completions) == len(asked)
    for completion in completions:
        length = len(completion.token_ids)
        assert len(completion.logprobs) == length
        assert all(value <= 1e-4 for value in completion.logprobs)
        assert completion.policy_versions == (VersionSpan(0, 0, length),)
        stopped = completion.token_ids[-1] in OPTIONS.stop_token_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert not any(token in OPTIONS.stop_token_ids for token in completion.token_ids[:-1])
        assert stopped or length == 6
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_published_weights_are_the_served_ones(transport: str, url: str, folder: Path) -> None:
    """Three publications, so that sessions and groups are used again; a second client then finds a clean server."""
    for first_version in (3, 30):
        with rollouts([url], folder, api_key=KEY, transport=transport) as made:
            for version in range(first_version, first_version + 3):
                made.sync.publish(iter(weights(version).items()), version)
                assert made.engine.policy_version == version
                for completion in made.engine.generate(requests(2), OPTIONS):
                    assert [span.version for span in completion.policy_versions] == [version]


def test_an_update_outside_a_session_is_refused(server: Rollouts) -> None:
    broadcast = {"names": [], "dtypes": [], "shapes": [], "group_name": "none", "load_format": "flattened_bucket"}
    tensor = {"serialized_named_tensors": [], "load_format": "flattened_bucket"}
    for kind, body in (("distributed", broadcast), ("tensor", tensor)):
        reply = server.fleet.control(0, f"/update_weights_from_{kind}", body)
        assert reply.status == 400
        assert "begin_weight_update" in reply.text


def test_another_model_than_the_one_sent_is_refused(server: Rollouts) -> None:
    server.sync.publish(iter(weights(0).items()), 0)
    wrong = server.fleet.control(0, "/update_weights_from_disk", {"model_path": "/nonexistent"})
    assert wrong.status == 400
    assert not wrong.json()["success"]
    checked = server.fleet.control(0, "/weights_checker", {"action": "checksum"}).json()
    assert checked["ranks"][0]["checksums"]["model.norm.weight"]
    assert server.engine.generate(requests(1), OPTIONS)  # the old weights are still in service


def test_a_weight_version_is_what_was_set(server: Rollouts) -> None:
    body = {"new_version": "aer-0123456789abcdef/7-unverified", "abort_all_requests": False}
    assert server.fleet.control(0, "/update_weight_version", body).json()["success"]
    assert server.fleet.control(0, "/model_info").json()["weight_version"] == "aer-0123456789abcdef/7-unverified"


def test_memory_is_released_and_taken_back(server: Rollouts) -> None:
    """Without a memory saver the real server only keeps the books; the calls are the same."""
    for version in range(2):
        server.sync.publish(iter(weights(version).items()), version)
        server.engine.generate(requests(3), OPTIONS)
        server.sync.suspend()
        assert server.fleet.in_service() == []
    server.sync.publish(iter(weights(2).items()), 2)
    assert len(server.engine.generate(requests(3), OPTIONS)) == 3


def test_an_aborted_request_comes_back_as_such(server: Rollouts) -> None:
    server.sync.publish(iter(weights(0).items()), 0)
    reply: dict[str, Any] = {}

    def generate() -> None:
        body = {
            "rid": "long",
            "input_ids": [3],
            "sampling_params": {"max_new_tokens": 50, "ignore_eos": True, "stop_token_ids": []},
            "return_logprob": True,
        }
        reply.update(server.fleet.control(0, "/generate", body).json())

    thread = threading.Thread(target=generate)
    thread.start()
    while thread.is_alive():
        assert server.fleet.control(0, "/abort_request", {"rid": "long"}).status == 200
        time.sleep(0.005)
    thread.join()
    assert reply["meta_info"]["finish_reason"]["type"] in ("abort", "length")  # it may have been fast
    assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"])


def test_an_invalid_request_is_refused_and_the_server_stays(server: Rollouts) -> None:
    server.sync.publish(iter(weights(0).items()), 0)
    reply = server.fleet.control(0, "/generate", {"rid": "bad", "input_ids": [], "sampling_params": {}})
    assert reply.status == 400
    assert reply.text
    assert server.engine.generate(requests(1), OPTIONS)


@pytest.mark.parametrize("path", ["/model_info", "/server_info", "/weights_checker", "/pause_generation", "/generate"])
def test_nothing_is_answered_without_the_key(path: str, url: str, folder: Path) -> None:
    for key in (None, "sesame-0123456789abcdeg"):
        with rollouts([url], folder, api_key=key) as stranger:
            body = None if path.endswith("_info") else {}
            assert stranger.fleet.control(0, path, body).status == 401


@pytest.mark.sglang
def test_the_key_is_on_no_command_line_and_in_no_log(url: str, server: Rollouts, folder: Path) -> None:
    """Of any process of the real server, which writes all of its options to its log."""
    if "version" not in server.fleet.control(0, "/server_info").json():
        pytest.skip("the double runs in this process")
    logs = folder.parent / "logs"
    processes = processes_writing(logs)
    assert len(processes) >= 3  # guard, server, scheduler
    for process in processes:
        for file in ("cmdline", "environ"):
            assert KEY.encode() not in Path(f"/proc/{process}/{file}").read_bytes()
    log = (logs / "server-0.log").read_text()
    assert KEY not in log and "***" in log


def test_a_process_group_that_a_server_refuses_is_given_up_at_once(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so by HTTP, where the trainer would wait ``transfer_timeout_s`` for it to join."""
    with rollouts([url], folder, api_key=KEY, transport="distributed", transfer_timeout_s=600.0) as made:
        servers = made.sync._servers
        post = servers.post

        def asks_for_another_backend(index: int, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            change = {"backend": "no_such_backend"} if path == "/init_weights_update_group" else {}
            return post(index, path, {**body, **change})

        monkeypatch.setattr(servers, "post", asks_for_another_backend)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="no_such_backend"):
            made.sync.publish(iter(weights(0).items()), 0)
        assert time.monotonic() - began < 60


@pytest.mark.sglang
def test_log_probabilities_are_those_of_the_published_weights(url: str, server: Rollouts) -> None:
    """Against transformers on the same weights, at two temperatures; the double has no model to compare."""
    from tests.support.policies import tiny_hf_model

    info = server.fleet.control(0, "/server_info").json()
    if "version" not in info:
        pytest.skip("the double makes its log-probabilities up")
    for version, (seed, temperature) in enumerate([(0, 1.0), (5, 0.7)]):
        server.sync.publish(iter(weights(seed).items()), version)
        model = tiny_hf_model(seed=seed)
        asked = [GenerateRequest((3, 4, 5 + place), place, 12) for place in range(8)]
        options = SamplingOptions(temperature, 0.9, 5, frozenset({2}))
        for request, completion in zip(asked, server.engine.generate(asked, options), strict=True):
            ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
            expected = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, len(request.prompt_ids) :, None])
            assert torch.allclose(expected[:, 0], torch.tensor(completion.logprobs), atol=1e-5)


def test_requests_go_on_over_publications_under_the_new_weights(server: Rollouts) -> None:
    """Every token's log-probability is that of the weights of its version, with all the tokens before it."""
    from tests.support.policies import tiny_hf_model

    server.sync.publish(iter(weights(0).items()), 0)
    asked = [GenerateRequest((3, 4, 5 + place), place, 50) for place in range(8)]
    completions: list[Completion] = []
    options = SamplingOptions(1.0, 1.0, 0, frozenset())
    thread = threading.Thread(target=lambda: completions.extend(server.engine.generate(asked, options)))
    thread.start()
    version = 0
    while thread.is_alive():
        time.sleep(0.05)
        version += 1
        server.sync.publish(iter(weights(version).items()), version)
    thread.join()
    assert max(len(completion.policy_versions) for completion in completions) > 1
    real = "version" in server.fleet.control(0, "/server_info").json()
    models = [tiny_hf_model(seed=seed) for seed in range(version + 1)] if real else []
    for request, completion in zip(asked, completions, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.policy_versions[-1].end == len(completion.token_ids)
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        for span in completion.policy_versions if real else ():
            with torch.no_grad():
                logits = models[span.version](ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
            rows = torch.log_softmax(logits, -1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0]
            got = torch.tensor(completion.logprobs)
            assert torch.allclose(rows[span.start : span.end], got[span.start : span.end], atol=1e-5)
