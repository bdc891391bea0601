"""Looks names up in the source text of a vLLM. Parses files with ``ast``; imports and runs nothing of that vLLM.

A name is found where Python would find it at run time: through re-exports, relative imports, aliases and base classes.
Statements under ``if``, ``try`` and ``with`` count as if they always ran, ``if TYPE_CHECKING`` included.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CALL_DECORATORS = {
    "classmethod",
    "staticmethod",
    "property",
    "cached_property",
    "contextmanager",
    "asynccontextmanager",
}
DATA_DECORATORS = {"dataclass", "config"}  # the latter: vllm/config/utils.py
DATA_BASES = {"BaseModel", "Struct", "NamedTuple", "TypedDict"}


class TreeError(Exception):
    """A path holds no vLLM whose source can be read."""


@dataclass(frozen=True)
class Link:
    """A name bound by an import. ``target`` is the imported module or name."""

    target: str


Binding = ast.AST | Link
Folder = Path | zipfile.Path


@dataclass(frozen=True, eq=False)
class Module:
    name: str
    bindings: dict[str, list[Binding]]
    star_imports: list[str]


@dataclass(frozen=True, eq=False)
class Symbol:
    """What a name stands for: a definition in a module; the module itself where ``node`` is None."""

    module: Module
    node: Binding | None = None


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` of an expression that is names and attributes only, without subscripts around it; else None."""
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (value := dotted(node.value)):
        return f"{value}.{node.attr}"
    return None


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Return the statements of one scope, those inside ``if``, ``try``, ``with`` and loops included."""
    for node in body:
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.expr)):
            yield from statements(ast.iter_child_nodes(node))


def imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str]]:
    """(local name, target) of each name that a statement in ``package`` imports; ("*", module) of a star import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        return
    parents = package.split(".")[: -node.level + 1 or None] if node.level else []
    module = ".".join([*parents, *filter(None, [node.module])])
    for alias in node.names:
        yield ("*", module) if alias.name == "*" else (alias.asname or alias.name, f"{module}.{alias.name}")


def decorators(node: ast.AST) -> set[str]:
    """Last component of the name of each decorator."""
    calls = [item.func if isinstance(item, ast.Call) else item for item in getattr(node, "decorator_list", ())]
    return {name.rpartition(".")[2] for name in map(dotted, calls) if name}


def is_variant(node: ast.AST) -> bool:
    """Whether a definition only adds to another one of its name: an overload, a property's setter or deleter."""
    return not decorators(node).isdisjoint({"overload", "setter", "deleter"})


def scope_bindings(body: Iterable[ast.AST], package: str = "") -> dict[str, list[Binding]]:
    """Return what each name of a scope is bound to: definitions first, then imports, annotations, assignments."""
    ranked: dict[str, list[tuple[int, Binding]]] = {}
    for node in statements(body):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            if not is_variant(node):
                ranked.setdefault(node.name, []).append((0, node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name, target in imported(node, package):
                ranked.setdefault(name, []).append((1, Link(target)))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            ranked.setdefault(node.target.id, []).append((2, node))
        elif isinstance(node, ast.Assign):
            for item in [item for target in node.targets for item in ast.walk(target)]:
                if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store):
                    ranked.setdefault(item.id, []).append((3, node))
    return {name: [node for _, node in sorted(found, key=lambda pair: pair[0])] for name, found in ranked.items()}


def instance_attributes(cls: ast.ClassDef) -> dict[str, ast.AST]:
    """Return what methods of a class assign to ``self``: the annotated assignment if there is one, or the target."""
    found: dict[str, ast.AST] = {}
    for method in statements(cls.body):
        arguments = [*method.args.posonlyargs, *method.args.args] if isinstance(method, FUNCTIONS) else []
        if not arguments:
            continue
        for node in ast.walk(method):
            target = node.target if isinstance(node, ast.AnnAssign) else node
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and isinstance(target.value, ast.Name)
                and target.value.id == arguments[0].arg
                and (isinstance(node, ast.AnnAssign) or target.attr not in found)
            ):
                found[target.attr] = node
    return found


