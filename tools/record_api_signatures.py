"""Records names and parameter lists of the libraries behind the GPU path, for tests/contract/test_gpu_apis.py.

    python tools/record_api_signatures.py "megatron-core 0.19.2" --source SITE_PACKAGES [--output FILE]

One call per library and version: megatron-core (twice), transformer-engine, apex, sglang. Only files are read, nothing
is imported, so an unpacked wheel is enough (pip download --no-deps --python-version 3.12 --only-binary=:all:). What is
recorded follows from this project's own call sites (megatron-core), from Megatron-Core's use of TransformerEngine, and
from SGLang's routes and options. A new call site of Megatron-Core is recorded from both versions.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "tests" / "contract" / "gpu_apis.json"
LIBRARIES = ("megatron", "transformer_engine", "apex")
# what Megatron-Core's layer specs, FP8 contexts and optimizer take from TransformerEngine and apex
TE_APIS = (
    "transformer_engine.pytorch:Linear", "transformer_engine.pytorch:LayerNormLinear",
    "transformer_engine.pytorch:DotProductAttention", "transformer_engine.pytorch:GroupedLinear",
    "transformer_engine.pytorch:RMSNorm", "transformer_engine.pytorch:fp8_autocast",
    "transformer_engine.pytorch:fp8_model_init", "transformer_engine.pytorch.optimizers:FusedAdam",
    "transformer_engine.common.recipe:Format", "transformer_engine.common.recipe:DelayedScaling",
    "transformer_engine.common.recipe:Float8CurrentScaling", "transformer_engine.common.recipe:Float8BlockScaling",
    "transformer_engine.common.recipe:MXFP8BlockScaling",
)  # fmt: skip
APEX_APIS = ("apex.optimizers:FusedAdam", "apex.optimizers:FusedSGD", "apex.multi_tensor_apply:multi_tensor_applier")
MEGATRON_TE_FILES = ("extensions/transformer_engine.py", "fp8_utils.py")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Use:
    """One call site or reference. Example: ``Use("megatron.core.optimizer:OptimizerConfig", "optimizer.py", 44)``."""

    api: str  # "module:name" or "module:name.attribute"
    file: str
    line: int
    called: bool = False
    positional: int = 0
    keywords: list[str] = field(default_factory=list)
    spreads: bool = False  # *args or **kwargs are handed on


class Source:
    """A library's files; finds definitions through re-exports, without importing anything."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def file(self, module: str) -> Path | None:
        base = self._root.joinpath(*module.split("."))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)

    @functools.cached_property
    def _trees(self) -> dict[str, list[ast.stmt]]:
        return {}

    def statements(self, module: str) -> list[ast.stmt]:
        """Returns the module-level statements, those inside if, try and with blocks included."""
        if module not in self._trees:
            path = self.file(module)
            self._trees[module] = list(_flat(ast.parse(path.read_text(encoding="utf-8")).body)) if path else []
        return self._trees[module]

    def find(self, module: str, name: str, seen: frozenset[Any] = frozenset()) -> tuple[str, ast.AST | str] | None:
        """Returns (module of the definition, its node), (module, "module") for a submodule, None if there is none."""
        if (module, name) in seen:  # a package that imports its submodule from itself
            return (f"{module}.{name}", "module") if self.file(f"{module}.{name}") else None
        seen |= {(module, name)}
        fallback: tuple[str, ast.AST | str] | None = None
        for node in self.statements(module):
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name or alias.name == "*":
                        target = self._absolute(module, node)
                        found = self.find(target, name if alias.name == "*" else alias.name, seen)
                        if found:
                            return found
                        if alias.name != "*" and not self.file(target):  # another library's, handed on
                            fallback = fallback or (module, "value")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                fallback = fallback or (module, "value")
        if fallback is None and self.file(f"{module}.{name}"):
            return f"{module}.{name}", "module"
        return fallback

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.file(module)
        parts = module.split(".")
        package = parts if path and path.name == "__init__.py" else parts[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def lookup(self, api: str) -> tuple[str, ast.AST | str] | None:
        """Returns what ``api`` ("module:name[.attribute]") is; None if it does not exist."""
        module, _, path = api.partition(":")
        found: tuple[str, ast.AST | str] | None = (module, "module")
        for name in path.split("."):
            if found is None:
                return None
            where, node = found
            if node == "module":
                found = self.find(where, name)
            elif isinstance(node, ast.ClassDef):
                found = (where, "value") if name in self.members(where, node) else None
            else:
                return None
        return found

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]

    def members(self, module: str, node: ast.ClassDef) -> set[str]:
        """Returns the names of methods, class values and attributes set on self, inherited ones included."""
        names = {part.name for part in _flat(node.body) if isinstance(part, Definition)}
        names |= set(_fields(node)) | {
            target.attr for part in ast.walk(node) if isinstance(part, (ast.Assign, ast.AnnAssign))
            for target in (part.targets if isinstance(part, ast.Assign) else [part.target])
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
        }  # fmt: skip
        return names.union(*(self.members(*base) for base in self.bases(module, node)))

    def parameters(self, module: str, node: ast.AST | str) -> list[str] | None:
        """Returns parameters as "name", "name=" (has a default), "*", "*args", "**kwargs"; None where unknown."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _signature(node.args)
        if not isinstance(node, ast.ClassDef):
            return None
        for part in _flat(node.body):
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return _signature(part.args)[1:]
        inherited = [self.parameters(*base) for base in self.bases(module, node)]
        first = next((names for names in inherited if names is not None), None)
        own = _fields(node)
        if own or _is_dataclass(node):
            old = [name for names in inherited for name in names or ()]
            extra = ["**ignored"] if self._has_pydantic_dataclasses(module) else []
            return [*(name for name in old if name.rstrip("=") not in own), *own.values(), *extra]
        return first

    def _has_pydantic_dataclasses(self, module: str) -> bool:
        """Pydantic's dataclasses take arguments that are no fields, and drop them."""
        imports = (node for node in self.statements(module) if isinstance(node, ast.ImportFrom))
        return any(node.module == "pydantic.dataclasses" for node in imports)

    def record(self, api: str, *, with_members: bool) -> dict[str, Any]:
        """Returns the entry of ``api``; raises ValueError where the library has no such thing."""
        found = self.lookup(api)
        if found is None:
            raise ValueError(f"{api} is not in {self._root}")
        module, node = found
        kind = node if isinstance(node, str) else "class" if isinstance(node, ast.ClassDef) else "function"
        entry: dict[str, Any] = {"kind": kind}
        parameters = self.parameters(module, node)
        if parameters is not None:
            entry["parameters"] = " ".join(parameters)
        if with_members and isinstance(node, ast.ClassDef):
            entry["members"] = " ".join(sorted(self.members(module, node)))
        return entry


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            handlers = [part for handler in getattr(node, "handlers", ()) for part in handler.body]
            inner = [*node.body, *handlers, *getattr(node, "orelse", ()), *getattr(node, "finalbody", ())]
            yield from _flat(inner)


def _signature(arguments: ast.arguments) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    names = [argument.arg + ("=" if place >= first_default else "") for place, argument in enumerate(positional)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [a.arg + ("=" if d is not None else "") for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return [*names, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """Returns annotated class fields: name -> "name" or "name=" (has a default)."""
    return {
        part.target.id: part.target.id + ("=" if part.value is not None else "")
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        and "ClassVar" not in ast.unparse(part.annotation)
    }  # fmt: skip


def uses_in(files: Iterable[Path], root: Path) -> tuple[list[Use], dict[str, set[str]]]:
    """Returns the uses of the libraries in ``files``, and the methods of subclasses by base class."""
    uses: list[Use] = []
    subclasses: dict[str, set[str]] = {}
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = _imported(tree)
        place = str(file.relative_to(root))
        uses += [Use(api, place, 0) for api in names.values()]
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            api = _reference(node, names)
            if api:
                uses.append(_use(api, place, node, calls.get(id(node))))
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    api = _reference(base, names)
                    if api:
                        methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                        subclasses.setdefault(api, set()).update(methods)
    return uses, subclasses


def _imported(tree: ast.Module) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    raise ValueError(f"import {alias.name}: use from ... import, which says what is used")
    return names


def _reference(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
        api = names[node.value.id]
        return api if node.attr.startswith("__") else f"{api}.{node.attr}"
    return None


def _use(api: str, place: str, node: ast.AST, call: ast.Call | None) -> Use:
    line = getattr(node, "lineno", 0)
    if call is None:
        return Use(api, place, line)
    spreads = any(isinstance(part, ast.Starred) for part in call.args) or any(k.arg is None for k in call.keywords)
    keywords = [part.arg for part in call.keywords if part.arg is not None]
    return Use(api, place, line, True, len(call.args), keywords, spreads)


def project_uses() -> tuple[list[Use], dict[str, set[str]]]:
    """Returns this project's uses of the libraries, tests and tools left out."""
    return uses_in(sorted((ROOT / "aer_megatron").rglob("*.py")), ROOT)


def megatron_te_keywords(root: Path) -> dict[str, str]:
    """Returns the keywords that Megatron-Core's TransformerEngine layers hand to the classes they derive from."""
    found: dict[str, set[str]] = {}
    for name in MEGATRON_TE_FILES:
        for node in ast.walk(ast.parse((root / "megatron" / "core" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.bases:
                base = ast.unparse(node.bases[0]).replace("te.", "transformer_engine.", 1)
                for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
                    if ast.unparse(call.func) == "super().__init__":
                        found.setdefault(_as_api(base), set()).update(k.arg for k in call.keywords if k.arg)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("transformer_engine."):
                api = _as_api(ast.unparse(node.func))
                found.setdefault(api, set()).update(k.arg for k in node.keywords if k.arg)
    return {api: " ".join(sorted(words)) for api, words in sorted(found.items()) if api in TE_APIS}


def _as_api(dotted: str) -> str:
    return ":".join(dotted.rsplit(".", 1))


def sglang_facts(source: Source) -> dict[str, Any]:
    """Returns SGLang's HTTP routes with the fields of their requests, and the options of its server."""
    module = "sglang.srt.entrypoints.http_server"
    routes: dict[str, str | None] = {}
    for node in source.statements(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in (part for part in node.decorator_list if isinstance(part, ast.Call)):
                if ast.unparse(decorator.func).startswith("app.") and isinstance(decorator.args[0], ast.Constant):
                    routes[str(decorator.args[0].value)] = _request_fields(source, module, node)
    options: set[str] = set()
    folder = source.file("sglang.srt.arg_groups.fields")
    for file in folder.parent.glob("*.py") if folder else ():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            options |= set(_fields(node)) if isinstance(node, ast.ClassDef) else set()
    if not options:
        raise ValueError("sglang.srt.arg_groups.fields holds no options that can be read: another layout of SGLang")
    return {"routes": dict(sorted(routes.items())), "options": " ".join(sorted(options))}


def _request_fields(source: Source, module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    annotation = node.args.args[0].annotation if node.args.args else None
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):  # Annotated[Fields, Body()]
        annotation = annotation.slice.elts[0]
    found = source.find(module, annotation.id) if isinstance(annotation, ast.Name) else None
    names = source.parameters(*found) if found and annotation.id != "Request" else None  # type: ignore[union-attr]
    return " ".join(sorted(name.rstrip("=") for name in names)) if names else None


def facts_of(library: str, root: Path) -> dict[str, Any]:
    """Returns what is recorded of a library ("megatron-core 0.19.2") from its files under ``root``."""
    source, name = Source(root), library.split()[0]
    if name == "sglang":
        return sglang_facts(source)
    if name == "megatron-core":
        uses, subclasses = project_uses()
        apis = sorted({use.api for use in uses if use.api.startswith("megatron.")})
        entries = {api: source.record(api, with_members=api in subclasses) for api in apis}
        return {"apis": entries, "transformer_engine": megatron_te_keywords(root)}
    apis = sorted({"transformer-engine": TE_APIS, "apex": APEX_APIS}[name])
    return {"apis": {api: source.record(api, with_members=False) for api in apis}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help='name and version, as "megatron-core 0.19.2"')
    parser.add_argument("--source", type=Path, required=True, help="folder that holds the library's top-level package")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default %(default)s")
    options = parser.parse_args()
    table = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    table[options.library] = facts_of(options.library, options.source)
    options.output.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", encoding="utf-8")
    print(f"{options.library}: {len(table[options.library].get('apis', ()))} names in {options.output}")


if __name__ == "__main__":
    main()
