"""The layers of the design, enforced by reading the source of the package.

Every rule of ``violations`` is also shown to catch a planted violation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from aer_megatron.report.metrics import FAMILIES, Metric

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "aer_megatron"

# A module may import from layers with a smaller number, and from its own package; never sideways. So a feature room
# (FEATURE) may import the whole core, no feature room imports another, and only cli imports them.
FEATURE = 12
LAYERS = {
    "cli": 13,
    "conversion": FEATURE,
    "doctor": FEATURE,
    "evaluate": FEATURE,
    "fp8_parity": FEATURE,
    "launch": FEATURE,
    "plan": FEATURE,
    "prepare_data": FEATURE,
    "replay": FEATURE,
    "samples": FEATURE,
    "verify_resume": FEATURE,
    "train": 11,
    "compose": 10,
    "loop": 9,
    "sglang": 8,
    "data": 7,
    "report": 7,
    "rewards": 7,
    "rollout": 7,
    "checkpoint": 6,
    "actor": 5,
    "convert": 4,
    "parallel": 3,
    "costs": 2,
    "config_loading": 2,
    "config": 1,
    "options": 0,
    "algo": 0,
    "config_section": -1,
    "config_values": -2,
    "console": 3,
    "files": 1,
    "types": -1,
    "_C": -1,
    "__init__": -2,
}
MODULES = {"cli", "train", "config_loading", "config_section", "config_values", "config", "types", "_C", "__init__"}
PACKAGES = set(LAYERS) - MODULES

# Third-party imports of the layers that must stay light; a layer that is not named here is free.
THIRD_PARTY = {
    "algo": {"numpy", "pydantic", "torch"},
    "config_loading": {"pydantic"},
    "config": {"pydantic"},
    "options": {"pydantic"},
    "config_section": {"pydantic", "pydantic_core"},
    "types": {"numpy"},
    "files": set[str](),
    "costs": set[str](),
    "__init__": set[str](),
}
TORCH_FREE = "loop/"
ENVIRONMENT_READERS = {
    "compose/engines.py",
    "train.py",
    "launch/command.py",
    "console/failures.py",
    "parallel/platform.py",
}
COMMAND_LINES = {"cli.py", "train.py", "replay/batch.py"}  # and the command.py of a feature room
SPEAKER = "console/standard_streams.py"  # the one function by which the rest speaks to the user
BROAD_HANDLER_HOME = "rewards/"  # user code
SINK_GUARD = "report/sinks/guard.py"  # the same for sinks: user code, networks, disks
# a library that raises Exception itself; a class that a run file names. A handler must end in a raise
BROAD_TRANSLATORS = {"data/tokenizer.py", "config_section.py", "report/sinks/opening.py"}
MESSAGE_EDGE = "console/failures.py"  # turns any exception into one line and an exit code
METRIC_NAMES_HOME = "report/metrics.py"


def _unit(path: str) -> str:
    """Returns the layer of a path: ``algo`` of ``algo/loss.py``, ``train`` of ``train.py``."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted module or member) of every import, also inside functions."""
    here = [PACKAGE, *PurePosixPath(path).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"} and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _target(module: str) -> str:
    """Returns the layer key that a dotted name of the package belongs to; ``__init__`` for its own names."""
    member = module.split(".")[1] if "." in module else "__init__"
    return member if member in LAYERS or not member.startswith("__") else "__init__"


def _layer_violations(path: str, tree: ast.Module) -> Iterator[str]:
    unit = _unit(path)
    if unit not in LAYERS or (("/" in path) != (unit in PACKAGES)):
        yield f"{path}: {unit} is no home of the design; find the owner of its lines"
        return
    for line, module in _imports(path, tree):
        top = module.split(".")[0]
        if top == PACKAGE:
            target = _target(module)
            if target not in LAYERS:
                yield f"{path}:{line}: imports {module}, which has no layer"
            elif target == unit and unit in PACKAGES:
                continue
            elif LAYERS[target] == LAYERS[unit]:
                yield f"{path}:{line}: imports sideways: {module}"
            elif LAYERS[target] > LAYERS[unit]:
                yield f"{path}:{line}: imports upwards: {module}"
        elif unit in THIRD_PARTY and top not in sys.stdlib_module_names | THIRD_PARTY[unit]:
            yield f"{path}:{line}: {unit} imports {top}"
        elif unit == "algo" and module.startswith("torch.distributed"):
            yield f"{path}:{line}: algo imports torch.distributed"
        elif path.startswith(TORCH_FREE) and top in {"torch", "megatron"}:
            yield f"{path}:{line}: the loop imports {top}"


def _environment_violations(path: str, tree: ast.Module) -> Iterator[str]:
    if path in ENVIRONMENT_READERS:
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{path}:{node.lineno}: touches the environment: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (
                f"{path}:{node.lineno}: touches the environment: {alias.name}"
                for alias in node.names
                if alias.name in names
            )


def _print_violations(path: str, tree: ast.Module) -> Iterator[str]:
    if path in COMMAND_LINES or path == SPEAKER or PurePosixPath(path).name in ("__main__.py", "command.py"):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{path}:{node.lineno}: prints"
        elif ast.unparse(node.func).startswith(("sys.stdout.", "sys.stderr.")):
            yield f"{path}:{node.lineno}: writes to {ast.unparse(node.func)}"


def _handler_violations(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if path == "loop/synchronous.py" and isinstance(node, (ast.Try, ast.TryStar)):
            yield f"{path}:{node.lineno}: the loop has a try"
    if not path.startswith(BROAD_HANDLER_HOME) and path not in (MESSAGE_EDGE, SINK_GUARD):
        lines = _broad_handlers(tree, translates=path in BROAD_TRANSLATORS)
        yield from (f"{path}:{line}: catches everything" for line in lines)


def _broad_handlers(tree: ast.Module, *, translates: bool = False) -> list[int]:
    """Returns the lines that swallow Exception, BaseException or all: by a handler or by ``suppress``.

    A handler that ends in a bare ``raise`` swallows nothing: it cleans up. With ``translates`` it may raise another.
    """
    lines = []
    for node in ast.walk(tree):
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler):
            last = node.body[-1]
            if isinstance(last, ast.Raise) and (last.exc is None or translates):
                continue
            if node.type is None:
                lines.append(node.lineno)
            else:
                caught = list(node.type.elts) if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and _called(node) == "suppress":
            caught = list(node.args)
        if any(ast.unparse(item).split(".")[-1] in {"Exception", "BaseException"} for item in caught):
            lines.append(node.lineno)
    return lines


def _is_metric_name(value: object) -> bool:
    if not isinstance(value, str):
        return False
    return ("/" in value and value in set(Metric)) or value.startswith(tuple(family.prefix for family in FAMILIES))


def _metric_name_violations(path: str, tree: ast.Module) -> Iterator[str]:
    if path == METRIC_NAMES_HOME:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and _is_metric_name(node.value):
            yield f"{path}:{node.lineno}: spells the metric name {node.value!r}"


RULES = (
    _layer_violations,
    _environment_violations,
    _print_violations,
    _handler_violations,
    _metric_name_violations,
)


def violations(sources: dict[str, str]) -> list[str]:
    """Returns one line per violation in ``sources``, a mapping of paths below the package to their text."""
    found: list[str] = []
    broad: list[str] = []
    for path, text in sorted(sources.items()):
        tree = ast.parse(text, filename=path)
        for rule in RULES:
            found.extend(rule(path, tree))
        if path not in (MESSAGE_EDGE, SINK_GUARD) and _broad_handlers(tree, translates=path in BROAD_TRANSLATORS):
            broad.append(path)
    if len(broad) > 1:
        found.append(f"except Exception in more than one file: {', '.join(broad)}")
    return found


def _package_sources() -> dict[str, str]:
    folder = ROOT / PACKAGE
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.py")}


def test_the_package_keeps_its_layers() -> None:
    assert violations(_package_sources()) == []


def test_the_checker_sees_the_package() -> None:
    sources = _package_sources()
    assert {"types.py", "config.py", "report/metrics.py"} <= set(sources)


PLANTED = [
    ("algo/loss.py", "import aer_megatron.parallel.vocab", "imports upwards"),
    ("algo/loss.py", "from aer_megatron import actor", "imports upwards"),
    ("algo/loss.py", "from ..parallel import vocab", "imports upwards"),
    ("algo/loss.py", "def f():\n    from aer_megatron.rollout import engine", "imports upwards"),
    ("algo/loss.py", "import importlib\nimportlib.import_module('aer_megatron.loop.synchronous')", "imports upwards"),
    ("algo/loss.py", "if TYPE_CHECKING:\n    from aer_megatron.actor.actor import Actor", "imports upwards"),
    ("report/writer.py", "from aer_megatron.rewards.math import verify", "imports sideways"),
    ("replay/command.py", "from aer_megatron import plan", "imports sideways"),
    ("loop/phases.py", "from aer_megatron.plan.command import main", "imports upwards"),
    ("loop/synchronous.py", "import aer_megatron.train", "imports upwards"),
    ("types.py", "from aer_megatron.config import Config", "imports upwards"),
    ("utils.py", "", "no home"),
    ("helpers/io.py", "", "no home"),
    ("algo.py", "", "no home"),
    ("train.py", "import aer_megatron.utils", "has no layer"),
    ("algo/loss.py", "import scipy.stats", "algo imports scipy"),
    ("algo/loss.py", "from megatron.core import parallel_state", "algo imports megatron"),
    ("algo/loss.py", "import torch.distributed as dist", "algo imports torch.distributed"),
    ("algo/loss.py", "from torch import distributed", "algo imports torch.distributed"),
    ("config.py", "import torch", "config imports torch"),
    ("types.py", "import torch", "types imports torch"),
    ("loop/synchronous.py", "import torch.nn as nn", "the loop imports torch"),
    ("loop/synchronous.py", "def f():\n    try:\n        pass\n    finally:\n        pass", "the loop has a try"),
    ("actor/model.py", "import os\nos.environ['X'] = '1'", "touches the environment"),
    ("actor/model.py", "import os as o\no.getenv('X')", "touches the environment"),
    ("actor/model.py", "from os import environ", "touches the environment"),
    ("actor/model.py", "print('hello')", "prints"),
    ("actor/model.py", "import sys\nsys.stdout.write('hello')", "writes to sys.stdout.write"),
    ("actor/model.py", "try:\n    pass\nexcept Exception:\n    pass", "catches everything"),
    ("actor/model.py", "try:\n    pass\nexcept:\n    pass", "catches everything"),
    ("actor/model.py", "try:\n    pass\nexcept (ValueError, BaseException):\n    pass", "catches everything"),
    (
        "actor/model.py",
        "import contextlib\nwith contextlib.suppress(Exception):\n    pass",
        "catches everything",
    ),
    ("loop/synchronous.py", "m = {'reward/mean': 1.0}", "spells the metric name"),
    ("loop/synchronous.py", "m = f'eval/pass@{k}'", "spells the metric name"),
]


@pytest.mark.parametrize(("path", "source", "expected"), PLANTED)
def test_a_planted_violation_is_caught(path: str, source: str, expected: str) -> None:
    found = violations({path: source})
    assert len(found) == 1, found
    assert expected in found[0]


def test_broad_handlers_are_allowed_in_one_file_of_the_verifiers() -> None:
    broad = "try:\n    pass\nexcept Exception:\n    pass"
    assert violations({"rewards/sandbox.py": broad}) == []
    assert len(violations({"rewards/sandbox.py": broad, "rewards/math.py": broad})) == 1


def test_a_library_that_raises_exception_itself_is_translated_in_one_file() -> None:
    swallowed = "try:\n    pass\nexcept Exception as error:\n    print"
    translated = "try:\n    pass\nexcept Exception as error:\n    raise ValueError(str(error)) from None"
    assert violations({"data/tokenizer.py": translated}) == []
    assert len(violations({"data/tokenizer.py": swallowed})) == 1
    assert len(violations({"data/prompts.py": translated})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train.py", "import os, torch\nfrom aer_megatron import loop, actor\nprint(os.environ)"),
        ("doctor/command.py", "import aer_megatron.train\nprint('fine')"),
        ("report/command.py", "from aer_megatron.report import writer\nprint('path')"),
        ("report/writer.py", "from .metrics import Metric\nfrom aer_megatron.config import Config"),
        ("parallel/platform.py", "import os, torch\nos.environ.get('LOCAL_RANK')"),
        (
            "algo/loss.py",
            "import math, numpy, torch\nfrom aer_megatron import _C, __version__\nfrom . import entropy",
        ),
        ("loop/synchronous.py", "from aer_megatron.rollout import collect\nfrom aer_megatron.report import metrics"),
        ("__init__.py", "__version__ = '0.1.0'"),
        ("convert/hf.py", "try:\n    pass\nexcept BaseException:\n    clean()\n    raise"),
        ("data/sources.py", "path = 'data/train.jsonl'"),
    ],
)
def test_what_the_design_allows_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []
