"""Weights by broadcast, against doubles: both protocols, and faults that cost only the server that has them."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from aer_megatron.sglang.buckets import buckets
from aer_megatron.sglang.transports import distributed
from aer_megatron.sglang.transports.tensor import serialize
from tests.support.served_weights import AllowListed
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import OPTIONS, requests, rollouts, weights


@pytest.fixture(params=[False, True], ids=["sessions", "legacy"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[SGLangDouble, SGLangDouble]]:
    with SGLangDouble(folder, legacy=request.param) as first, SGLangDouble(folder, legacy=request.param) as second:
        yield first, second


@pytest.fixture(params=["distributed", "tensor"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_servers_hold_what_was_sent_and_groups_are_left(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path, transport: str
) -> None:
    with rollouts([one.url for one in pair], folder, transport=transport) as made:
        for version in (1, 2):
            sent = weights(version)
            made.sync.publish(iter(sent.items()), version)
            for server in pair:
                name = "model.layers.1.mlp.down_proj.weight"
                assert np.array_equal(server.weights[name], sent[name].numpy())
                assert server.weight_version == made.labels.verified(version)
                assert len(server.groups) == (transport == "distributed") and not server.in_session
        assert len(made.engine.generate(requests(6), OPTIONS)) == 6
    assert [server.groups for server in pair] == [{}, {}]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "must run between begin_weight_update"),
        ("hang", "within 2 s|Timed out waiting 2000ms"),  # the request's timer or the broadcast's, whichever is first
        ("drops_a_tensor", "model.layers.0.self_attn.o_proj.weight has checksum"),
        ("keeps_version", "reports weight version"),
    ],
)
def test_a_server_that_fails_costs_only_itself_and_may_come_back(
    fault: str, reason: str, pair: tuple[SGLangDouble, SGLangDouble], folder: Path, transport: str
) -> None:
    with ExitStack() as stack:
        urls = [one.url for one in pair]
        made = stack.enter_context(rollouts(urls, folder, transport=transport, transfer_timeout_s=2.0))
        made.sync.publish(iter(weights(0).items()), 0)
        pair[0].update_fault = fault  # type: ignore[assignment]
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == [1]
        assert re.search(reason, made.fleet.servers[0].reason)
        assert {c.policy_versions[0].version for c in made.engine.generate(requests(4), OPTIONS)} == {1}
        pair[0].update_fault = "none"
        made.sync.publish(iter(weights(2).items()), 2)
        assert made.fleet.in_service() == [0, 1]


@pytest.mark.parametrize("fault", ["refuses", "joins_and_refuses"])
def test_a_group_that_a_server_refuses_is_given_up_at_once_with_its_words(
    fault: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        SGLangDouble(folder) as bad,
        SGLangDouble(folder) as good,
        rollouts([bad.url, good.url], folder, transport="distributed", transfer_timeout_s=600.0) as made,
    ):
        bad.group_fault = fault  # type: ignore[assignment]
        began = time.monotonic()
        made.sync.publish(iter(weights(0).items()), 0)
        assert time.monotonic() - began < 60  # not the 600 s that a rendezvous may take
        assert made.fleet.in_service() == [1]
        assert "answers 400: Failed to initialize custom process group: no such device" in made.fleet.servers[0].reason
        assert len(made.engine.generate(requests(4), OPTIONS)) == 4
        bad.group_fault = "none"
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == [0, 1]


def test_a_server_that_only_says_that_it_joined_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_JOINED_WITHIN_S", 0.5)
    with (
        SGLangDouble(folder) as bad,
        SGLangDouble(folder) as good,
        rollouts([bad.url, good.url], folder, transport="distributed", transfer_timeout_s=600.0) as made,
    ):
        bad.group_fault = "says_so_only"
        made.sync.publish(iter(weights(0).items()), 0)
        assert made.fleet.in_service() == [1]
        assert "no process group with it" in made.fleet.servers[0].reason


def test_a_restarted_server_waits_for_the_next_publication(
    pair: tuple[SGLangDouble, SGLangDouble], folder: Path, transport: str
) -> None:
    with rollouts([one.url for one in pair], folder, transport=transport) as made:
        made.sync.publish(iter(weights(0).items()), 0)
        pair[0].stop()
        pair[0].start_again("default")
        with pytest.raises(RuntimeError, match="next publication"):
            made.sync.restore(0)
        made.sync.publish(iter(weights(1).items()), 1)
        assert made.fleet.in_service() == [0, 1]


def test_buckets_keep_order_dtype_and_limit() -> None:
    tensors = [("a", torch.zeros(4)), ("b", torch.ones(4)), ("c", torch.ones(3).bfloat16()), ("d", torch.ones(100))]
    made = list(buckets(iter(tensors), 32))
    assert [bucket.names for bucket in made] == [["a", "b"], ["c"], ["d"]]
    assert made[2].flat.data_ptr() == tensors[3][1].data_ptr()  # one tensor is not copied
    assert made[0].flat.view(torch.float32).tolist() == [0.0] * 4 + [1.0] * 4
    assert (made[1].dtype_names, made[1].shapes) == (["bfloat16"], [[3]])


def test_a_bucket_holds_several_dtypes_as_long_as_each_tensor_lies_aligned() -> None:
    """As servers put it together: one behind the other, without gaps."""
    fp8 = torch.arange(8).float().to(torch.float8_e4m3fn)
    tensors = [("a", fp8), ("b", torch.ones(1)), ("c", torch.ones(1).bfloat16()), ("d", torch.ones(2)), ("e", fp8[:3])]
    made = list(buckets(iter(tensors), 10**6))
    assert [bucket.names for bucket in made] == [["a", "b", "c"], ["d", "e"]]  # d would have begun at byte 14
    assert made[0].dtype_names == ["float8_e4m3fn", "float32", "bfloat16"]
    sent = dict(tensors)
    for bucket in made:
        received = read(serialize(bucket))
        assert list(received) == bucket.names
        for name, tensor in received.items():
            assert tensor.dtype == sent[name].dtype and torch.equal(tensor.float(), sent[name].float())


def test_a_bucket_holds_while_the_next_one_is_made() -> None:
    tensors = [(str(number), torch.full((2,), float(number))) for number in range(12)]
    stream = buckets(iter(tensors), 16)
    before = next(stream)
    memory = {before.flat.data_ptr()}
    for number, bucket in enumerate(stream):
        expected = [2.0 * number, 2.0 * number, 2.0 * number + 1, 2.0 * number + 1]
        assert before.flat.view(torch.float32).tolist() == expected
        memory.add(bucket.flat.data_ptr())
        before = bucket
    assert len(memory) == 2


def read(text: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a serialized bucket, by the server's rules."""
    bucket = AllowListed(io.BytesIO(base64.b64decode(text))).load()
    return {
        one.name: bucket["flattened_tensor"][one.start_idx : one.end_idx].view(one.dtype).reshape(one.shape)
        for one in bucket["metadata"]
    }


