"""Every name and parameter of the GPU path's libraries that is used here exists in the real packages.

tests/contract/gpu_apis.json holds what tools/record_api_signatures.py read off megatron-core 0.16.1 and 0.19.2,
TransformerEngine, apex and SGLang: names and parameter lists. The call sites are enumerated anew at every run, so a use
that was not recorded fails here until it is recorded from every version.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aer_megatron.rollout.engine import GenerateRequest, SamplingOptions
from aer_megatron.sglang.protocol import generate_body
from tests.support.runs import ROOT

TABLE: dict[str, Any] = json.loads((ROOT / "tests" / "contract" / "gpu_apis.json").read_text(encoding="utf-8"))
VERSIONS = ("megatron-core 0.16.1", "megatron-core 0.19.2")
SGLANG = "sglang 0.5.23"
# functions whose dictionaries are handed on as keywords
SPREAD = {
    "transformer_config": "megatron.core.transformer.transformer_config:TransformerConfig",
    "_moe_fields": "megatron.core.transformer.transformer_config:TransformerConfig",
    "gpt_arguments": "megatron.core.models.gpt.gpt_model:GPTModel",
    "_rope_scaling": "megatron.core.models.gpt.gpt_model:GPTModel",
}
# calls with * or ** that are understood: SPREAD's, switches of experts, process groups of one version
SPREADING = {
    "megatron.core.transformer.transformer_config:TransformerConfig",
    "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_with_transformer_engine_spec",
    "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_local_spec",
    "megatron.core.models.gpt.gpt_model:GPTModel",
    "megatron.core.distributed:finalize_model_grads",
    "megatron.core.transformer.transformer_layer:get_transformer_layer_offset",
}


def recorder() -> ModuleType:
    """Returns the tool as a module."""
    spec = importlib.util.spec_from_file_location("record_api_signatures", ROOT / "tools" / "record_api_signatures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TOOL = recorder()
USES, SUBCLASSES = TOOL.project_uses()


def complaint(use: Any, entry: dict[str, Any]) -> str | None:
    """Returns what is wrong with a call of ``entry``."""
    if not use.called or "parameters" not in entry:
        return None
    names = entry["parameters"].split()
    positional = names[: next((place for place, name in enumerate(names) if name[0] == "*"), len(names))]
    known = {name.rstrip("=") for name in names if not name.startswith("*")}
    if not any(name.startswith("**") for name in names):
        unknown = set(use.keywords) - known
        if unknown:
            return f"no parameter {sorted(unknown)}"
    if use.positional > len(positional) and not any(re.match(r"\*\w", name) for name in names):
        return f"takes {len(positional)} positional arguments, is given {use.positional}"
    given = {name.rstrip("=") for name in positional[: use.positional]} | set(use.keywords)
    missing = {name for name in names if not name.endswith("=") and name[0] != "*"} - given
    return f"misses {sorted(missing)}" if missing and not use.spreads else None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_site_fits_the_library(version: str) -> None:
    apis = TABLE[version]["apis"]
    unknown = sorted({use.api for use in USES if use.api.startswith("megatron.")} - apis.keys())
    assert not unknown, f"not recorded (tools/record_api_signatures.py, every version): {unknown}"
    wrong = [f"{use.file}:{use.line} {use.api}: {text}" for use in USES if (text := complaint(use, apis[use.api]))]
    assert not wrong, "\n".join(wrong)
    assert len([use for use in USES if use.called]) > 30


def test_a_wrong_call_is_noticed() -> None:
    entry = {"kind": "function", "parameters": "config model= * tp_group"}
    use = TOOL.Use("megatron.core:f", "x.py", 1, True, 1, ["tp_group"])
    assert complaint(use, entry) is None
    assert "no parameter ['group']" in str(complaint(TOOL.Use("f", "x.py", 1, True, 1, ["tp_group", "group"]), entry))
    assert "misses ['tp_group']" in str(complaint(TOOL.Use("f", "x.py", 1, True, 1, []), entry))
    assert "positional" in str(complaint(TOOL.Use("f", "x.py", 1, True, 3, ["tp_group"]), entry))


def test_keywords_that_are_handed_on_are_known() -> None:
    """Calls with ** are those listed above, and the dictionaries behind them hold real parameters."""
    spreading = {use.api for use in USES if use.called and use.spreads}
    assert spreading <= SPREADING, f"a new call with * or **: {sorted(spreading - SPREADING)}"
    found = set()
    for file in (ROOT / "aer_megatron" / "actor").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in SPREAD:
                found.add(node.name)
                keys = {key.value for part in ast.walk(node) if isinstance(part, ast.Dict) for key in part.keys
                        if isinstance(key, ast.Constant)}  # fmt: skip
                for version in VERSIONS:
                    known = TABLE[version]["apis"][SPREAD[node.name]]["parameters"].replace("=", "").split()
                    assert keys <= set(known), f"{version}, {node.name}: {sorted(keys - set(known))}"
    assert found == SPREAD.keys()


def test_overridden_methods_are_methods_of_every_version() -> None:
    """A method that overrides Megatron's in one version must not be left beside it in another."""
    assert SUBCLASSES
    for base, methods in SUBCLASSES.items():
        first, second = (set(TABLE[version]["apis"][base]["members"].split()) for version in VERSIONS)
        assert methods & first == methods & second, f"{base}: {sorted((methods & first) ^ (methods & second))}"
    assert "_postprocess" in SUBCLASSES["megatron.core.models.gpt.gpt_model:GPTModel"]


