"""Sizes and cycles of the package: files and functions that can be read at once, and no import that leads back.

An import that only the type checker sees counts: what needs the other's types to be read is read in a circle too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "aer_megatron"
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
# called by another library with more, or the options of one kernel
WIDE = {"parallel/vocab_triton.py", "actor/attention.py", "parallel/vocab.py", "parallel/fused_head.py"}


def _modules() -> dict[str, ast.Module]:
    """Returns the syntax tree of every module by its dotted name below the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def _imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("aer_megatron"):
            base = node.module.removeprefix("aer_megatron").lstrip(".")
            for alias in node.names:
                member = f"{base}.{alias.name}".lstrip(".")
                yield from ({member, base} & known)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the modules of one cycle of imports; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_leads_back() -> None:
    modules = _modules()
    assert cycle({name: set(_imports(tree, set(modules))) for name, tree in modules.items()}) == []


def test_no_room_imports_back() -> None:
    modules = _modules()
    rooms: dict[str, set[str]] = {}
    for name, tree in modules.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update(
            target.split(".")[0] for target in _imports(tree, set(modules)) if target.split(".")[0] != room
        )
    assert cycle(rooms) == []


def test_a_cycle_is_seen() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    sources = {"a.x": "if TYPE_CHECKING:\n    from aer_megatron.b.y import T", "b.y": "from aer_megatron.a import x"}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert cycle({name: set(_imports(tree, set(trees))) for name, tree in trees.items()})


@pytest.mark.parametrize("name", sorted(_modules()))
def test_what_can_be_read_at_once(name: str) -> None:
    path = PACKAGE / (name.replace(".", "/") + ".py")
    text = path.read_text("utf-8")
    assert text.count("\n") <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name}: {lines} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls", "ctx"))
            if path.relative_to(PACKAGE).as_posix() not in WIDE:
                assert count <= PARAMETERS, f"{node.name}: {count} parameters"
