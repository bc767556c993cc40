"""Fuzz targets of what files hold: manifests, ledgers, metrics, flight records, model folders."""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from aer_megatron._C import DifficultyLedger
from aer_megatron.algo.entropy_rules.aer import Aer
from aer_megatron.checkpoint.manifest import FileEntry, Manifest, TensorLayout, manifest_from_json
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.convert.hf_folder import HFFolder
from aer_megatron.convert.megatron_folder import MegatronFolder, MegatronWriter
from aer_megatron.report.flight import FLIGHT_FILE, FlightWriter, read_flight
from aer_megatron.report.metrics import Metric
from aer_megatron.report.writer import METRICS_FILE, MetricsWriter, read_metrics
from benchmarks.reliability.fuzz_mutators import mutate_bytes, mutate_json, mutate_jsonl
from benchmarks.reliability.fuzz_target import Target, WrongAccept, target
from benchmarks.reliability.xxh64 import xxh64
from tests.support.flights import flight_records
from tests.support.runs import MODEL

_LEDGER_HEADER = struct.Struct("<8sIIdQ")
_LEDGER_RECORD = struct.Struct("<QddqIIIi")
_INDEX = "model.safetensors.index.json"
_MAX_SIZE = 2**40


def manifests() -> list[bytes]:
    """Returns the text of one manifest."""
    model = {"family": "qwen3", "num_layers": 2, "hidden_size": 96, "rope_theta": 10000.0, "moe": None}
    state = {
        "next_step": 4,
        "policy_version": 4,
        "controller": {"alpha": 0.125},
        "cursor": {"epoch": 0, "position": 32},
    }
    files = {
        "ledger": FileEntry("file", 0, 100, "ab" * 32),
        "model-tp00-pp00.safetensors": FileEntry("model", 0, 9, "0" * 64),
    }
    manifest = Manifest(
        step=4, num_updates=8, model=model, dtype="fp32",
        layout=TensorLayout(tp=1, pp=1, dp=1, padded_vocab=25, num_padding_groups=0, transformer_engine=False),
        versions={"torch": "2"}, state=state, files=files,
    )  # fmt: skip
    return [manifest.to_json().encode()]


