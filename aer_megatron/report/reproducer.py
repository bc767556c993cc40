"""The folder of one kept update: its batch, its seed, its options and the weights that it began with.

    run/nonfinite/step_000012/reproducer.json     step, seed, options, the diagnosis
                              batch.safetensors   the arrays of the TrainBatch
                              weights/            a Hugging Face folder, where they were kept

JSON and safetensors only; what is read is checked before it is used. This file does NOT compute anything.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aer_megatron.algo.experience import sampled_mask
from aer_megatron.config import Config
from aer_megatron.config_loading import parse_overrides
from aer_megatron.config_section import overridden, refuse_recorded_code
from aer_megatron.types import Experience, TrainBatch

FORMAT = 1
DESCRIPTION_FILE = "reproducer.json"
BATCH_FILE = "batch.safetensors"
WEIGHTS_FOLDER = "weights"
_NAME = re.compile(r"step_\d{6,}(-\d+)?")
_MAX_DESCRIPTION_BYTES = 16 * 10**6
_PREFIX = "experience."
# what an update depends on; the rest of a run's options (servers, their keys, data) stays out of the folder
_OPTIONS: dict[str, set[str] | None] = {
    "model": None,
    "parallel": None,
    "megatron": None,
    "optimizer": None,
    "algo": None,
    "run": {"name", "seed", "hang_timeout_s"},
    "report": {"flight_recorder"},
    "data": {"max_prompt_tokens"},
    "rollout": {"prompts_per_step", "group_size", "temperature", "max_new_tokens"},
}
_DTYPES = {
    "prompt_id_B": np.uint64,
    "rollout_logprob_T": np.float32,
    "reward_B": np.float64,
    "truncated_B": np.bool_,
    "sampled_L": np.bool_,
    "advantage_B": np.float64,
    "entropy_weight_B": np.float64,
    "old_logprob_T": np.float32,
    "ref_logprob_T": np.float32,
}  # int64 where nothing else is said


@dataclass(frozen=True, slots=True)
class KeptUpdate:
    """One update as ``Actor.train`` is asked for it; ``num_updates`` had been applied before it."""

    step: int
    seed: int
    minibatch: int | None  # None: all of the step's
    num_updates: int
    entropy_gradient: bool
    batch: TrainBatch

    @property
    def folder_name(self) -> str:
        """The name of its folder, for example ``step_000012``; later mini-batches of a step carry their number."""
        return f"step_{self.step:06d}" + (f"-{self.minibatch}" if self.minibatch else "")


@dataclass(frozen=True, slots=True)
class Reproducer:
    """What a folder holds. ``description`` is the rest of its JSON: "diagnosis", "weights", "ranks", ..."""

    folder: Path
    update: KeptUpdate
    config: Config
    description: Mapping[str, Any]


def write_reproducer(folder: Path, update: KeptUpdate, config: Config, more: Mapping[str, Any]) -> None:
    """Writes batch and description into ``folder``, which exists; ``more`` goes into the JSON.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {f"{_PREFIX}{name}": value for name, value in _fields(update.batch.experience).items()}
    arrays |= {name: value for name, value in _fields(update.batch).items() if name != "experience"}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / BATCH_FILE)
    resolved = config.model_dump(mode="json")
    options = {
        section: resolved[section] if keys is None else {key: resolved[section][key] for key in keys}
        for section, keys in _OPTIONS.items()
    }
    numbers = {name: value for name, value in _fields(update).items() if name != "batch"}
    table = {"format": FORMAT, **numbers, **more, "config": options}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def read_reproducer(folder: str | Path, overrides: Sequence[str] = (), *, trusted: bool = False) -> Reproducer:
    """Returns the content of a folder that ``write_reproducer`` filled; ``key.sub=value`` overrides win over it.

    ``trusted``: classes that its options name may be imported.

    Raises:
        ValueError: there is none, or it is damaged: a number, an option or an array that does not fit the others.
    """
    folder = Path(folder)
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION_FILE}; give a folder below nonfinite/ or recorded/ of a run")
    if file.stat().st_size > _MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than a description can have")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        config = _config(table, overrides, trusted)
        numbers = {
            name: _number(table, name, optional=name == "minibatch")
            for name in ("step", "seed", "minibatch", "num_updates")
        }
        if table.get("format") != FORMAT or not isinstance(table.get("entropy_gradient"), bool):
            raise ValueError(f"format {table.get('format')!r} with entropy_gradient={table.get('entropy_gradient')!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} does not describe a kept update: {error}") from None
    batch = _read_batch(folder / BATCH_FILE)
    update = KeptUpdate(**numbers, entropy_gradient=table["entropy_gradient"], batch=batch)
    return Reproducer(folder, update, config, table)


