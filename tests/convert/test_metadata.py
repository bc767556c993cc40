"""The metadata of a foreign distributed checkpoint: what Megatron wrote is read, what anybody wrote runs nothing."""

from __future__ import annotations

import contextlib
import json
import pickle
import pickletools
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from aer_megatron.conversion.logits import load_distributed
from aer_megatron.convert.megatron_folder import MegatronFolder
from aer_megatron.convert.megatron_metadata import ByteRange, Chunk, TensorEntry, read_tables


def entry(*chunks: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> TensorStorageMetadata:
    found = [ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([2, 3])) for (start,) in chunks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([4, 3]), found)


def metadata(**changes: Any) -> Metadata:
    index = MetadataIndex("layer.weight", torch.Size([2, 0]), 1)
    fields: dict[str, Any] = {
        "state_dict_metadata": {"layer.weight": entry((0,), (2,)), "layer._extra_state": BytesStorageMetadata()},
        "storage_data": {
            MetadataIndex("layer.weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 100),
            index: _StorageInfo("__0_1.distcp", 100, 50),
            MetadataIndex("layer._extra_state"): _StorageInfo("__0_0.distcp", 100, 7),
        },
        "storage_meta": StorageMeta(checkpoint_id="/somewhere", save_id="x"),
    }
    found = Metadata(**(fields | changes))
    found.all_local_plans = [SavePlan([WriteItem(index, WriteItemType.TENSOR)])]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_tables_are_those_that_were_written(protocol: int) -> None:
    tables = read_tables(pickle.dumps(metadata(), protocol=protocol))
    chunks = (Chunk((0, 0), (2, 3)), Chunk((2, 0), (2, 3)))
    assert tables.tensors == {"layer.weight": TensorEntry((4, 3), torch.bfloat16, chunks)}
    assert tables.byte_ranges == {
        ("layer.weight", (0, 0)): ByteRange("__0_0.distcp", 0, 100),
        ("layer.weight", (2, 0)): ByteRange("__0_1.distcp", 100, 50),
        ("layer._extra_state", None): ByteRange("__0_0.distcp", 100, 7),
    }


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    module = "aer_never_imported_by_anybody"
    (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        for name in (module, "os", "builtins", "torch.distributed.checkpoint.planner", "torch.distributed.checkpoint"):
            for raw in (f"c{name}\nsystem\n.", f"c{name}\nMetadata.__init__\n."):
                with pytest.raises(ValueError, match="does not belong into a checkpoint's metadata"):
                    read_tables(raw.encode())
    finally:
        sys.path.remove(str(tmp_path))
    assert module not in sys.modules
    marker = tmp_path / "ran"
    for payload in (Call(Path.mkdir, marker), {"a": [Call(exec, f"open({str(marker)!r}, 'w')")]}):
        with pytest.raises(ValueError, match="does not belong"):
            read_tables(pickle.dumps(payload))
        with pytest.raises(ValueError, match="does not belong"):
            read_tables(pickle.dumps(metadata(planner_data=payload)))
    assert not marker.exists()


def test_what_is_named_is_never_made() -> None:
    # torch.Size is called with what would take all memory, Metadata gets attributes of its class
    raw = pickle.dumps(metadata(planner_data=Call(torch.serialization._get_layout, "no such layout")))
    assert read_tables(raw).tensors  # the program's call is not made: it would raise KeyError
    with pytest.raises(ValueError, match="given a state that is no object"):
        read_tables(b"\x80\x02}}b.")


M = "torch.distributed.checkpoint.metadata\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"N.",
        b"\x80\x04N.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x7fN.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a text of 2^63 bytes
        f"\x80\x02c{M}Metadata\n)\x81.".encode("latin-1"),
        b"Nr\xff\xff\xff\xff.",  # memo number 2^32 - 1: the machine in C reserves 64 GB
        b"I" + b"9" * 5000 + b"\n.",
        b"\x8b\xff\xff\xff\x7f.",
        b"(" * 1000 + b".",
        b")" + b"\x85" * 50_000 + b"}Nsq\x00N.",
        b"}" + b")" + b"\x85" * 50_000 + b"Ns.",  # a key 50,000 tuples deep: computing its hash ends the process
        b"\x82\x01.",
        b"Pabc\n.",
        b"(ios\nsystem\n.",
        b"\x80\x02ccopy_reg\n_reconstructor\n.",
    ],
)
def test_what_is_no_metadata_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        read_tables(raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict_metadata": None},
        {"state_dict_metadata": [1]},
        {"storage_data": None},
        {"storage_data": {"a": "b"}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("../a", 0, 1)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("/etc/passwd", 0, 1)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("a\0b", 0, 1)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("a", -1, 1)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("a", 0, 2**63)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("a", 0, 1.5)}},  # type: ignore[arg-type]
        {"storage_data": {MetadataIndex(3): _StorageInfo("a", 0, 1)}},  # type: ignore[arg-type]
        {"state_dict_metadata": {"a": TensorStorageMetadata(None, torch.Size([1]), [])}},  # type: ignore[arg-type]
        {"state_dict_metadata": {"a": TensorStorageMetadata(TensorProperties(), torch.Size([1]), None)}},  # type: ignore[arg-type]
        {"state_dict_metadata": {"a": TensorStorageMetadata(TensorProperties(), [1], [])}},  # type: ignore[arg-type]
        {"state_dict_metadata": {"a": TensorStorageMetadata(TensorProperties(), torch.Size([1] * 99), [])}},
        {"state_dict_metadata": {"a": TensorStorageMetadata(TensorProperties(), torch.Size([1]), [3])}},  # type: ignore[list-item]
    ],
    ids=range(16),
)
def test_tables_of_another_shape_are_value_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        read_tables(pickle.dumps(metadata(**changes)))


