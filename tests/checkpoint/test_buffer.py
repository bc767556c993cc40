"""Tensors into safetensors files: the buffer's files are those of a direct write, and any reader reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aer_megatron.checkpoint.buffer import HostBuffer, TensorFile, tensor_file


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight/odd": torch.randn(3, 5).to(torch.bfloat16),
        "exp_avg/a@0": torch.randn(7),
        "buffer/flag": torch.tensor([True, False, True]),
        "buffer/scalar": torch.tensor(3, dtype=torch.int64),
        "buffer/empty": torch.empty(0, 4),
        "buffer/fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "buffer/int8": torch.arange(3, dtype=torch.int8),
        "weight/transposed": torch.randn(4, 6).T,
    }


def files() -> dict[str, TensorFile]:
    return {"model": tensor_file("model", tensors()), "rng": tensor_file("rng", {"torch": torch.get_rng_state()})}


def test_the_buffers_file_is_the_direct_one_and_readable(tmp_path: Path) -> None:
    buffer = HostBuffer(torch.device("cpu"))
    direct, buffered = files(), buffer.copy(files())
    for name, file in direct.items():
        one = file.write(tmp_path / f"{name}-direct", rank=1)
        two = buffered[name].write(tmp_path / f"{name}-buffered", rank=1)
        content = (tmp_path / f"{name}-direct").read_bytes()
        assert content == (tmp_path / f"{name}-buffered").read_bytes()
        assert one == two and one.part == name and one.rank == 1
        assert (one.num_bytes, one.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    read = load_file(tmp_path / "model-buffered")
    assert set(read) == set(tensors())
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(
            read[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_a_copy_does_not_follow_later_updates_and_its_memory_is_kept(tmp_path: Path) -> None:
    live = {"weight/a": torch.arange(1000, dtype=torch.float32)}
    buffer = HostBuffer(torch.device("cpu"))
    first = buffer.copy({"model": tensor_file("model", live)})
    place, size = first["model"].tensors["weight/a"].data_ptr(), buffer.nbytes
    live["weight/a"].zero_()
    first["model"].write(tmp_path / "a", rank=0)
    assert torch.equal(load_file(tmp_path / "a")["weight/a"], torch.arange(1000, dtype=torch.float32))
    second = buffer.copy({"model": tensor_file("model", live)})
    assert (second["model"].tensors["weight/a"].data_ptr(), buffer.nbytes) == (place, size)
    assert size == 4032  # 4000 bytes to a multiple of 64


def test_it_grows_once_the_optimizer_has_its_state() -> None:
    buffer = HostBuffer(torch.device("cpu"))
    buffer.copy({"model": tensor_file("model", {"a": torch.zeros(10)})})
    live = {"a": torch.ones(10), "b": torch.ones(1000)}
    copied = buffer.copy({"model": tensor_file("model", live)})
    assert all(torch.equal(copied["model"].tensors[name], live[name]) for name in live)


def test_memory_that_the_host_does_not_have_is_said() -> None:
    file = TensorFile("model", {"a": torch.empty(1 << 60, dtype=torch.uint8, device="meta")})
    with pytest.raises(RuntimeError, match=r"no host memory for the .* GB buffer .* run.async_checkpoint=false"):
        HostBuffer(torch.device("cpu")).reserve({"model": file})


def test_a_planted_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        files()["model"].write(tmp_path / "a", rank=0)
    assert not (tmp_path / "victim").exists()
