"""Faults of a trainer, each planted by a patch of one function, and the doctor on a tiny policy under them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from aer_megatron.config import Config
from aer_megatron.config_loading import load_config
from aer_megatron.parallel.platform import Platform, install_platform
from tests.support.runs import MODEL, write_run_file

FIRST_Q = "model.layers.0.self_attn.q_proj.weight"
SECOND_Q = "model.layers.1.self_attn.q_proj.weight"
STALE = "model.layers.2.mlp.up_proj.weight"
ENGINE_TEMPERATURE = 0.7
WRONG_BASE = 1e6


def write_policy(folder: Path) -> Path:
    """Returns the run file of a tiny random policy below ``folder``, its outputs far from uniform."""
    import torch

    from aer_megatron.compose.common import architecture
    from aer_megatron.convert.hf_writer import write_hf_folder
    from aer_megatron.convert.mapping import hf_names, hf_specs
    from aer_megatron.convert.random_weights import random_hf_weights

    source = folder / "source"
    shutil.copytree(MODEL, source)
    table = json.loads((source / "config.json").read_text(encoding="utf-8"))
    table |= {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_hidden_layers": 4}
    table |= {"initializer_range": 0.2}
    (source / "config.json").write_text(json.dumps(table), encoding="utf-8")
    get = random_hf_weights(source, 0)
    arch = architecture(str(source))
    write_hf_folder(
        folder / "base",
        ((name, get(name)) for name in hf_names(arch)),
        hf_specs(arch, torch.float32),
        config=table,
        like=source,
    )
    return write_run_file(folder)


def examine(config: Config, rank: int, world_size: int, *, reference: Any = "auto") -> Any:
    """Returns the doctor's examination on the calling ranks."""
    from aer_megatron.doctor.examination import Examiner

    install_platform()
    platform = Platform("cpu", "gloo", rank, world_size, rank)
    return Examiner(config, platform, reference=reference, on_phase=lambda phase: None).examine()


def run_config(run_file: Path, *overrides: str) -> Config:
    """Returns the configuration of ``write_policy``'s run file."""
    return load_config(run_file, ["--eval.sets={}", *overrides])


@contextmanager
def few_layouts(*names: str) -> Iterator[None]:
    """Only the run's layout and those of ``names`` are measured, to save a test's time."""
    from aer_megatron.doctor import layouts as doctor_layouts

    whole = doctor_layouts._table

    def table(*arguments: Any) -> Iterator[Any]:
        yield from (row for row in whole(*arguments) if row[0] in (doctor_layouts.OWN, *names))

    with mock.patch.object(doctor_layouts, "_table", table):
        yield


@contextmanager
def swapped_weight() -> Iterator[None]:
    """The loader takes the query projections of two layers for one another."""
    from aer_megatron.actor import actor

    load = actor.load_hf_weights
    other = {FIRST_Q: SECOND_Q, SECOND_Q: FIRST_Q}

    def swapped(model: Any, arch: Any, topology: Any, get: Callable[[str], Any]) -> None:
        load(model, arch, topology, lambda name: get(other.get(name, name)))

    with mock.patch.object(actor, "load_hf_weights", swapped):
        yield


@contextmanager
def wrong_rope_base() -> Iterator[None]:
    """Megatron's model is built with another rope base than config.json says."""
    from aer_megatron.actor import model

    arguments = model.gpt_arguments

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return arguments(*args, **kwargs) | {"rotary_base": WRONG_BASE}

    with mock.patch.object(model, "gpt_arguments", changed):
        yield


@contextmanager
def dropped_all_reduce() -> Iterator[None]:
    """Data-parallel replicas keep their own gradients."""
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "finish_grad_sync", lambda self, *args, **kwargs: None):
        yield


@contextmanager
def stale_rollout_weight() -> Iterator[None]:
    """The engine reports every tensor that it received and puts all but one into service."""
    from aer_megatron.rollout.embedded import EmbeddedEngine

    commit = EmbeddedEngine.commit_weights

    def forgetful(self: Any, version: int) -> None:
        if version > 0:
            del self._received[STALE]
        commit(self, version)

    with mock.patch.object(EmbeddedEngine, "commit_weights", forgetful):
        yield


@contextmanager
def wrong_temperature() -> Iterator[None]:
    """The engine samples at another temperature than it is asked for."""
    from aer_megatron.rollout.embedded import EmbeddedEngine

    generate = EmbeddedEngine.generate

    def colder(self: Any, requests: Any, options: Any) -> Any:
        return generate(self, requests, replace(options, temperature=ENGINE_TEMPERATURE))

    with mock.patch.object(EmbeddedEngine, "generate", colder):
        yield


@contextmanager
def exchanged_both_ways() -> Iterator[None]:
    """Gate and up are taken for one another on the way in and on the way out: the round trip cannot see it."""
    from aer_megatron.actor import actor

    load, export = actor.load_hf_weights, actor.iter_hf_weights

    def other(name: str) -> str:
        swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return ".".join(swap.get(part, part) for part in name.split("."))

    def swapped_in(model: Any, arch: Any, topology: Any, get: Callable[[str], Any]) -> None:
        load(model, arch, topology, lambda name: get(other(name)))

    def swapped_out(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from ((other(name), tensor) for name, tensor in export(*args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(actor, "load_hf_weights", swapped_in))
        stack.enter_context(mock.patch.object(actor, "iter_hf_weights", swapped_out))
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": nullcontext,
    "swapped weight": swapped_weight,
    "wrong rope base": wrong_rope_base,
    "dropped gradient all-reduce": dropped_all_reduce,
    "stale rollout weight": stale_rollout_weight,
    "wrong temperature": wrong_temperature,
    "exchanged both ways": exchanged_both_ways,
}
