"""Where the package may touch what turns bytes or text into code: pickles, evaluation, imports by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MODULES = (
    "pickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing",
    "torch.multiprocessing", "torch.package", "torch.hub", "runpy", "code", "codeop", "imp", "yaml",
    "xmlrpc", "dbm", "copyreg",
)  # fmt: skip
BUILT_IN = ("eval", "exec", "compile", "__import__")
FUNCTIONS = (
    "importlib.import_module", "importlib.util.spec_from_file_location",
    "torch.load", "torch.save", "torch.jit.load", "torch.export.load", "numpy.load", "numpy.save", "numpy.savez",
    "torch.distributed.checkpoint.load", "megatron.core.dist_checkpointing.load",
    "megatron.core.dist_checkpointing.load_common_state_dict", "pandas.read_pickle", "pandas.eval", "sympy.sympify",
    "sympy.parse_expr", "sympy.parsing.sympy_parser.parse_expr", "numexpr.evaluate",
)  # fmt: skip
# methods and collectives by their last name, whatever they hang on
NAMES = (
    "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "send_object_list",
    "recv_object_list", "literal_eval", "allow_pickle", "trust_remote_code", "recv_bytes", "send_bytes",
)  # fmt: skip

PERMITTED = {
    # the reader with the list of classes
    "convert/megatron_metadata.py": {"pickle"},
    # writes the .metadata that Megatron reads; torch.load with weights_only
    "convert/megatron_folder.py": {"pickle", "torch.save", "torch.load"},
    # what SGLang's tensor transport reads; nothing is read here
    "sglang/transports/tensor.py": {"pickle", "torch.multiprocessing"},
    # reads what this process wrote a moment ago, to compare it
    "conversion/logits.py": {"megatron.core.dist_checkpointing.load"},
    # a file of its own folder
    "sglang/transports/__init__.py": {"importlib.import_module"},
    # a function that the run file names, in a worker process
    "rewards/registry.py": {"importlib.import_module"},
    # a class that the run file names
    "config_section.py": {"importlib.import_module"},
    "report/sinks/opening.py": {"importlib.import_module"},
    # the command's own table
    "cli.py": {"importlib.import_module"},
    # the module that the launcher's command line names
    "launch/rank_main.py": {"runpy"},
    # SGLang's own command, in a process of its own
    "sglang/start_server.py": {"runpy"},
    # starts its own ranks
    "conversion/round_trip.py": {"torch.multiprocessing"},
}
# pickle may be read by these alone
PICKLE_READERS = ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler")
READERS = {"convert/megatron_metadata.py"}


def found(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, what) of everything above, by the dotted name that the imports of the file give it."""
    roots = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, what) for alias in node.names for what in _matches(alias.name))
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, what) for alias in node.names for what in _matches(f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            root, _, rest = ast.unparse(node).partition(".")
            if root in roots:
                yield from ((node.lineno, what) for what in _matches(f"{roots[root]}.{rest}".strip(".")))
            elif (rest or root).split(".")[-1] in (NAMES if rest else BUILT_IN):
                yield node.lineno, (rest or root).split(".")[-1]
        elif isinstance(node, ast.keyword) and node.arg in NAMES and not _is_false(node.value):
            yield node.value.lineno, str(node.arg)


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                yield alias.asname or root, alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _matches(dotted: str) -> Iterator[str]:
    yield from (module for module in MODULES if dotted == module or dotted.startswith(f"{module}."))
    yield from (name for name in FUNCTIONS if dotted == name)
    yield from (name for name in NAMES if dotted.split(".")[-1] == name)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("aer_megatron", "tools", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix().removeprefix("aer_megatron/")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_else_turns_data_into_code() -> None:
    seen = [(name, line, what) for name, tree in sources() for line, what in found(tree)]
    assert [place for place in seen if place[2] not in PERMITTED.get(place[0], set())] == []
    used: dict[str, set[str]] = {}
    for name, _, what in seen:
        used.setdefault(name, set()).add(what)
    assert used == PERMITTED  # what is no longer needed leaves the list


def test_pickles_are_read_in_one_place_and_there_by_a_list() -> None:
    for name, tree in sources():
        reads = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLE_READERS
        }
        assert bool(reads) == (name in READERS), (name, reads)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(item.arg == "weights_only" and ast.unparse(item.value) == "True" for item in node.keywords)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("import pickle as p\nx = 1", "pickle"),
        ("from pickle import loads", "pickle"),
        ("from multiprocessing.connection import Connection", "multiprocessing"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load as fetch\nfetch('x')", "torch.load"),
        ("import numpy as np\nnp.load('x')", "numpy.load"),
        ("import torch.distributed as dist\ndist.all_gather_object([], 1)", "all_gather_object"),
        ("from torch.distributed import broadcast_object_list", "broadcast_object_list"),
        ("eval(text)", "eval"),
        ("f = exec", "exec"),
        ("import importlib\nimportlib.import_module(name)", "importlib.import_module"),
        ("from sympy import sympify as s", "sympy.sympify"),
        ("load(path, trust_remote_code=True)", "trust_remote_code"),
    ],
)
def test_a_planted_use_is_found(source: str, what: str) -> None:
    assert what in {name for _, name in found(ast.parse(source))}


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "re.compile('x')", "import torch\nmodel.load(x)", "load(trust_remote_code=False)", "sock.recv(4)"],
)
def test_what_only_looks_like_it_passes(source: str) -> None:
    assert list(found(ast.parse(source))) == []
