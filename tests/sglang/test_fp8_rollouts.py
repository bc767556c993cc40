"""FP8 rollouts: what the option refuses, what the embedded engine holds, what servers are sent and start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aer_megatron.compose.engines import _launch_options, _served_folder, build_engine
from aer_megatron.compose.quantization import check_quantization
from aer_megatron.config import Config
from aer_megatron.conversion.command import main as convert
from aer_megatron.convert.folders import hf_dtypes, hf_to_fp8
from aer_megatron.convert.fp8_quantize import E4M3
from aer_megatron.convert.fp8_weights import SCALE_SUFFIX, iter_fp8_weights, quantization_config, split_blocks
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.parallel.platform import Platform
from aer_megatron.rollout.checksum import tensor_checksum
from aer_megatron.sglang.served_weights import ServedChecksums
from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.fp8_models import (
    fp8_model,
    fp8_model_weights,
    fp8_tensors,
    is_projection,
    rounded_weights,
    save_fp8_model,
)
from tests.support.served_weights import served_checksum
from tests.support.sglang_double import SGLangDouble
from tests.support.sglang_fixtures import rollouts

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def run_config(model: str = "base", dtype: str = "bf16", **sections: dict[str, Any]) -> Config:
    table = {"model": {"path": model, "dtype": dtype}, "data": {"train": {"task": "countdown"}}}
    return Config.from_table(table | sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fp8_model(tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture(scope="module")
def fp8_folder(folder: Path) -> Path:
    return hf_to_fp8(folder, folder.parent / "fp8", dtype=torch.float32, max_shard_bytes=10**6)


# -- the option -------------------------------------------------------------------------------------------------------


ARCH = architecture_from_hf_config(fp8_model(0).config.to_dict())
SERVERS = {"engine": "sglang", "quantization": "fp8"}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"rollout": {"quantization": "fp8", "logprob_gate": 1e-3}}, ["logprob_gate=0.001", "'fp8'", "gate=0 "]),
        ({"dtype": "fp32", "rollout": SERVERS}, ["model.dtype='fp32'", "'fp8'", "bf16", "embedded"]),
        ({"rollout": SERVERS, "sglang": {"launch": {"device": "cpu"}}}, ["launch.device='cpu'", "AMX", "embedded"]),
        ({"rollout": SERVERS, "sglang": {"launch": {"tp_size": 2}}}, ["gate_proj", "[192, 256]", "launch.tp_size=2"]),
        (
            {"rollout": {"engine": "sglang"}, "sglang": {"launch": {"quantization": "fp8"}}},
            ["sglang.launch.quantization='fp8'", "rollout.quantization='fp8'"],
        ),
    ],
)
def test_what_does_not_go_together_is_named_with_a_remedy(sections: dict[str, Any], named: list[str]) -> None:
    sections = {name: dict(table) if isinstance(table, dict) else table for name, table in sections.items()}
    if sections["rollout"].get("engine") == "sglang":
        sections["sglang"] = {"num_servers": 1} | sections.get("sglang", {})
    with pytest.raises(ValueError) as refused:
        check_quantization(run_config(**sections), ARCH)
    for words in named:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"logprob_gate": 1e-3}},
        {"dtype": "fp32", "rollout": {"quantization": "fp8"}},
        {"rollout": SERVERS, "sglang": {"num_servers": 1}},
    ],
)
def test_what_goes_together_passes(sections: dict[str, Any]) -> None:
    check_quantization(run_config(**sections), ARCH)


def test_an_unknown_form_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"(?s)rollout\.quantization.*'none' or 'fp8'"):
        run_config(rollout={"quantization": "int4"})


@pytest.mark.parametrize(
    ("changes", "tp_size", "named"),
    [
        ({}, 1, ""),
        ({"intermediate_size": 512}, 2, ""),
        ({"intermediate_size": 512, "num_key_value_heads": 1}, 2, ""),  # each rank then holds the one key head
        ({"hidden_size": 192}, 1, "q_proj.weight [256, 192]"),
        ({"head_dim": 96}, 1, "q_proj.weight [192, 256]"),
        ({"intermediate_size": 400}, 1, "gate_proj.weight [400, 256]"),
    ],
)
def test_blocks_that_a_server_would_have_to_split_are_found(changes: dict[str, Any], tp_size: int, named: str) -> None:
    table = fp8_model(0).config.to_dict() | changes
    found = split_blocks(architecture_from_hf_config(table), tp_size)
    assert (named in found) if named else found == ""


# -- the embedded engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_embedded_engine_holds_the_values_of_the_blocks(dtype: str, folder: Path) -> None:
    sent = fp8_model_weights(3, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    expected = rounded_weights(sent)
    assert not torch.equal(expected[O_PROJ], sent[O_PROJ])
    for quantization, held in (("fp8", expected), ("none", sent)):
        config = run_config(str(folder), dtype, rollout={"quantization": quantization})
        with ExitStack() as stack:
            engine, sync = build_engine(config, Platform("cpu", "gloo", 0, 1, 0), stack)
            sync.publish(iter(sent.items()), 5)
            checksums = engine.held_checksums()  # type: ignore[attr-defined]
            assert engine.policy_version == 5
        assert checksums == {name: tensor_checksum(tensor) for name, tensor in held.items()}


# -- what servers are sent --------------------------------------------------------------------------------------------


def test_a_quantised_weight_is_followed_by_its_scales_and_the_rest_passes() -> None:
    sent = fp8_model_weights(1)
    stream = list(iter_fp8_weights(sent.items()))
    expected = fp8_tensors(sent)
    assert [name for name, _ in stream] == list(expected)
    assert sum(name.endswith(SCALE_SUFFIX) for name in expected) == 14
    for name, tensor in stream:
        assert tensor.dtype == expected[name].dtype
        assert np.array_equal(bits(tensor), bits(expected[name])), name


@pytest.fixture
def pair(fp8_folder: Path) -> Iterator[tuple[SGLangDouble, SGLangDouble]]:
    with SGLangDouble(fp8_folder) as first, SGLangDouble(fp8_folder) as second:
        yield first, second


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_servers_hold_the_fp8_form_of_what_was_published(
    transport: str, pair: tuple[SGLangDouble, SGLangDouble], folder: Path
) -> None:
    """Names, dtypes and bytes, by each transport; and a server that misses the values of new scales does not serve."""
    with rollouts([one.url for one in pair], folder, transport=transport, fp8=True) as made:
        for version in (1, 2):
            sent = fp8_model_weights(version)
            stored = fp8_tensors(sent)
            made.sync.publish(iter(sent.items()), version)
            for server in pair:
                assert server.weight_version == made.labels.verified(version)
                for name in (O_PROJ, O_PROJ + SCALE_SUFFIX, "model.norm.weight"):
                    assert np.array_equal(server.weights[name].view(np.uint8).ravel(), bits(stored[name])), name
                for suffix in ("", SCALE_SUFFIX):
                    parts = [stored[f"model.layers.1.self_attn.{part}_proj.weight{suffix}"] for part in "qkv"]
                    held = server.weights[f"model.layers.1.self_attn.qkv_proj.weight{suffix}"]
                    assert np.array_equal(held.view(np.uint8).ravel(), np.concatenate([bits(part) for part in parts]))
        if transport == "disk":
            sent = folder.parent / "transfer" / made.labels.run / "version-2" / "config.json"
            assert '"quantization_config"' in sent.read_text()
        else:
            names = [(name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in stored.items()]
            assert pair[0].loaded == 2 * names
        pair[0].update_fault = "drops_a_tensor"
        made.sync.publish(iter(fp8_model_weights(3).items()), 3)
        assert made.fleet.in_service() == [1]
        assert f"{O_PROJ} has checksum" in made.fleet.servers[0].reason


@pytest.mark.parametrize("fp8", [True, False])
def test_a_server_with_weights_in_another_form_is_refused(fp8: bool, folder: Path, fp8_folder: Path) -> None:
    """It would take the tensors without a word; the other ranks gather to the end all the same."""
    with SGLangDouble(folder if fp8 else fp8_folder) as double, rollouts([double.url], folder, fp8=fp8) as made:
        stream = iter(fp8_model_weights(1).items())
        with pytest.raises(RuntimeError, match=f"rollout.quantization='{'fp8' if fp8 else 'none'}'") as refused:
            made.sync.publish(stream, 1)
        assert double.url in str(refused.value) and double.weight_version == "default"
        assert ("aer convert hf-to-fp8" in str(refused.value)) == fp8
        assert list(stream) == []


def test_checksums_are_of_the_values_in_bf16_and_notice_a_scale() -> None:
    """As the server's weight checker has it; on two ranks, of the parts of the whole tensor."""
    sent = fp8_model_weights(2)
    rounded = rounded_weights({name: tensor.bfloat16() for name, tensor in sent.items()})
    stored = fp8_tensors({name: tensor.bfloat16() for name, tensor in sent.items()})

    def of(tensors: dict[str, torch.Tensor], tp_size: int) -> list[dict[str, str]]:
        checksums = ServedChecksums(ARCH, tp_size=tp_size)
        for name, tensor in tensors.items():
            checksums.add(name, tensor)
        return checksums.result()

    first, second = of(stored, 2)
    assert set(first) == set(of(rounded, 1)[0])  # scales have none of their own
    assert second[O_PROJ] == served_checksum(rounded[O_PROJ][:, 128:].view(torch.uint16).numpy())
    assert first[O_PROJ] == served_checksum(rounded[O_PROJ][:, :128].view(torch.uint16).numpy())
    stored[O_PROJ + SCALE_SUFFIX][1, 0] *= 1.01
    changed = of(stored, 2)
    assert changed[0][O_PROJ] != first[O_PROJ] and changed[1] == second
    del stored[O_PROJ + SCALE_SUFFIX]
    with pytest.raises(ValueError, match=r"o_proj\.weight: the scales of its FP8 values were not sent"):
        of(stored, 1)