class SourceTree:
    """One vLLM's sources.

    Args:
        path: the package folder ``vllm``, a folder that contains it, or a wheel file.

    Raises:
        TreeError: there is no vLLM at this path.
    """

    def __init__(self, path: Path) -> None:
        root: Folder = path
        if path.is_file():
            try:
                root = zipfile.Path(path)
            except zipfile.BadZipFile as error:
                raise TreeError(f"{path} is neither a folder nor a wheel") from error
        self.package: Folder = root / "vllm"
        self.parent: Folder = root
        if not (self.package / "__init__.py").is_file():
            self.package, self.parent = root, path.resolve().parent
        if not (self.package / "__init__.py").is_file():
            raise TreeError(f"{path} is no vLLM: it has neither vllm/__init__.py nor __init__.py")
        self._modules: dict[str, Module | None] = {}
        self._found: dict[str, Symbol | None] = {}
        self._lineages: dict[Symbol, list[Symbol]] = {}
        self._members: dict[Symbol, dict[str, ast.AST]] = {}

    @classmethod
    def installed(cls) -> SourceTree:
        """Return the installed vLLM.

        Raises:
            TreeError: none is installed.
        """
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise TreeError("vLLM is not installed")
        return cls(Path(next(iter(spec.submodule_search_locations))))

    def version(self) -> str:
        """Return the version from ``_version.py``, else from the name of the dist-info folder beside the package."""
        file = self.package / "_version.py"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if match := re.search(r"^(?:__version__|version)\b.*=\s*['\"]([^'\"]+)", text, re.MULTILINE):
            return match[1]
        names = [re.fullmatch(r"vllm(?:_cpu)?-(.+)\.dist-info", item.name) for item in self.parent.iterdir()]
        return next((match[1] for match in names if match), "of unknown version")

    def module(self, name: str) -> Module | None:
        """Return a module or package of this vLLM, by its full name; None where there is none.

        Raises:
            TreeError: this Python can't parse the file.
        """
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        folder = self.package
        *parents, last = name.split(".")[1:] or [""]
        for part in parents:
            folder = folder / part
        inside = folder / last if last else folder
        if (inside / "__init__.py").is_file():
            file, package = inside / "__init__.py", name
        elif last and (folder / f"{last}.py").is_file():
            file, package = folder / f"{last}.py", name.rpartition(".")[0]
        else:
            return Module(name, {}, []) if inside.is_dir() else None
        try:
            body = ast.parse(file.read_text(encoding="utf-8")).body
        except (SyntaxError, UnicodeDecodeError) as error:
            raise TreeError(f"{file} can't be parsed by this Python: {error}") from error
        bindings = scope_bindings(body, package)
        return Module(name, bindings, [link.target for link in bindings.pop("*", []) if isinstance(link, Link)])

    def find(self, name: str) -> Symbol | None:
        """Return what a full name such as "vllm.v1.request.Request.status" stands for; None where there is nothing."""
        if name not in self._found:
            self._found[name] = None  # ends an import cycle
            parent, _, last = name.rpartition(".")
            if parent:
                scope = self.find(parent)
                self._found[name] = self.member(scope, last) if scope else None
            elif module := self.module(name):
                self._found[name] = Symbol(module)
        return self._found[name]

    def member(self, symbol: Symbol, name: str) -> Symbol | None:
        """Find a name in a module, or an attribute of a class, of its vLLM bases or its instance, or None."""
        node = symbol.node
        if node is None:
            return self._module_member(symbol.module, name)
        if isinstance(node, ast.ClassDef):
            owners = (cls for cls in self.lineage(symbol) if name in self._class_members(cls))
            return next((Symbol(cls.module, self._class_members(cls)[name]) for cls in owners), None)
        cls_name = None
        if isinstance(node, ast.AnnAssign):
            cls_name = dotted(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            cls_name = dotted(node.value.func)
        cls = self.resolve(symbol.module, cls_name) if cls_name else None
        return self.member(cls, name) if cls and isinstance(cls.node, ast.ClassDef) else None

    def _module_member(self, module: Module, name: str) -> Symbol | None:
        full_name = f"{module.name}.{name}"
        for binding in module.bindings.get(name, ()):
            found: Symbol | None = Symbol(module, binding)
            if isinstance(binding, Link) and f"{binding.target}.".startswith("vllm."):
                found = None if binding.target == full_name else self.find(binding.target)
            elif isinstance(binding, ast.Assign) and (alias := dotted(binding.value)):
                found = self.resolve(module, alias) or found
            if found:
                return found
        submodule = self.module(full_name)
        if submodule:
            return Symbol(submodule)
        stars = (self.find(f"{target}.{name}") for target in module.star_imports if target.startswith("vllm."))
        return next(filter(None, stars), None)

    def resolve(self, module: Module, name: str) -> Symbol | None:
        """Return what a dotted name means inside of a module of this vLLM; None where it is not vLLM's."""
        return self.find(f"{module.name}.{name}")

    def lineage(self, symbol: Symbol) -> list[Symbol]:
        """Return a class and its vLLM bases, in the order in which attributes are looked up."""
        if symbol not in self._lineages:
            assert isinstance(symbol.node, ast.ClassDef)
            names = filter(None, map(dotted, symbol.node.bases))
            bases = [base for name in names if (base := self.resolve(symbol.module, name))]
            order = [symbol]
            for base in bases:
                if isinstance(base.node, ast.ClassDef):
                    order += self.lineage(base)
            by_node = {cls.node: cls for cls in reversed(order)}  # a common base of several comes last
            self._lineages[symbol] = list(by_node.values())[::-1]
        return self._lineages[symbol]

    def _class_members(self, cls: Symbol) -> dict[str, ast.AST]:
        if cls not in self._members:
            assert isinstance(cls.node, ast.ClassDef)
            bindings = scope_bindings(cls.node.body)
            own = {name: found[0] for name, found in bindings.items() if not isinstance(found[0], Link)}
            self._members[cls] = instance_attributes(cls.node) | own
        return self._members[cls]

    def signature(self, symbol: Symbol) -> str:
        """One line that changes when code that uses this name may have to: arguments, fields or the annotation."""
        node = symbol.node
        if node is None:
            return "module"
        if isinstance(node, Link):
            return f"imported from {node.target}"
        if isinstance(node, FUNCTIONS):
            return function_signature(node)
        if isinstance(node, ast.ClassDef):
            return self._class_signature(symbol)
        if isinstance(node, ast.AnnAssign):
            return one_line(node.annotation)
        return "attribute" if isinstance(node, ast.Attribute) else "constant"

    def _class_signature(self, symbol: Symbol) -> str:
        lineage = [(cls, cls.node) for cls in self.lineage(symbol) if isinstance(cls.node, ast.ClassDef)]
        for cls, node in lineage:
            init = self._class_members(cls).get("__init__")
            if isinstance(init, FUNCTIONS):
                return "class " + function_signature(init)
            bases = {name.rpartition(".")[2] for name in map(dotted, node.bases) if name}
            if decorators(node) & DATA_DECORATORS or bases & DATA_BASES:
                break
        else:
            return "class"
        fields: dict[str, str] = {}
        for _, node in reversed(lineage):
            for item in statements(node.body):
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    fields[item.target.id] = one_line(item.annotation)
        kept = [f"{name}: {annotation}" for name, annotation in fields.items() if "ClassVar" not in annotation]
        return f"fields ({', '.join(kept)})"


def one_line(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def function_signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Arguments and the annotated result, after what changes how the function is called."""
    notes = sorted(decorators(node) & CALL_DECORATORS) + ["async"] * isinstance(node, ast.AsyncFunctionDef)
    result = f" -> {one_line(node.returns)}" if node.returns else ""
    return " ".join([*notes, f"({one_line(node.args)}){result}"])