def test_a_serialized_bucket_is_read_with_an_allow_list_and_holds_no_more_than_its_tensors() -> None:
    large = torch.randn(100_000)
    sent = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).bfloat16(), "c": large[7:20]}
    texts = [serialize(bucket) for bucket in buckets(iter(sent.items()), 10**6)]
    received = {name: tensor for text in texts for name, tensor in read(text).items()}
    assert all(received[name].equal(tensor) for name, tensor in sent.items())
    assert max(map(len, texts)) < 4000  # not all of ``large``


def test_a_replaced_loader_of_storages_goes_by_torch_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core replaces it from 0.19 on; a server knows nothing of a trainer's packages."""

    def replacement(raw: bytes) -> object:
        raise AssertionError("a server has its own")

    monkeypatch.setattr(torch.storage, "_load_from_bytes", replacement)
    sent = {"a": torch.randn(3, 4).bfloat16()}
    (text,) = (serialize(bucket) for bucket in buckets(iter(sent.items()), 10**6))
    assert torch.equal(read(text)["a"], sent["a"])


@pytest.mark.gpu
def test_a_bucket_on_a_gpu_travels_as_a_handle_with_the_device_s_uuid() -> None:
    (bucket,) = buckets(iter([("a", torch.randn(1 << 20, device="cuda"))]), 1)
    raw = base64.b64decode(serialize(bucket))
    assert len(raw) < 10_000
    assert str(torch.cuda.get_device_properties(0).uuid).encode() in raw
    assert b"rebuild_cuda_tensor" in raw
