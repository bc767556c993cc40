"""Hugging Face folders: what transformers wrote, what is broken, what must not stay behind."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.hf_writer import config_with_dtype, write_hf_folder
from aer_megatron.convert.safetensors_writer import TensorSpec

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.arange(3),
}
CONFIG = {"model_type": "x", "torch_dtype": "float32"}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config)


def _write(
    path: Path, tensors: dict[str, Tensor] = TENSORS, *, shard: int = 10**9, dtype: torch.dtype | None = None
) -> Path:
    specs = {
        name: TensorSpec(spec.shape, dtype if dtype and spec.dtype.is_floating_point else spec.dtype)
        for name, spec in _specs(tensors).items()
    }
    config = config_with_dtype(CONFIG, dtype)
    return write_hf_folder(path, tensors.items(), specs, config=config, like=None, max_shard_bytes=shard)


def _specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_reads_what_transformers_wrote(model: Qwen3ForCausalLM, tmp_path: Path, max_shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")
    folder = HFFolder(tmp_path)
    state = model.state_dict()
    assert folder.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert all(torch.equal(folder.get(name), state[name]) for name in state)
    assert folder.config["hidden_size"] == 16 and "model.norm.weight" in folder and "x" not in folder


@pytest.mark.parametrize("shard", [10**9, 2000])
def test_transformers_reads_what_we_wrote(model: Qwen3ForCausalLM, tmp_path: Path, shard: int) -> None:
    target = write_hf_folder(
        tmp_path / "out",
        model.state_dict().items(),
        _specs(model.state_dict()),
        config=model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]},
        like=None,
        max_shard_bytes=shard,
    )
    again = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert isinstance(again, Qwen3ForCausalLM)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (len(list(target.glob("*.safetensors"))) == 1) == (shard == 10**9)


def _default_mode(folder: Path) -> int:
    (folder / "probe").touch()
    return (folder / "probe").stat().st_mode & 0o777


def test_single_file_and_dtype(tmp_path: Path) -> None:
    folder = HFFolder(_write(tmp_path / "out", dtype=torch.bfloat16))
    assert sorted(file.name for file in folder.path.iterdir()) == ["config.json", "model.safetensors"]
    assert {name: folder.dtype(name) for name in "abc"} == {"a": "BF16", "b": "BF16", "c": "I64"}
    assert {file.stat().st_mode & 0o777 for file in folder.path.iterdir()} == {_default_mode(tmp_path)}
    assert folder.config == {"model_type": "x", "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert torch.equal(folder.get("a"), TENSORS["a"].bfloat16())


def test_shard_sizes_by_hand(tmp_path: Path) -> None:
    """a, b, c take 24, 8, 24 bytes: with a limit of 32 the first two share a file."""
    folder = HFFolder(_write(tmp_path / "out", shard=32))
    index = json.loads((folder.path / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 56}, "weight_map": {"a": first, "b": first, "c": second}}
    assert folder.names() == ["a", "b", "c"]
    assert all(torch.equal(folder.get(name), tensor) for name, tensor in TENSORS.items())


def test_views_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    folder = HFFolder(_write(tmp_path / "out", {"top": whole[:2], "bottom": whole[2:], "turned": whole.T}))
    assert torch.equal(folder.get("bottom"), whole[2:]) and torch.equal(folder.get("turned"), whole.T)


def test_extra_files_are_carried_and_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
    ):
        (source / name).write_text(name)
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("x")
    target = write_hf_folder(tmp_path / "out", TENSORS.items(), _specs(TENSORS), config=CONFIG, like=source)
    carried = {file.name for file in target.iterdir()} - {"model.safetensors"}
    assert carried == {file.name for file in source.iterdir()} - {"pytorch_model.bin"}
    assert json.loads((target / "config.json").read_text()) == CONFIG
    assert (target / "merges.txt").read_text() == "merges.txt"


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        _write(tmp_path)


def _broken_stream() -> Iterator[tuple[str, Tensor]]:
    yield "a", torch.ones(8)
    yield "b", torch.ones(8)
    raise RuntimeError("the source went away")


def test_nothing_stays_when_the_source_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        specs = _specs({"a": torch.ones(8), "b": torch.ones(8)})
        write_hf_folder(tmp_path / "out", _broken_stream(), specs, config=CONFIG, like=None, max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


ONE = ("a", torch.ones(1))


@pytest.mark.parametrize(
    ("planned", "tensors", "words"),
    [
        ("", [], "no tensors"),
        ("a", [ONE, ONE], "a comes twice"),
        ("b", [ONE], "a is not expected"),
        ("ab", [ONE], "1 tensors were not written: b"),
        ("a", [("a", torch.ones(2))], r"a has shape \(2,\), expected \(1,\)"),
    ],
)
def test_bad_streams_are_refused(tmp_path: Path, planned: str, tensors: list[tuple[str, Tensor]], words: str) -> None:
    specs = {name: TensorSpec((1,), torch.float32) for name in planned}
    with pytest.raises(ValueError, match=words):
        write_hf_folder(tmp_path / "out", tensors, specs, config=CONFIG, like=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: the write fails half-way in the same call."""
    script = f"""
        import pathlib, resource, torch
        from aer_megatron.convert.hf_writer import write_hf_folder
        from aer_megatron.convert.safetensors_writer import TensorSpec
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        tensors = [("a", torch.ones(100_000))]
        specs = {{"a": TensorSpec((100_000,), torch.float32)}}
        write_hf_folder(pathlib.Path({str(tmp_path / "out")!r}), tensors, specs, config={{}}, like=None)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "OSError" in run.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def _damage(path: Path, what: str) -> None:
    files = sorted(path.glob("*.safetensors"))
    if what == "no folder":
        path.rename(path.with_name("elsewhere"))
    elif what == "no config":
        (path / "config.json").unlink()
    elif what == "bad config":
        (path / "config.json").write_text("{")
    elif what == "list config":
        (path / "config.json").write_text("[]")
    elif what == "truncated":
        files[1].write_bytes(files[1].read_bytes()[:-4])
    elif what == "missing shard":
        files[1].unlink()
    elif what == "other tensors":
        save_file({"z": torch.ones(1)}, files[1])
    elif what == "bad index":
        (path / "model.safetensors.index.json").write_text("{}")
    else:
        for file in path.glob("*safetensors*"):
            file.unlink()
        if what == "only .bin":
            (path / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "is not a folder"),
        ("no config", "config.json"),
        ("bad config", "not valid JSON"),
        ("list config", "one JSON object, found a list"),
        ("truncated", "model-00002-of-00003.safetensors is truncated"),
        ("missing shard", "lacks model-00002-of-00003.safetensors of 3 files"),
        ("other tensors", "model-00002-of-00003.safetensors lacks b"),
        ("bad index", "not a safetensors index"),
        ("only .bin", "save_pretrained"),
        ("no weights", "neither model.safetensors nor"),
    ],
)
def test_damage_is_named(tmp_path: Path, what: str, words: str) -> None:
    path = _write(tmp_path / "out", shard=8)
    _damage(path, what)
    with pytest.raises(ValueError, match=words):
        HFFolder(path)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tensor model\.x"):
        HFFolder(_write(tmp_path / "out")).get("model.x")
