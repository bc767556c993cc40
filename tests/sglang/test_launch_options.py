"""What a run starts its servers with: a key that is not to be seen, no proxies to itself, no rank of the job."""

from __future__ import annotations

from typing import get_args

import pytest

from aer_megatron.compose.engines import _launch_options
from aer_megatron.config import Config
from aer_megatron.options.rollout import SglangSection
from aer_megatron.sglang.server import command_line
from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.policies import policy_config

KEY = "sesame-0123456789abcdef"


def config(**sglang: object) -> Config:
    return policy_config(rollout={"engine": "sglang"}, sglang={"num_servers": 1, **sglang})


def test_the_key_is_in_no_argument_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", KEY)
    monkeypatch.setenv("RANK", "3")
    options = _launch_options(config(api_key_env="OUR_KEY", environment={"A": "b"}), "model", KEY)
    assert options.api_key == KEY and KEY not in repr(options)
    assert KEY not in " ".join(command_line(options, 7)) + "".join(options.environment.values())
    assert "RANK" not in options.environment and options.environment["A"] == "b"


def test_a_server_asks_its_own_address_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    made = _launch_options(config(host="::", trainer_address="fd00::7"), "model", KEY)
    assert {"127.0.0.1", "::1", "[::1]", "fd00::7", "[fd00::7]"} <= set(made.environment["no_proxy"].split(","))
    assert (made.host, made.reached_at) == ("::", "fd00::7")  # "all addresses" is none to call


@pytest.mark.parametrize("name", ["api_key", "api-key", "config", "host", "port", "model_path"])
def test_what_the_run_sets_is_not_set_twice(name: str) -> None:
    with pytest.raises(ValueError, match=r"sglang\.launch\.\w+ is set by the run itself; use "):
        _launch_options(config(launch={name: "x"}), "model", KEY)


def test_a_run_file_names_a_transport_of_the_table() -> None:
    with pytest.raises(ValueError, match=r"sglang\.transport='ftp' .* 'disk', 'distributed' or 'tensor'"):
        policy_config(sglang={"transport": "ftp"})
    assert get_args(SglangSection.model_fields["transport"].annotation) == TRANSPORTS