def test_a_list_that_many_tensors_share_is_not_read_again_and_again() -> None:
    shared = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))] * 20_000
    tables = {
        f"t{number}": TensorStorageMetadata(TensorProperties(), torch.Size([4, 3]), shared) for number in range(2_000)
    }
    raw = pickle.dumps(metadata(state_dict_metadata=tables))
    begin = time.process_time()
    with pytest.raises(ValueError, match="repeats its chunks"):
        read_tables(raw)
    assert time.process_time() - begin < 5.0


@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(pickle.dumps(metadata()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]
    with contextlib.suppress(ValueError):
        read_tables(bytes(raw))


@given(st.lists(st.sampled_from([op for op in pickletools.opcodes if op.arg is None]), max_size=30))
def test_any_program_without_arguments_is_refused(opcodes: list[pickletools.OpcodeInfo]) -> None:
    with pytest.raises(ValueError):
        read_tables("".join(op.code for op in opcodes).encode("latin-1") + b".")


def test_megatrons_own_loader_is_given_only_what_was_checked(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    marker = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata(planner_data=Call(Path.mkdir, marker))))
    with pytest.raises(ValueError, match="does not belong into a checkpoint's metadata"):
        load_distributed(None, tmp_path)  # type: ignore[arg-type]
    assert not marker.exists()


def test_a_memo_number_beyond_the_file_is_refused() -> None:
    # other readers reserve memory for it
    raw = pickle.dumps(metadata(), protocol=2)
    with pytest.raises(ValueError, match="a memo number beyond the size of the file"):
        read_tables(raw[:2] + b"Nr\xff\xff\xff\x7f0" + raw[2:])


def test_the_folder_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"is not a whole distributed checkpoint: \.metadata is"):
        MegatronFolder(tmp_path)
    for text in ("", "[1]", "{", '{"sharded_backend": 3}'):
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=r"metadata\.json|has the format '3'"):
            MegatronFolder(tmp_path)
