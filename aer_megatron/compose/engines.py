"""The rollout engine and the way that weights reach it: in this process, or SGLang servers over HTTP."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from transformers import AutoConfig

from aer_megatron.actor.model import TORCH_DTYPES
from aer_megatron.compose.common import architecture
from aer_megatron.compose.quantization import fp8_checkpoint, is_fp8
from aer_megatron.config import Config
from aer_megatron.convert.hf_writer import MAX_SHARD_BYTES
from aer_megatron.files.json_input import read_json_object
from aer_megatron.loop.parts import WeightSync
from aer_megatron.options.rollout import SglangSection
from aer_megatron.parallel.agreement import on_first_rank
from aer_megatron.parallel.platform import Platform
from aer_megatron.rollout.embedded import EmbeddedEngine
from aer_megatron.rollout.engine import RolloutEngine
from aer_megatron.rollout.in_process import InProcessSync
from aer_megatron.sglang.addresses import allow_open_files, is_loopback, without_proxies
from aer_megatron.sglang.calls import RequestLimits
from aer_megatron.sglang.engine import SGLangEngine
from aer_megatron.sglang.fleet import ServerFleet
from aer_megatron.sglang.http_loop import ClientOptions
from aer_megatron.sglang.labels import ServedLabels, WeightLabels, new_run_id
from aer_megatron.sglang.publication import WeightPublisher
from aer_megatron.sglang.server import LaunchOptions, ServerGroup
from aer_megatron.sglang.supervisor import Supervisor
from aer_megatron.sglang.transports import TransportOptions, make_transport
from aer_megatron.sglang.weight_servers import WeightServers

_LOG = logging.getLogger(__name__)
_KEY_BYTES = 32
_MAX_SERVED = 4096  # characters of what a server says of its weights
_OTHER_FILES = 512  # open beside the connections to servers: data, logs, collectives
_EVERY_ADDRESS = ("0.0.0.0", "::")
_OWN_OPTIONS_AT = {
    "model_path": "model.path",
    "host": "sglang.host",
    "port": "sglang.host: each server gets a free port",
    "api_key": "sglang.api_key_env: a command line is everybody's to read",
    "config": "[sglang.launch] for what the file holds",
}
SERVER_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def build_engine(config: Config, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, WeightSync]:
    """Returns the engine that ``rollout.engine`` names and what gives it weights; ``stack`` closes them."""
    return ENGINES[config.rollout.engine](config, platform, stack)


def embedded_engine(config: Config, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, WeightSync]:
    """Returns an engine in this process."""
    engine = EmbeddedEngine(
        AutoConfig.from_pretrained(config.model.path),
        dtype=TORCH_DTYPES[config.model.dtype],
        device=platform.device,
        max_batch_size=config.rollout.max_batch_size,
    )
    stack.callback(engine.close)
    return engine, InProcessSync(engine, fp8=is_fp8(config))


def sglang_engine(config: Config, platform: Platform, stack: ExitStack) -> tuple[RolloutEngine, WeightSync]:
    """Returns an engine over servers, which rank 0 launches where the run file says so."""
    options = config.sglang
    _check_release(config)
    _allow_connections(config)
    # what is entered first ends last: servers, who watches them, the connections to them
    urls, api_key, group = _servers(config, platform, stack)
    supervisor = stack.enter_context(Supervisor(group)) if group else None
    fleet = _open_fleet(config, urls, api_key, stack)
    if options.router_url and group:  # their addresses end with the run
        stack.callback(fleet.leave_router)
    # weights, labelled as this launch's: another one, of the same run too, never takes what they sampled for its own
    arch = architecture(config.model.path)
    labels = WeightLabels(on_first_rank(new_run_id, rank=platform.rank, device=platform.device))
    servers = WeightServers(fleet, arch, labels, timeout_s=options.transfer_timeout_s, fp8=is_fp8(config), group=group)
    transport = make_transport(options.transport, servers, _transport_options(config, platform))
    stack.callback(transport.close)
    publisher = WeightPublisher(servers, transport, platform, recovery_s=options.recovery_timeout_s)
    if supervisor:
        supervisor.watch(publisher)
    return SGLangEngine(fleet, _request_limits(options), labels=labels, vocab_size=arch.vocab_size), publisher


def serving_engine(config: Config, stack: ExitStack) -> tuple[RolloutEngine, dict[str, str]]:
    """Returns (an engine over the servers of sglang.urls with the weights that they hold, what they say of those).

    Nothing is sent to them but requests. Where their weights change meanwhile, they are out of service.

    Raises:
        RuntimeError: a server does not answer, or they do not serve the same weights.
    """
    options = config.sglang
    _allow_connections(config)
    fleet = _open_fleet(config, options.urls, _api_key(config), stack)
    found = [_served_by(fleet, index) for index in range(len(options.urls))]
    for url, served in zip(options.urls, found, strict=True):
        if served != found[0]:
            raise RuntimeError(f"{url} serves {served} and {options.urls[0]} {found[0]}; name servers of one policy")
    fleet.serve(0, {})
    labels = ServedLabels(found[0]["weight_version"])
    vocab_size = architecture(config.model.path).vocab_size
    return SGLangEngine(fleet, _request_limits(options), labels=labels, vocab_size=vocab_size), found[0]


def _served_by(fleet: ServerFleet, index: int) -> dict[str, str]:
    reply = fleet.control(index, "/model_info")
    table = reply.json()
    known = table if reply.status == 200 and isinstance(table, dict) else {}
    served = {"model_path": known.get("model_path", ""), "weight_version": known.get("weight_version")}
    if not all(isinstance(value, str) and len(value) <= _MAX_SERVED for value in served.values()):
        raise RuntimeError(f"{fleet.servers[index].url}: /model_info says no weight_version: {reply.text}")
    return {name: str(value) for name, value in served.items()}


def _allow_connections(config: Config) -> None:
    options = config.sglang
    allow_open_files(options.max_concurrency * (len(options.urls) + options.num_servers) + _OTHER_FILES)


def _open_fleet(config: Config, urls: Sequence[str], api_key: str | None, stack: ExitStack) -> ServerFleet:
    options = config.sglang
    client = ClientOptions(
        max_concurrency=options.max_concurrency,
        connect_timeout_s=options.connect_timeout_s,
        control_timeout_s=options.control_timeout_s,
        api_key=api_key,
    )
    fleet = stack.enter_context(ServerFleet(urls, client))
    if options.router_url:
        fleet.route_through(options.router_url)
    return fleet


def _request_limits(options: SglangSection) -> RequestLimits:
    return RequestLimits(
        request_timeout_s=options.request_timeout_s,
        max_attempts=options.max_attempts,
        max_failures=options.max_failures,
        recovery_timeout_s=options.recovery_timeout_s,
        probe_interval_s=options.probe_interval_s,
    )


ENGINES = {"embedded": embedded_engine, "sglang": sglang_engine}


def _servers(config: Config, platform: Platform, stack: ExitStack) -> tuple[list[str], str | None, ServerGroup | None]:
    """Returns the servers' addresses and API key, and, on the rank that launched them, their processes."""
    options, given = config.sglang, _api_key(config)
    if not options.num_servers:
        exposed = [url for url in options.urls if not is_loopback(urlsplit(url).hostname or "")]
        if exposed and not given and platform.rank == 0:
            _LOG.warning(
                "%s: without an API key whoever reaches a server can change its weights; start the servers with one, "
                "and name its environment variable in sglang.api_key_env",
                ", ".join(exposed),
            )
        return list(options.urls), given, None
    groups: list[ServerGroup] = []

    def launch() -> tuple[list[str], str]:
        key = given or secrets.token_hex(_KEY_BYTES)  # nobody else on this machine, or beyond it, has it
        launched = _launch_options(config, str(_served_folder(config)), key)
        groups.append(stack.enter_context(ServerGroup(options.num_servers, launched)))
        return groups[0].start(), key

    urls, key = on_first_rank(launch, rank=platform.rank, device=platform.device)
    return urls, key, groups[0] if groups else None