@pytest.mark.parametrize("version", VERSIONS)
def test_transformer_engine_has_what_megatron_gives_it(version: str) -> None:
    """The keywords that Megatron-Core's layers and FP8 recipes pass on exist in the pinned TransformerEngine."""
    apis = TABLE[named("transformer-engine")]["apis"]
    given = TABLE[version]["transformer_engine"]
    for api in ("Linear", "LayerNormLinear", "DotProductAttention", "GroupedLinear", "fp8_autocast"):
        assert given[f"transformer_engine.pytorch:{api}"]
    for api, keywords in given.items():
        names = apis[api].get("parameters", "").split()
        if not any(name.startswith("**") for name in names):
            assert set(keywords.split()) <= {name.rstrip("=") for name in names}, api


def test_apex_has_the_optimizer_that_megatron_falls_back_to() -> None:
    parameters = TABLE[named("apex")]["apis"]["apex.optimizers:FusedAdam"]["parameters"].replace("=", "").split()
    assert {"params", "lr", "betas", "eps", "weight_decay", "adam_w_mode"} <= set(parameters)


def test_sglang_has_every_endpoint_and_field() -> None:
    routes = TABLE[SGLANG]["routes"]
    used: dict[str, set[str]] = {}
    for file in (ROOT / "aer_megatron" / "sglang").rglob("*.py"):
        if file.name == "router.py":
            continue  # test_router_contract.py asks a real router
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for path, keys in requests_of(function):
                    used.setdefault(path, set()).update(keys)
    assert {"/abort_request", "/update_weights_from_disk", "/weights_checker"} <= used.keys()
    request, options = GenerateRequest((3, 4), 0, 6), SamplingOptions(1.0, 1.0, 0, frozenset({2}))
    used["/generate"] = set(generate_body(request, options, rid="r"))
    for path, keys in used.items():
        assert path in routes, f"SGLang has no {path}"
        if routes[path] is not None:
            assert keys <= set(routes[path].split()), f"{path}: {sorted(keys - set(routes[path].split()))}"


def requests_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[tuple[str, set[str]]]:
    """Returns (path, keys of the body) of the HTTP calls in a function; the body is given inline or as ``body``."""
    bodies: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "body" for target in targets):
                bodies |= keys_of(node.value)
    found = []
    for node in ast.walk(function):
        for place, argument in enumerate(node.args if isinstance(node, ast.Call) else ()):
            if isinstance(argument, ast.BinOp):  # url + "/path"
                argument = argument.right
            if isinstance(argument, ast.Constant) and re.fullmatch(r"/[a-z_]+", str(argument.value)):
                rest = node.args[place + 1 :]  # type: ignore[attr-defined]
                inline = next((keys_of(part) for part in rest if isinstance(part, ast.Dict)), None)
                by_name = any(isinstance(part, ast.Name) and part.id == "body" for part in rest)
                found.append((argument.value, inline if inline is not None else bodies if by_name else set()))
    return found


def keys_of(node: ast.Dict) -> set[str]:
    return {key.value for key in node.keys if isinstance(key, ast.Constant)}


def test_sglang_has_every_option_of_the_examples() -> None:
    options = set(TABLE[SGLANG]["options"].split())
    for file in (ROOT / "examples").rglob("*.toml"):
        launch = tomllib.loads(file.read_text(encoding="utf-8")).get("sglang", {}).get("launch", {})
        assert launch.keys() <= options, f"{file}: {sorted(launch.keys() - options)}"
    for file in [ROOT / "examples/multinode_torchrun/serve.sh", ROOT / "examples/single_node/launch.sh",
                 ROOT / "examples/slurm/train.sbatch", ROOT / "aer_megatron/sglang/server.py"]:  # fmt: skip
        text = file.read_text(encoding="utf-8")
        flags = re.findall(r"--(model-path|host|port|tp-size|mem-[a-z-]+|api-key)", text)
        flags = {flag.replace("-", "_") for flag in flags}
        assert flags
        assert flags <= options, f"{file}: {sorted(flags - options)}"


@pytest.mark.parametrize("library", sorted(TABLE))
def test_the_record_is_the_installed_package_s(library: str) -> None:
    """Where the recorded version is installed, recording again gives the same."""
    name, version = library.split()
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    if distribution.version != version:
        pytest.skip(f"{name} {distribution.version} is installed, {version} is recorded")
    assert TOOL.facts_of(library, Path(str(distribution.locate_file("")))) == TABLE[library]


def named(library: str) -> str:
    """Returns the recorded version of a library, of which there is one."""
    (found,) = (key for key in TABLE if key.startswith(f"{library} "))
    return found
