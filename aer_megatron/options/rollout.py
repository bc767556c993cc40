"""Options of rollouts and of the servers that may make them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from aer_megatron.config_section import Section
from aer_megatron.options.texts import PathOrEmpty, Text


class RolloutSection(Section):
    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="embedded = in-process generation on every rank; sglang = the servers of [sglang]"
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8: the engine's weights are rounded to FP8, 128 x 128 values to a scale; docs/fp8.md"
    )
    prompts_per_step: int = Field(64, ge=1, description="P, prompts of a rollout batch over all ranks")
    group_size: int = Field(8, ge=1, description="G, rollouts per prompt")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = off")
    max_new_tokens: int = Field(1024, ge=1)
    max_batch_size: int = Field(256, ge=1, description="sequences decoded together by the embedded engine")
    dynamic_sampling: bool = Field(False, description="drop groups solved always or never and sample more prompts")
    max_refills: int = Field(4, ge=0, description="extra rollout rounds that dynamic sampling may take in a step")
    oversample: float = Field(
        1.0, ge=1, description="launch this many times the groups needed; the first whole ones win, the rest is aborted"
    )
    staleness: int = Field(
        0, ge=0, description="policy versions that a token may be behind its training; 0 = generate, then train"
    )
    logprob_gate: float = Field(
        0.0, ge=0, description="stop at step 0 if the rollout/train log-probability difference exceeds this; 0 = off"
    )

    @property
    def uses_servers(self) -> bool:
        """Whether SGLang servers generate, rather than the engine inside of every rank."""
        return self.engine == "sglang"

    def check(self) -> None:
        """Raises ValueError where an option needs servers."""
        for name, value, off in (("staleness", self.staleness, 0), ("oversample", self.oversample, 1)):
            if value > off and not self.uses_servers:
                raise ValueError(
                    f"rollout.{name}={value:g} needs rollout.engine='sglang', servers that generate by themselves; the "
                    f"embedded engine works in turn with the trainer: set rollout.{name}={off}"
                )


class SglangSection(Section):
    """SGLang servers, for ``rollout.engine = "sglang"``: those of ``urls``, or ``num_servers`` launched by the run."""

    urls: tuple[str, ...] = Field((), strict=False, description="servers that run already, http://host:port")
    num_servers: int = Field(0, ge=0, description="servers that rank 0 launches and supervises; 0 = use urls")
    python: PathOrEmpty = Field("", description="interpreter of the servers' environment; empty = the trainer's own")
    host: Text = Field("127.0.0.1", description="address that launched servers listen on")
    launch: dict[str, Any] = Field(
        default_factory=dict, description="options of launched servers, passed on: mem_fraction_static = 0.8, ..."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables added to launched servers'")
    router_url: str = Field("", description="smg in front of these servers, for generation requests; empty = none")
    api_key_env: str = Field(
        "",
        description="name of the environment variable that holds the servers' API key; "
        "empty = none, and a random one for launched servers",
    )
    transport: Literal["disk", "distributed", "tensor"] = Field(  # the modules of sglang/transports/
        "disk",
        description="disk = a folder that trainer and servers share; distributed = broadcast by gloo or NCCL; "
        "tensor = servers on rank 0's machine: CUDA IPC, on CPU inside the request",
    )
    trainer_address: Text = Field("127.0.0.1", description="rank 0 as the servers reach it, for transport=distributed")
    bucket_mb: int = Field(64, ge=1, description="one broadcast or request of distributed or tensor, MB (10^6 bytes)")
    release_memory: bool = Field(False, description="servers on the trainer's GPUs free their memory while it trains")
    transfer_dir: PathOrEmpty = Field(
        "", description="the disk transport makes a folder of its own in it; empty = weights/ under run.output_dir"
    )
    max_concurrency: int = Field(64, ge=1, description="requests under way per server and training rank")
    request_timeout_s: float = Field(600.0, gt=0, description="a generation that takes longer is given up")
    connect_timeout_s: float = Field(5.0, gt=0)
    control_timeout_s: float = Field(30.0, gt=0, description="health, version and other short calls")
    transfer_timeout_s: float = Field(600.0, gt=0, description="each call of a weight transfer")
    start_timeout_s: float = Field(600.0, gt=0, description="from the launch of a server until it is ready")
    recovery_timeout_s: float = Field(600.0, gt=0, description="how long a step waits when no server is in service")
    probe_interval_s: float = Field(1.0, gt=0, description="how often unreachable servers are asked if they are back")
    max_attempts: int = Field(6, ge=1, description="tries of one request, over all servers")
    max_failures: int = Field(3, ge=1, description="failed calls in a row that take a server out of service")
    max_restarts: int = Field(10, ge=0, description="restarts of one launched server")

    def check(self) -> None:
        """Raises ValueError unless it says where the servers are."""
        if bool(self.urls) == bool(self.num_servers):
            raise ValueError(
                f"sglang.urls={list(self.urls)} and sglang.num_servers={self.num_servers}: rollout.engine='sglang' "
                "needs exactly one of them; name running servers in urls, or set num_servers to launch some"
            )
        if self.launch.get("grammar_backend") == "outlines":
            raise ValueError(
                "sglang.launch.grammar_backend='outlines' reads pickles from a cache folder (diskcache, "
                "CVE-2025-69872) and no request of a run has a grammar; leave it out"
            )
