"""What the scorers of the installed reasoning-gym can reach: by reading their source, following helpers and classes."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = "reasoning_gym"
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
STANDARD_RUNS_TEXT = {"pickle", "marshal", "shelve", "subprocess", "importlib", "runpy", "code", "ctypes", "os", "sys"}


class ScorerWalk:
    """Collects in ``found`` what runs text, and everything of packages that are neither reasoning-gym nor standard.

    Over-approximates: a class that is mentioned counts with all its methods.
    """

    def __init__(self, dataset: type) -> None:
        self.found: set[str] = set()
        self.visited: set[str] = set()  # the code that was read
        self._seen: set[int] = set()
        self._dataset = dataset
        for name in ("score_answer", "__init__"):
            self._visit(inspect.getattr_static(dataset, name), dataset)

    def _visit(self, item: Any, owner: type | None = None) -> None:
        """Follows a function or class of reasoning-gym; notes anything else that it should not be."""
        item = item.fget if isinstance(item, property) else item
        item = getattr(item, "__func__", item)
        item = inspect.unwrap(item) if callable(item) else item
        if id(item) in self._seen:
            return
        self._seen.add(id(item))
        if isinstance(item, FunctionType):
            self._visit_foreign_or(item.__module__, item.__name__, lambda: self._read(item, owner))
        elif isinstance(item, type):
            self._visit_foreign_or(item.__module__, item.__name__, lambda: self._visit_class(item))
        elif isinstance(item, ModuleType):
            self._visit_foreign_or(item.__name__, "", lambda: None)
        elif callable(item) and getattr(item, "__module__", None):
            self._visit_foreign_or(item.__module__, getattr(item, "__name__", type(item).__name__), lambda: None)
        elif type(item).__module__.split(".")[0] == PACKAGE:
            self._visit(type(item))

    def _visit_foreign_or(self, module: str, name: str, follow: Any) -> None:
        root = module.split(".")[0]
        if root == PACKAGE:
            follow()
        elif module == "builtins":
            if name in RUNS_TEXT:
                self.found.add(name)
        elif root not in sys.stdlib_module_names or root in STANDARD_RUNS_TEXT:
            self.found.add(root)

    def _visit_class(self, cls: type) -> None:
        if cls is self._dataset:
            return  # its attributes are followed where they are named
        for base in cls.__mro__:
            if base.__module__.split(".")[0] == PACKAGE:
                for member in list(vars(base).values()):
                    self._visit(member, cls)

    def _read(self, function: FunctionType, owner: type | None) -> None:
        if function.__code__.co_filename == "<string>":
            return  # written by dataclasses
        self.visited.add(f"{function.__module__}.{function.__qualname__}")
        source = inspect.getsource(function)
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)  # dedent() minds odd comments
        scope: dict[str, Any] = {**vars(builtins), **function.__globals__, **inspect.getclosurevars(function).nonlocals}
        scope |= dict(_imports(tree, function.__module__))
        parameters = list(inspect.signature(function).parameters)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in scope:
                self._visit(scope[node.id])
            elif isinstance(node, ast.Attribute):
                for item in self._resolve(node, scope, owner, parameters[:1]):
                    self._visit(item, owner)

    def _resolve(self, node: ast.Attribute, scope: dict[str, Any], owner: type | None, own: list[str]) -> Iterator[Any]:
        """Yields what an attribute of a module, of a class or of ``self`` is; of other objects nothing is known."""
        path = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            path.insert(0, value.attr)
            value = value.value
        if not isinstance(value, ast.Name):
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "super" and owner is not None:
                yield from (vars(base)[path[0]] for base in owner.__mro__[1:] if path[0] in vars(base))
            return
        found = owner if [value.id] == own else scope.get(value.id)
        for name in path:
            if not isinstance(found, ModuleType | type):
                return
            found = inspect.getattr_static(found, name, None)
        if found is not None:
            yield found


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[str, Any]]:
    """Yields what imports inside a function bind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                loaded, root = importlib.import_module(alias.name), alias.name.split(".")[0]
                yield alias.asname or root, loaded if alias.asname else sys.modules[root]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = importlib.import_module(".".join(part for part in (base, node.module) if part))
            for alias in node.names:
                if not hasattr(source, alias.name):
                    importlib.import_module(f"{source.__name__}.{alias.name}")
                yield alias.asname or alias.name, getattr(source, alias.name)
