"""Weights through a folder: verified on every server, or that server does not serve."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.sglang.served_weights import ServedChecksums, first_difference
from tests.support.policies import tiny_hf_model
from tests.support.served_weights import served_checksum
from tests.support.sglang_double import Running, SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, Rollouts, requests, rollouts, weights


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[SGLangDouble, SGLangDouble]]:
    with SGLangDouble(folder) as first, SGLangDouble(folder) as second:
        yield first, second


def opened(stack: ExitStack, pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> Rollouts:
    made = stack.enter_context(rollouts([one.url for one in pair], folder, transfer_timeout_s=1.0))
    made.sync.publish(iter(weights(0).items()), 0)
    return made


def test_the_servers_hold_what_was_published_bit_for_bit(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        sent = weights(1)
        made.sync.publish(iter(sent.items()), 1)
        for server in pair:
            assert server.weight_version == made.labels.verified(1)
            layer = "model.layers.1.self_attn."
            joined = torch.cat([sent[f"{layer}{part}_proj.weight"] for part in "qkv"])
            assert np.array_equal(server.weights[f"{layer}qkv_proj.weight"], joined.numpy())
            assert np.array_equal(server.weights[f"{layer}o_proj.weight"], sent[f"{layer}o_proj.weight"].numpy())
        own = folder.parent / "transfer" / made.labels.run
        assert sorted(path.name for path in own.iterdir()) == ["run.json", "version-1"]
    assert not (folder.parent / "transfer").exists()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "/update_weights_from_disk answers 500"),
        ("drops_a_tensor", "model.layers.0.self_attn.o_proj.weight has checksum"),
        ("hang", "no reply within 1 s"),
        ("keeps_version", r"reports weight version 'aer-\w{16}/1-unverified' after 'aer-\w{16}/1' was set"),
    ],
)
def test_a_server_that_does_not_take_the_weights_does_not_serve(
    fault: str, reason: str, pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].update_fault = fault  # type: ignore[assignment]
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == [1]
        assert re.search(reason, made.fleet.servers[0].reason)
        before = pair[0].num_completed
        completions = made.engine.generate(requests(6), OPTIONS)
        assert {span.version for completion in completions for span in completion.policy_versions} == {1}
        assert pair[0].num_completed == before
        pair[0].update_fault = "none"
        made.sync.publish(iter(weights(0).items()), 2)
        assert made.fleet.in_service() == [0, 1]


def test_no_server_left_is_an_error_and_nothing_serves(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        for server in pair:
            server.update_fault = "drops_a_tensor"
        with pytest.raises(RuntimeError, match=r"policy version 1: no server took the weights"):
            made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == []


def test_a_stream_that_cannot_be_written_is_still_exhausted(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    """The other ranks take part in gathering it to its end."""
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        read: list[str] = []

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights(1).items():
                read.append(name)
                yield name, tensor
                if len(read) == 1:
                    yield name, tensor  # twice: refused

        with pytest.raises(RuntimeError, match="comes twice"):
            made.sync.publish(stream(), 1)
        assert len(read) == len(weights(1))


def test_a_server_that_answered_garbage_is_replaced_not_updated(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].fault = "nan"
        made.engine.generate(requests(8), OPTIONS)
        pair[0].fault = "none"
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.replaced == [0]
        assert made.fleet.in_service() == [1]
        made.fleet.allow_transfer(0)  # its process is a new one
        made.sync.publish(iter(weights(0).items()), 2)
        assert made.fleet.in_service() == [0, 1]


def test_checksums_of_two_ranks_are_those_of_the_cut_tensors() -> None:
    model = tiny_hf_model(tied=False)
    arch = architecture_from_hf_config(model.config.to_dict())
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    checksums = ServedChecksums(arch, tp_size=2)
    for name in sorted(tensors, reverse=True):  # v before k before q: any order will do
        checksums.add(name, tensors[name])
    second = checksums.result()[1]
    q, k, v = (tensors[f"model.layers.0.self_attn.{part}_proj.weight"].numpy() for part in "qkv")
    joined = np.concatenate([q[16:], k[8:], v[8:]])
    assert second["model.layers.0.self_attn.qkv_proj.weight"] == served_checksum(joined)
    down = tensors["model.layers.0.mlp.down_proj.weight"].numpy()
    assert second["model.layers.0.mlp.down_proj.weight"] == served_checksum(down[:, 32:])
    assert second["lm_head.weight"] == served_checksum(np.zeros((32, 32), np.float32))  # 25 rows, padded to 64
    assert second["model.norm.weight"] == served_checksum(tensors["model.norm.weight"].numpy())


def test_what_a_server_must_report_is_checked_both_ways() -> None:
    expected = [{"a": "01", "b": "02"}]

    def reported(checksums: dict[str, str], rank: int = 0) -> list[dict[str, object]]:
        return [{"checksums": checksums, "parallelism_info": [{"tp_rank": rank}]}]

    assert first_difference(expected, reported({"a": "01", "b": "02"})) == ""
    assert "b has checksum 03" in first_difference(expected, reported({"a": "01", "b": "03"}))
    assert "does not report b" in first_difference(expected, reported({"a": "01"}))
    assert first_difference(expected, reported({"a": "01", "b": "03"}), names_only=True) == ""
    assert "does not report b" in first_difference(expected, reported({"a": "09"}), names_only=True)
    assert "holds c" in first_difference(expected, reported({"a": "09", "b": "09", "c": "09"}), names_only=True)
    assert "never sent" in first_difference(expected, reported({"a": "01", "b": "02", "c": "04"}))
    assert "tensor-parallel rank 1" in first_difference(expected, reported({"a": "01", "b": "02"}, rank=1))
    assert "does not report" in first_difference(expected, None)


def test_memory_is_released_between_rollouts_and_the_next_transfer(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        made.engine.generate(requests(4), OPTIONS)
        made.sync.suspend()
        assert [server.released for server in pair] == [True, True]
        assert made.fleet.in_service() == []
        pair[1].stop()  # a new process has its memory, and must not be told to take it back
        pair[1].released = False
        pair[1].start_again("default")
        made.sync.publish(iter(weights(1).items()), 1)
        assert [server.released for server in pair] == [False, False]
        assert len(made.engine.generate(requests(4), OPTIONS)) == 4
        assert made.fleet.in_service() == [0, 1]


def test_a_server_that_is_busy_is_not_asked_for_its_memory(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].running["someone else's"] = Running()
        made.sync.suspend()
        del pair[0].running["someone else's"]
        assert [server.released for server in pair] == [False, True]
        assert made.replaced == [0]
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == [0, 1]


def test_a_server_reached_by_a_publication_is_not_given_the_weights_again(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    with ExitStack() as stack:
        made = opened(stack, pair, folder)
        pair[0].update_fault = "500"
        made.sync.restore(0)  # holds them already: no update is tried
        pair[0].weight_version = "default"
        with pytest.raises(RuntimeError, match="answers 500"):
            made.sync.restore(0)


def test_a_transfer_waits_while_no_server_answers(pair: tuple[SGLangDouble, SGLangDouble], folder: Path) -> None:
    with ExitStack() as stack:
        urls = [one.url for one in pair]
        made = stack.enter_context(rollouts(urls, folder, transfer_timeout_s=5.0, recovery_timeout_s=20.0))
        for server in pair:
            server.stop()
        back = threading.Timer(0.7, pair[1].start_again, ["default"])
        back.start()
        made.sync.publish(iter(weights(1).items()), 1)
        back.join()
        assert made.fleet.in_service() == [1]
