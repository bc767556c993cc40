"""Checks, without a GPU, that TransformerEngine has what Megatron-Core uses of it: imported names and keywords.

    pip download --no-deps transformer-engine==2.20.2 && unzip transformer_engine-*.whl -d te   (1.2 MB, pure Python)
    python tools/check_te_sources.py .venv/lib/python3.11/site-packages te

Parses megatron/core/extensions/transformer_engine.py and TransformerEngine's sources; imports neither. It names what
is imported inside `try`, too, and may well be missing (docs/evidence/gpu-sources.md judges the list). Exit code 1 if
anything is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

EXTENSION = "megatron/core/extensions/transformer_engine.py"
ROOT = "transformer_engine"
MAX_DEPTH = 6  # re-exports followed


class Sources:
    """Definitions in a folder that holds the package ``transformer_engine``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, module: str, name: str, depth: int = 0) -> ast.AST | None:
        """Returns the definition of ``name`` in ``module``, through re-exports; the module itself where it is one."""
        base = self._folder.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file() and depth < MAX_DEPTH:
                package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                found = self._in_file(file, package, name, depth)
                if found is not None:
                    return found
        if (base / f"{name}.py").is_file() or (base / name).is_dir():
            return ast.Module(body=[], type_ignores=[])
        return None

    def _in_file(self, file: Path, package: list[str], name: str, depth: int) -> ast.AST | None:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name != "*" and (alias.asname or alias.name) != name:
                        continue
                    parts = package[: len(package) - (node.level - 1)] if node.level else []
                    target = ".".join([*parts, *([node.module] if node.module else [])])
                    wanted = name if alias.name == "*" else alias.name
                    if target.startswith(ROOT) and (found := self.find(target, wanted, depth + 1)) is not None:
                        return found
        return None


def dotted(node: ast.AST) -> list[str]:
    """Returns ["te", "pytorch", "Linear"] of ``te.pytorch.Linear``; [] of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *parts[::-1]] if isinstance(node, ast.Name) else []


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Yields (module, name, line) of what the extension takes from TransformerEngine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOT):
            for alias in node.names:
                yield str(node.module), alias.name, node.lineno
        if isinstance(node, ast.Attribute) and len(parts := dotted(node)) == 3 and parts[0] == "te":
            yield f"{ROOT}.{parts[1]}", parts[2], node.lineno


def accepted_keywords(definition: ast.ClassDef) -> set[str] | None:
    """Returns the keywords of a class's constructor, None where it takes any."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args
            return None if arguments.kwarg else {a.arg for a in [*arguments.args, *arguments.kwonlyargs]}
    return {n.target.id for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def super_keywords(definition: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Yields (keyword, line) of ``super().__init__(keyword=...)`` calls in a class."""
    for node in ast.walk(definition):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__"):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
            yield from ((keyword.arg, node.lineno) for keyword in node.keywords if keyword.arg)


def main() -> int:
    megatron, te = Path(sys.argv[1]), Sources(Path(sys.argv[2]))
    tree = ast.parse((megatron / EXTENSION).read_text(encoding="utf-8"))
    names = list(imported_names(tree))
    problems = [f"line {line}: {module}.{name} is missing" for module, name, line in names if not te.find(module, name)]
    num_keywords = 0
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for parts in filter(None, map(dotted, node.bases)):
            if parts[0] != "te":
                continue
            base = te.find(".".join([ROOT, *parts[1:-1]]), parts[-1])
            accepted = accepted_keywords(base) if isinstance(base, ast.ClassDef) else set()
            for keyword, line in super_keywords(node):
                num_keywords += 1
                if accepted is not None and keyword not in accepted:
                    problems.append(f"line {line}: {node.name} passes {keyword}=, unknown to {'.'.join(parts)}")
    print(f"{len(names)} uses of names and {num_keywords} keywords checked, {len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
