"""``aer convert`` end to end on tiny models, and what it says about bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aer_megatron.conversion.command import main
from aer_megatron.convert import folders
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.megatron_folder import MegatronFolder
from tests.support.spawn import run_distributed
from tests.support.tiny_models import FAMILIES, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


def convert(*arguments: object) -> None:
    """Runs ``aer convert`` in this process."""
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns the one message of a call that bad input ends."""
    capsys.readouterr()  # what made the model spoke, too
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("aer_megatron: ")
    return message


def _bits(folder: Path) -> dict[str, torch.Tensor]:
    read = HFFolder(folder)
    return {name: read.get(name) for name in read.names()}


def _same(left: Path, right: Path) -> None:
    mine, theirs = _bits(left), _bits(right)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2])
def test_there_and_back(tmp_path: Path, family: str, tp: int) -> None:
    model = save_tiny_model(family, tmp_path / "model", dtype=torch.bfloat16)
    convert("hf-to-megatron", model, tmp_path / "megatron", "--tp", tp, "--max-file-gb", 1e-5)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 1
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--max-file-gb", 2e-5)
    _same(tmp_path / "back", model)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron", "model"]


def test_transformers_loads_what_comes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = save_tiny_model("qwen3_moe", tmp_path / "model")
    convert("hf-to-megatron", model, tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    tokens = torch.arange(10)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (model, tmp_path / "back")]
    assert torch.equal(*logits)


def test_the_dtype_of_the_output(tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model")
    convert("hf-to-megatron", model, tmp_path / "megatron", "--dtype", "bfloat16")
    stored = MegatronFolder(tmp_path / "megatron")
    assert {stored.dtype(key) for key in stored.shapes()} == {torch.bfloat16}
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--dtype", "float32")
    expected = {name: tensor.bfloat16().float() for name, tensor in _bits(model).items()}
    found = _bits(tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def _edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def _edit_tensors(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "architecture": (lambda m: _edit_config(m, architectures=["GPT2LMHeadModel"]), [], ["GPT2LMHeadModel", "Qwen3For"]),
    "missing": (lambda m: _edit_tensors(m, lambda t: t.pop(NORM)), [], ["1 missing", NORM]),
    "extra": (lambda m: _edit_tensors(m, lambda t: t.update(x=torch.ones(1))), [], ["1 unexpected", "x"]),
    "shape": (lambda m: _edit_tensors(m, lambda t: t.update({NORM: torch.ones(7)})), [], [NORM, "(7,)", "(32,)"]),
    "quantized": (
        lambda m: _edit_tensors(m, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        [],
        [NORM, "I8", "bf16"],
    ),
    "truncated": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]),
        [],
        ["model.safetensors is truncated"],
    ),
    "heads": (lambda m: None, ["--tp", "5"], ["parallel.tp=5", "feed-forward width 64"]),
    "no folder": (lambda m: m.rename(m.with_name("gone")), [], ["is not a folder"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_bad_models_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    damage, options, words = DAMAGE[what]
    model = save_tiny_model("qwen3", tmp_path / "model")
    damage(model)
    before = sorted(tmp_path.iterdir())
    message = refused(capsys, "hf-to-megatron", model, tmp_path / "out", *options)
    assert all(word in message for word in words), message
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_pads_them(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    convert("hf-to-megatron", model, tmp_path / "megatron", "--tp", 2)
    # 3 heads in 3 groups of (1 + 2) x 8 rows become 4
    shape = MegatronFolder(tmp_path / "megatron").shapes()["decoder.layers.self_attention.linear_qkv.weight"]
    assert shape == (2, 4 * 3 * 8, 24)


def _break_checkpoint(folder: Path, what: str) -> None:
    files = sorted(folder.glob("*.distcp"))
    if what == "truncated":
        files[0].write_bytes(files[0].read_bytes()[:-10])
    elif what == "missing file":
        files[0].unlink()
    elif what == "damaged":
        files[0].write_bytes(b"\0" * files[0].stat().st_size)
    elif what == "no metadata":
        (folder / ".metadata").unlink()
    elif what == "cut metadata":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:200])
    elif what == "other format":
        (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    else:
        changes = {"other model": {"num_hidden_layers": 3}, "untied": {"tie_word_embeddings": False}}
        _edit_config(folder, **changes[what])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "__0_0.distcp is truncated"),
        ("missing file", "lacks __0_0.distcp"),
        ("damaged", "__0_0.distcp is damaged at"),
        ("no metadata", "is not a distributed checkpoint"),
        ("cut metadata", "is not a whole distributed checkpoint"),
        ("other format", "'zarr'; supported: torch_dist"),
        ("other model", "of another shape: decoder.layers."),
        ("untied", "1 missing: output_layer.weight"),
    ],
)
def test_bad_checkpoints_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, words: str) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    convert("hf-to-megatron", model, tmp_path / "megatron")
    _break_checkpoint(tmp_path / "megatron", what)
    assert words in refused(capsys, "megatron-to-hf", tmp_path / "megatron", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]