def _transport_options(config: Config, platform: Platform) -> TransportOptions:
    options, output = config.sglang, Path(config.run.output_dir)
    return TransportOptions(
        folder=Path(options.transfer_dir or output / "weights"),
        owner=str(output.absolute()),
        hf_config=read_json_object(Path(config.model.path) / "config.json"),
        max_shard_bytes=MAX_SHARD_BYTES,
        backend=platform.backend,
        address=options.trainer_address,
        bucket_bytes=options.bucket_mb * 10**6,
    )


def check_server_options(config: Config) -> None:
    """Raises ValueError where an option of [sglang] is wrong, as far as that shows without asking any server."""
    _check_release(config)
    key = _api_key(config)
    if config.sglang.num_servers:
        launch = _launch_options(config, config.model.path, key or "")
        if shutil.which(launch.python) is None:
            raise ValueError(f"sglang.python={launch.python!r} is no program; give the interpreter that has SGLang")


def _check_release(config: Config) -> None:
    options = config.sglang
    if not options.release_memory:
        return
    if config.rollout.staleness:
        raise ValueError(
            f"sglang.release_memory=true takes the servers' memory while the policy trains, and rollout.staleness="
            f"{config.rollout.staleness} has them generate then; set one of them to off"
        )
    if options.num_servers and not options.launch.get("enable_memory_saver") and options.launch.get("device") != "cpu":
        raise ValueError(
            "sglang.release_memory=true frees nothing unless the servers run with --enable-memory-saver; set "
            "sglang.launch.enable_memory_saver=true"
        )


def _served_folder(config: Config) -> Path:
    """Returns the folder that launched servers start from."""
    if is_fp8(config):
        return fp8_checkpoint(config).absolute()
    return Path(config.model.path).absolute()


def _launch_options(config: Config, model: str, api_key: str) -> LaunchOptions:
    options = config.sglang
    for name in _OWN_OPTIONS_AT.keys() & {name.replace("-", "_") for name in options.launch}:
        raise ValueError(f"sglang.launch.{name} is set by the run itself; use {_OWN_OPTIONS_AT[name]}")
    # a server is no rank of this job
    environment = {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUN_VARIABLES)}
    environment.pop(options.api_key_env, None)
    reached_at = options.trainer_address if options.host in _EVERY_ADDRESS else ""
    return LaunchOptions(
        python=options.python or sys.executable,
        model_path=model,
        host=options.host,
        arguments={"dtype": SERVER_DTYPES[config.model.dtype]} | options.launch,
        environment=without_proxies(environment | options.environment, [options.host, reached_at or options.host]),
        log_folder=Path(config.run.output_dir) / "sglang",
        start_timeout_s=options.start_timeout_s,
        max_restarts=options.max_restarts,
        api_key=api_key,
        reached_at=reached_at,
    )


def _api_key(config: Config) -> str | None:
    name = config.sglang.api_key_env
    if name and not os.environ.get(name):
        raise ValueError(f"sglang.api_key_env={name!r} is not set in the environment; export it, or leave this empty")
    key = os.environ[name] if name else None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"sglang.api_key_env={name!r} holds a key with blanks or other than ASCII characters")
    return key