def prune_reproducers(parent: Path, keep: int) -> None:
    """Removes all but the ``keep`` newest of the folders that ``write_reproducer`` filled below ``parent``."""
    found = [path for path in parent.iterdir() if _NAME.fullmatch(path.name) and (path / DESCRIPTION_FILE).is_file()]
    for path in sorted(found, key=lambda each: (each / DESCRIPTION_FILE).stat().st_mtime_ns)[: len(found) - keep]:
        shutil.rmtree(path)


def _config(table: Mapping[str, Any], overrides: Sequence[str], trusted: bool) -> Config:
    options: dict[str, Any] = {section: {**table["config"][section]} for section in _OPTIONS}
    options["data"]["train"] = {"task": "countdown"}  # a configuration names one; it is not read
    refuse_recorded_code(options, DESCRIPTION_FILE, trusted=trusted)
    return Config.from_table(overridden(Config, options, parse_overrides(overrides))[0])


def _number(table: Mapping[str, Any], name: str, *, optional: bool) -> Any:
    value = table.get(name)
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name}={value!r} must be a whole number >= 0")
    return value


def _read_batch(file: Path) -> TrainBatch:
    try:
        arrays = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    names = [field.name for field in dataclasses.fields(Experience)]
    expected = {f"{_PREFIX}{name}" for name in names} | {"advantage_B", "entropy_weight_B", "old_logprob_T"}
    optional = {f"{_PREFIX}sampled_L", "ref_logprob_T"}
    missing = sorted(expected - optional - set(arrays))
    extra = sorted(set(arrays) - expected - optional)
    if missing or extra:
        raise ValueError(f"{file}: missing {missing}, unexpected {extra}")
    for name, values in arrays.items():
        dtype = np.dtype(_DTYPES.get(name.removeprefix(_PREFIX), np.int64))
        if values.ndim != 1 or values.dtype != dtype:
            raise ValueError(f"{file}: {name} is {values.dtype} {values.shape}, expected one axis of {dtype}")
    experience = Experience(**{name: arrays.get(_PREFIX + name) for name in names})  # type: ignore[arg-type]
    _check_lengths(file, experience, arrays)
    return TrainBatch(
        experience=experience,
        advantage_B=arrays["advantage_B"],
        entropy_weight_B=arrays["entropy_weight_B"],
        old_logprob_T=arrays["old_logprob_T"],
        ref_logprob_T=arrays.get("ref_logprob_T"),
    )


def _check_lengths(file: Path, experience: Experience, arrays: Mapping[str, NDArray[Any]]) -> None:
    prompt_B, response_B = experience.prompt_length_B, experience.response_length_B
    limit = len(experience.token_ids_L)
    if not len(prompt_B) or len(prompt_B) != len(response_B):
        raise ValueError(f"{file}: {len(prompt_B)} prompts and {len(response_B)} responses")
    if not all(bool(((each >= 1) & (each <= limit)).all()) for each in (prompt_B, response_B)):
        raise ValueError(f"{file}: a prompt or response has no token, or more than there are")
    _check_sizes(file, arrays, {"B": len(prompt_B), "L": int(experience.length_B.sum())})
    if experience.sampled_L is not None:
        responses_L = sampled_mask(dataclasses.replace(experience, sampled_L=None))
        if (experience.sampled_L & ~responses_L).any() or not experience.sampled_length_B.all():
            raise ValueError(f"{file}: sampled_L names a token of a prompt, or no token of a response")
    _check_sizes(file, arrays, {"T": experience.num_sampled_tokens})


def _check_sizes(file: Path, arrays: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> None:
    for name, values in arrays.items():
        if name[-1] in sizes and len(values) != sizes[name[-1]]:
            raise ValueError(f"{file}: {name} has {len(values)} entries, expected {sizes[name[-1]]}")


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