# -- the folder that servers start from -------------------------------------------------------------------------------


def test_the_fp8_folder_is_a_checkpoint_of_the_rounded_model(folder: Path, fp8_folder: Path) -> None:
    files = sorted(fp8_folder.glob("*.safetensors"))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = fp8_tensors(fp8_model_weights(0))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(bits(found[name]), bits(tensor)), name
    opened = HFFolder(fp8_folder)
    assert opened.config == HFFolder(folder).config | {"quantization_config": quantization_config(), "dtype": "float32"}
    with pytest.raises(ValueError, match="F8_E4M3; convert the checkpoint to bf16 or fp32 first"):
        hf_dtypes(opened, ARCH)


def test_the_command_makes_the_same_folder(
    folder: Path, fp8_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    arguments = ["hf-to-fp8", str(folder), str(made), "--dtype", "float32", "--max-file-gb", "0.001"]
    assert convert(arguments) == 0
    files = sorted(path.name for path in fp8_folder.iterdir())
    assert sorted(path.name for path in made.iterdir()) == files
    assert all((made / name).read_bytes() == (fp8_folder / name).read_bytes() for name in files)
    assert convert(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_launched_servers_start_from_an_fp8_folder_that_is_made_once(folder: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"run": {"output_dir": str(tmp_path / "out")}, "sglang": {"num_servers": 1}}
    config = run_config(str(folder), rollout=SERVERS, **sections)
    made = _served_folder(config)
    assert _launch_options(config, str(made), "").model_path == str(tmp_path / "out" / "fp8_model")
    weights = {name: tensor for file in made.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in weights.values()} == {E4M3, torch.float32, torch.bfloat16}
    assert all((tensor.dtype == E4M3) == is_projection(name) for name, tensor in weights.items())
    marker = made / "marker"
    marker.touch()
    assert _served_folder(config) == made and marker.exists()  # used again
    (made / "config.json").write_text("{}")  # of another model
    assert _served_folder(config) == made and not marker.exists()
    plain = run_config(str(folder), rollout={"engine": "sglang"}, **sections)
    assert _served_folder(plain) == folder


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