class _Payload:
    """Unpickling it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    import pickle

    model = save_tiny_model("qwen3", tmp_path / "model")
    convert("hf-to-megatron", model, tmp_path / "megatron")
    (tmp_path / "megatron" / ".metadata").write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="mkdir does not belong"):
        MegatronFolder(tmp_path / "megatron")
    assert not (tmp_path / "ran").exists()


def test_existing_output_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "exists already" in refused(capsys, "hf-to-megatron", model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: less than the tiny model takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.processes
def test_a_full_disk_leaves_nothing(tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command looks at the free space first; where it goes while it writes, the error is as plain."""
    model = save_tiny_model("qwen3", tmp_path / "model")
    assert "B free; choose another disk" in refused(capsys, "hf-to-megatron", model, small_disk / "out")
    folder, arch = folders.checked_hf_folder(model, 1)
    with pytest.raises(OSError) as failed:
        folders.hf_to_megatron(
            folder, arch, small_disk / "out", dtype=None, max_file_bytes=10**9, advance=lambda _: None
        )
    assert failed.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as failed:
        folders.megatron_to_hf(
            ((name, folder.get(name)) for name in folder.names()),
            arch,
            small_disk / "out",
            dtypes=folders.hf_dtypes(folder, arch),
            like=model,
            max_shard_bytes=10**9,
            advance=lambda _: None,
        )
    assert failed.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_a_lost_bit_is_found(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    folder, arch = folders.checked_hf_folder(model, 1)
    dtypes = folders.hf_dtypes(folder, arch)
    changed = _bits(model)
    changed[NORM] = changed[NORM].clone()
    changed[NORM].view(torch.int32)[3] ^= 1
    with pytest.raises(RuntimeError, match=rf"{NORM} has other bits \(1 elements"):
        folders.compare(folder.get, dtypes, changed.items(), lambda _: None)
    with pytest.raises(RuntimeError, match=rf"1 tensors are missing: {NORM}"):
        folders.compare(folder.get, dtypes, ((n, t) for n, t in _bits(model).items() if n != NORM), lambda _: None)


def _verified_with_another_rope(rank: int, world_size: int, model: Path) -> str:
    import torch.distributed as dist

    from aer_megatron.conversion.logits import load_from_hf
    from aer_megatron.conversion.verify import verify_logits

    dist.destroy_process_group()  # the comparison makes its own
    folder, arch = folders.checked_hf_folder(model, 1)
    try:
        verify_logits(model, replace(arch, rope_theta=100.0), load_from_hf(arch, folder.get))
    except RuntimeError as error:
        return str(error)
    return "nothing was found"


@pytest.mark.processes
def test_verify_finds_other_mathematics(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    (found,) = run_distributed(_verified_with_another_rope, 1, model)
    assert "verification failed: logits" in found and "from transformers in fp64" in found


@pytest.mark.processes
def test_verify_compares_logits_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = save_tiny_model("qwen3", tmp_path / "model")
    for tool, source, output in (
        ("convert_hf_to_megatron", model, tmp_path / "megatron"),
        ("convert_megatron_to_hf", tmp_path / "megatron", tmp_path / "back"),
    ):
        done = subprocess.run(
            [sys.executable, str(TOOLS / f"{tool}.py"), str(source), str(output), "--verify"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(output)
        assert "24 tensors, names, shapes and bits" in done.stderr
        assert "most likely token differs at 0 positions" in done.stderr
