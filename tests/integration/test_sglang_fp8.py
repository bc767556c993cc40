"""A real SGLang server that holds blocks of FP8 takes weights by every transport, bit for bit; marker ``sglang``.

Its FP8 product is replaced (tests/support/fp8_on_cpu): on a CPU there is none. Loading and verification are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aer_megatron.convert.folders import hf_to_fp8
from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.server import ServerGroup
from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.fp8_models import fp8_model, fp8_model_weights, rounded_weights, save_fp8_model
from tests.support.real_servers import real_server_options
from tests.support.runs import ROOT
from tests.support.served_weights import served_checksum
from tests.support.sglang_fixtures import rollouts

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]
BF16 = torch.bfloat16
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fp8_model(tmp_path_factory.mktemp("real_fp8") / "model", dtype=BF16)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    start = hf_to_fp8(folder, folder.parent / "fp8", dtype=BF16, max_shard_bytes=10**6)
    options = real_server_options(start, folder.parent / "logs", dtype="bfloat16", skip_tokenizer_init=True)
    changed = {"PYTHONPATH": str(ROOT / "tests" / "support" / "fp8_on_cpu")}
    options = replace(options, environment={**options.environment, **changed})
    with ServerGroup(1, options) as group:
        yield group.start()[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_served_weights_are_the_blocks_that_were_sent(transport: str, url: str, folder: Path) -> None:
    first = 3 * list(TRANSPORTS).index(transport) + 1
    seeds = range(first, first + 3)
    with rollouts([url], folder, transport=transport, fp8=True) as made:
        for seed in seeds:
            sent = fp8_model_weights(seed, BF16)
            made.sync.publish(iter(sent.items()), seed)  # every checksum is compared
            assert made.fleet.in_service() == [0]
            rounded = rounded_weights(sent)
            ranks = made.fleet.control(0, "/weights_checker", {"action": "checksum"}).json()["ranks"]
            held = ranks[0]["checksums"]
            qkv = torch.cat([rounded[f"{LAYER}self_attn.{part}_proj.weight"] for part in "qkv"])
            assert held[f"{LAYER}self_attn.qkv_proj.weight"] == served_checksum(qkv.view(torch.uint16).numpy())
            down = rounded[f"{LAYER}mlp.down_proj.weight"]
            assert held[f"{LAYER}mlp.down_proj.weight"] == served_checksum(down.view(torch.uint16).numpy())
        model = fp8_model(seeds[-1], BF16)
        model.load_state_dict(rounded, strict=False)
        asked = [GenerateRequest((3, 4, 5 + place), place, 8) for place in range(4)]
        for request, completion in zip(
            asked, made.engine.generate(asked, SamplingOptions(1.0, 1.0, 0, frozenset())), strict=True
        ):
            ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
            expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0]
            # both compute in bf16, whose rounding is what differs
            assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=0.05)


def test_unquantised_weights_are_refused(url: str, folder: Path) -> None:
    with (
        rollouts([url], folder) as made,
        pytest.raises(RuntimeError, match=r"rollout\.quantization='none' sends weights as they are"),
    ):
        made.sync.publish(iter(fp8_model_weights(1, BF16).items()), 1)