def read_manifest(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a manifest that says something else than the one that was written."""
    path = folder / "manifest.json"
    found = manifest_from_json(data.decode("utf-8", "replace"), path)
    wanted = manifest_from_json(valid.decode(), path)
    if found != wanted:
        first = next(name for name in Manifest.__dataclass_fields__ if getattr(found, name) != getattr(wanted, name))
        raise WrongAccept(f"{first}: {getattr(found, first)!r:.80} was {getattr(wanted, first)!r:.80}")


def ledgers() -> list[bytes]:
    """Returns ledger files: of some prompts, and of none."""
    ledger = DifficultyLedger(0.95, 8)
    ids = np.array([3, 9, 2**63, 7], dtype=np.uint64)
    for step in range(3):
        attempts = np.full(4, 8, dtype=np.int64)
        ledger.update(ids, attempts, attempts // 2, np.full(4, 1.5), np.full(4, 40, dtype=np.int64), step=step)
    found = []
    with tempfile.TemporaryDirectory() as name:
        for item in (ledger, DifficultyLedger(0.95, 0)):
            item.save(str(Path(name) / "ledger"))
            found.append((Path(name) / "ledger").read_bytes())
    return found


def mutate_ledger(data: bytes, chance: random.Random) -> bytes:
    """Returns a damaged ledger file; half the time its checksum is right all the same."""
    damaged = mutate_bytes(data[:-8], chance)
    return damaged + (struct.pack("<Q", xxh64(damaged)) if chance.random() < 0.5 else data[-8:])


def read_ledger(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for damage that went unseen, or for records that no sequence of updates can make."""
    path = folder / "ledger"
    path.write_bytes(data)
    ledger = DifficultyLedger.load(str(path))
    rows = ledger.export()
    if data != valid and data[-8:] == valid[-8:]:
        raise WrongAccept(f"{len(data)} bytes differ from what the checksum is of")
    wins, losses = rows.decayed_successes, rows.decayed_failures
    attempts, successes = rows.attempts, rows.successes
    if np.any(successes > attempts) or np.any(wins < 0) or np.any(losses < 0):
        raise WrongAccept("successes beyond attempts, or negative sums")
    if np.any(wins > successes * (1 + 1e-9)) or np.any(losses > (attempts - successes) * (1 + 1e-9)):
        raise WrongAccept("decayed sums beyond lifetime counts")
    if not (np.isfinite(wins).all() and np.isfinite(losses).all() and 0 < ledger.decay <= 1):
        raise WrongAccept(f"not finite, or decay {ledger.decay}")
    if np.any(rows.last_step < 0) or np.any(rows.token_count < 0) or len(set(rows.prompt_ids.tolist())) != len(ledger):
        raise WrongAccept("a step or a token count below 0, or a prompt twice")


def metric_files() -> list[bytes]:
    """Returns a metrics.jsonl of three steps."""
    with tempfile.TemporaryDirectory() as name:
        writer = MetricsWriter(name)
        for step in range(3):
            writer.write({Metric.STEP: step, Metric.REWARD_MEAN: 0.25 * step, Metric.TIME_STEP: 1.5})
        return [(Path(name) / METRICS_FILE).read_bytes()]


def read_metric_file(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a line that is no step's."""
    path = folder / METRICS_FILE
    path.write_bytes(data)
    for row in read_metrics(path):
        if not isinstance(row, dict) or isinstance(row["step"], bool) or not isinstance(row["step"], int):
            raise WrongAccept(f"step: {row!r:.80}")
    path.write_bytes(data)
    writer = MetricsWriter(folder)
    writer.truncate_from(2)
    if path.exists() and any(json.loads(line)["step"] >= 2 for line in path.read_bytes().splitlines()):
        raise WrongAccept("a step beyond the resume step was kept")


def flight_files() -> list[bytes]:
    """Returns a flight.jsonl of three steps."""
    with tempfile.TemporaryDirectory() as name:
        writer = FlightWriter(name)
        for record in flight_records(Aer(), 3):
            writer.write(record)
        return [(Path(name) / FLIGHT_FILE).read_bytes()]


def read_flight_file(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a record whose numbers are none."""
    (folder / FLIGHT_FILE).write_bytes(data)
    for record in read_flight(folder):
        if isinstance(record.step, bool) or not isinstance(record.step, int) or record.step < 0:
            raise WrongAccept(f"step: {record.step!r:.60}")
        numbers = [record.coefficient, *record.clip_low, *record.clip_high, record.observation.entropy_sum]
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
            raise WrongAccept(f"numbers: {numbers!r:.80}")
        shapes = {np.shape(item) for item in (record.successes_P, record.counts_P, record.ledger_accuracy_P)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise WrongAccept(f"prompts: shapes {shapes}")
        if record.counts_P.dtype.kind not in "iu" or np.any(record.successes_P > record.counts_P):
            raise WrongAccept(f"counts: {record.successes_P!r:.40} of {record.counts_P!r:.40}")


def model_configs() -> list[bytes]:
    """Returns config.json files: the quick start's and those of the plan's examples."""
    plans = sorted((MODEL.parents[1] / "plan").glob("*/config.json"))
    return [path.read_bytes() for path in (MODEL / "config.json", *plans)]


def read_model_config(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a model that cannot be."""
    path = folder / "model"
    if not path.exists():
        path.mkdir()
        (path / "model.safetensors").write_bytes(_tensors())
    (path / "config.json").write_bytes(data)
    arch = architecture_from_hf_config(HFFolder(path).config)
    sizes = [arch.num_layers, arch.hidden_size, arch.ffn_hidden_size, arch.num_heads, arch.num_kv_heads, arch.head_dim]
    sizes += [arch.vocab_size, arch.max_positions]
    sizes += [arch.moe.num_experts, arch.moe.top_k, arch.moe.ffn_hidden_size] if arch.moe else []
    if any(type(size) is not int or not 0 < size < _MAX_SIZE for size in sizes):
        raise WrongAccept(f"sizes: {sizes!r:.100}")
    for name, value in (("rope_theta", arch.rope_theta), ("norm_eps", arch.norm_eps)):
        if not math.isfinite(value) or value <= 0:
            raise WrongAccept(f"{name}: {value!r}")
    if not isinstance(arch.tied_embeddings, bool):
        raise WrongAccept(f"tied_embeddings: {arch.tied_embeddings!r:.40}")


def indices() -> list[bytes]:
    """Returns one safetensors index over the two files that ``read_index`` lays beside it."""
    weight_map = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    return [json.dumps({"metadata": {"total_size": 64}, "weight_map": weight_map}).encode()]


def read_index(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for tensors that are not in the folder's files."""
    path = folder / "sharded"
    if not path.exists():
        path.mkdir()
        (path / "config.json").write_text("{}")
        for number, name in ((1, "a.weight"), (2, "b.weight")):
            (path / f"model-{number}.safetensors").write_bytes(save({name: torch.ones(2, 4)}))
        (folder / "outside.safetensors").write_bytes(save({"c.weight": torch.ones(1)}))
    (path / _INDEX).write_bytes(data)
    found = HFFolder(path)
    if not set(found.names()) <= {"a.weight", "b.weight"}:
        raise WrongAccept(f"names: {found.names()!r:.80}")
    _read_all(found)


def tensor_files() -> list[bytes]:
    """Returns one small safetensors file."""
    return [_tensors()]


def mutate_tensors(data: bytes, chance: random.Random) -> bytes:
    """Returns a damaged safetensors file: its header as JSON, its length, or any bytes."""
    kind = chance.random()
    if kind < 0.2:
        return mutate_bytes(data, chance)
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if kind < 0.3:
        return struct.pack("<Q", chance.choice((0, 1, length + 1, len(data), 2**40, 2**63, 2**64 - 1))) + data[8:]
    header = mutate_json(header, chance)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def read_tensor_file(valid: bytes, data: bytes, folder: Path) -> None:
    """Reads every tensor; what they hold is free."""
    path = folder / "single"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(data)
    _read_all(HFFolder(path))


def megatron_tables() -> list[bytes]:
    """Returns the .metadata of a small distributed checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        _megatron_folder(Path(name))
        return [(Path(name) / ".metadata").read_bytes()]


def mutate_pickle(data: bytes, chance: random.Random) -> bytes:
    """Returns a damaged pickle, now and then one that names other code."""
    if chance.random() < 0.7:
        return mutate_bytes(data, chance)
    module, name = chance.choice(
        (("os", "system"), ("builtins", "eval"), ("torch.distributed.checkpoint.metadata", "os.system"),
         ("torch.distributed.checkpoint.metadata", "pickle"), ("subprocess", "Popen"), ("aer_canary", "run"))
    )  # fmt: skip
    call = b"c" + f"{module}\n{name}\n".encode() + b"(X\x04\x00\x00\x00truetR"
    place = data.find(b"}") if chance.random() < 0.5 else 2
    return data[:place] + call + b"0" + data[place:]


def read_megatron_table(valid: bytes, data: bytes, folder: Path) -> None:
    """Reads a folder with a damaged table of contents, and every tensor that it then names."""
    path = folder / "megatron"
    if not path.exists():
        path.mkdir()
        _megatron_folder(path)
    (path / ".metadata").write_bytes(data)
    found = MegatronFolder(path)
    for key, shape in found.shapes().items():
        if not isinstance(key, str) or any(type(size) is not int or size < 0 for size in shape):
            raise WrongAccept(f"shape: {key!r:.40} {shape!r:.40}")
        if math.prod(shape) < 10**6:
            found.dtype(key)
            found.read(key, ())


def _megatron_folder(path: Path) -> None:
    with MegatronWriter(path, max_file_bytes=10**6) as writer:
        for row in range(2):
            writer.add("decoder.weight", torch.full((2, 3), float(row)), offset=(2 * row, 0), whole=(4, 3))
        writer.add("norm.weight", torch.ones(3), offset=(0,), whole=(3,))
        writer.finish()


def _tensors() -> bytes:
    data: bytes = save({"a.weight": torch.arange(8.0).reshape(2, 4), "b.bias": torch.ones(3, dtype=torch.bfloat16)})
    return data


def _read_all(folder: HFFolder) -> None:
    shapes: dict[str, Any] = folder.shapes()
    for name in folder.names():
        folder.dtype(name)
        if tuple(folder.get(name).shape) != shapes[name]:
            raise WrongAccept(f"{name}: shape {shapes[name]} in the header")


FILE_TARGETS: tuple[Target, ...] = (
    target("manifest", manifests, mutate_json, read_manifest, share=20),
    target("ledger", ledgers, mutate_ledger, read_ledger, share=20),
    target("metrics", metric_files, mutate_jsonl, read_metric_file),
    target("flight", flight_files, mutate_jsonl, read_flight_file),
    target("model_config", model_configs, mutate_json, read_model_config, share=14),
    target("index", indices, mutate_json, read_index, share=8),
    target("tensors", tensor_files, mutate_tensors, read_tensor_file, share=8),
    target("megatron", megatron_tables, mutate_pickle, read_megatron_table, share=14),
)
