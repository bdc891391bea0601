"""The tables of vLLM names that Starling depends on, and their check against a vLLM.

There is a table for each supported release of vLLM, such as names-0.32.json.

With PYTHONPATH=.ci:., as `make names` and `make check-vllm` set it:

    python -m vllm_names.names          compares the table of the installed vLLM's release with that vLLM
    python -m vllm_names.names PATH     compares the table of the nearest release with another vLLM: a folder or a wheel
    python -m vllm_names.names --write [PATH]  makes the table of the installed vLLM, or of PATH, anew

Both sides are read as source text; neither is imported. The kinds of use in the table:

    import    ``from vllm.a import X``, ``import vllm.a``
    subclass  a base class, or an argument of ``@extends``
    override  a method or class attribute that such a subclass defines and that its vLLM base has
    wrap      a function that ``patching.wrap`` replaces
    touch     a name in ``@touches``; an attribute of an imported vLLM module, class or instance; an attribute of
              ``self`` that comes from a vLLM base
    string    a whole string that is the full name of something in vLLM
    moved     a name in a call of ``patching.first_found``, if that vLLM has it
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from starling.vllm_compat.versions import release_of
from vllm_names.source_tree import FUNCTIONS, SourceTree, TreeError, decorators, dotted, imported, statements

ROOMS = (
    "vllm_compat",
    "scheduler",
    "attention_backends",
    "features",
    "engine_ext",
    "lab",
)
COMPAT = "vllm_compat/"
ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(__file__).parent
# What lies behind vLLM's scheduler and its KV cache manager. vllm_compat/scheduler_view.py is the way to it.
INTERNAL = frozenset(
    {
        "block_pool",
        "coordinator",
        "emit_cached_block_events",
        "evict_blocks",
        "free_block_queue",
        "get_cached_block",
        "hash_block_size",
        "kv_cache_manager",
        "kv_holding_waiting",
        "null_block",
        "num_cached_block",
        "prefix_cache_stats",
        "ref_cnt",
        "req_to_blocks",
        "single_type_managers",
        "watermark_blocks",
    }
)


Node = ast.stmt | ast.expr


@dataclass(frozen=True)
class Use:
    """One place that depends on a vLLM name.

    Attributes:
        certain: False where the name counts only if vLLM has it, such as a string that looks like a vLLM name.
    """

    name: str
    kind: str
    file: str
    line: int
    certain: bool = True


@dataclass
class ProjectClass:
    """A class of Starling.

    Attributes:
        name: its full name.
        bases: full names, those of ``@extends`` included.
        members: what the class body defines: name -> (line, whether it is only declared, without a value).
        accesses: (attribute, line) of each ``self.attribute`` and ``super().attribute``.
    """

    name: str
    file: str
    bases: list[str]
    members: dict[str, tuple[int, bool]]
    accesses: list[tuple[str, int]]


@dataclass
class Project:
    """What the sources of Starling say.

    Attributes:
        modules: full names of all modules.
        private: accesses to private names of other objects, as "file:line: what".
        internal: accesses to names of INTERNAL, in the same form.
        unclear: calls of wrap(), extends() and touches() that the table can't list, in the same form.
        of_releases: names that some supported releases have, and others do not -> their "since" and "before".
    """

    modules: set[str]
    uses: list[Use] = field(default_factory=list)
    classes: list[ProjectClass] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    internal: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    of_releases: dict[str, dict[str | None, str]] = field(default_factory=dict)


def is_vllm(name: str | None) -> TypeGuard[str]:
    return name is not None and f"{name}.".startswith("vllm.")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name != "__init__"


class Reader(ast.NodeVisitor):
    """Adds one file of Starling to a project."""

    def __init__(self, project: Project, file: str) -> None:
        self.project, self.file = project, file
        self.module = module_name(file)
        self.package = self.module if file.endswith("__init__.py") else self.module.rpartition(".")[0]
        self.scope: ChainMap[str, str | None] = ChainMap()  # local name -> full name; None hides an outer one

    def use(self, name: str, kind: str, node: Node, certain: bool = True) -> None:
        self.project.uses.append(Use(name, kind, self.file, node.lineno, certain))

    def report(self, reports: list[str], node: Node, what: str) -> None:
        reports.append(f"{self.file}:{node.lineno}: {what}")

    def full_name(self, node: ast.AST) -> str | None:
        """Full name of what an expression stands for, if it starts at an import or a class of this file; else None."""
        first, dot, rest = (dotted(node) or "").partition(".")
        target = self.scope.get(first)
        return target and f"{target}{dot}{rest}"

    def bind(self, body: Iterable[ast.AST]) -> None:
        for node in statements(body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.scope.update(imported(node, self.package))
            elif isinstance(node, ast.ClassDef):
                self.scope[node.name] = f"{self.module}.{node.name}"

    def visit_Module(self, node: ast.Module) -> None:
        self.bind(node.body)
        self.generic_visit(node)

    def visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = [item.arg for item in ast.walk(node.args) if isinstance(item, ast.arg)]
        self.scope = self.scope.new_child(dict.fromkeys(arguments))
        self.bind(node.body)
        self.generic_visit(node)
        self.scope = self.scope.parents

    visit_FunctionDef = visit_AsyncFunctionDef = visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        extended = [
            argument
            for call in node.decorator_list
            if isinstance(call, ast.Call) and self.full_name(call.func) == "starling.vllm_compat.patching.extends"
            for argument in call.args
        ]
        for argument in extended:
            if not is_vllm(self.full_name(argument)):
                self.report(self.project.unclear, argument, "extends() of a class that is not imported from vLLM")
        name = f"{self.module}.{node.name}"
        bases = [base for item in [*node.bases, *extended] if (base := self.full_name(item)) not in (None, name)]
        for base in filter(is_vllm, bases):
            self.use(base, "subclass", node)
        members: dict[str, tuple[int, bool]] = {}
        for item in statements(node.body):
            if isinstance(item, (*FUNCTIONS, ast.ClassDef)):
                members[item.name] = (item.lineno, False)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                members[item.target.id] = (item.lineno, item.value is None and "dataclass" not in decorators(node))
            elif isinstance(item, ast.Assign):
                names = [target.id for target in item.targets if isinstance(target, ast.Name)]
                members |= dict.fromkeys(names, (item.lineno, False))
        accesses = [
            (item.attr, item.lineno)
            for item in ast.walk(node)
            if isinstance(item, ast.Attribute) and is_self(item.value) and item.attr not in members
        ]
        self.project.classes.append(ProjectClass(name, self.file, bases, members, accesses))
        self.generic_visit(node)

    def visit_import(self, node: ast.Import | ast.ImportFrom) -> None:
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [target for _, target in imported(node, self.package)]
        for name in filter(is_vllm, names):
            self.use(name, "import", node)
            if any(map(is_private, name.split("."))):
                self.report(self.project.private, node, f"imports the private name {name}")

    visit_Import = visit_ImportFrom = visit_import

    def visit_Constant(self, node: ast.Constant) -> None:
        if re.fullmatch(r"vllm(\.\w+)+", string(node)):
            self.use(string(node), "string", node, certain=False)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.full_name(node.func)
        first, second = (*node.args, None, None)[:2]
        if function in ("starling.vllm_compat.patching.touches", "starling.vllm_compat.patching.first_found"):
            mark = function.rpartition(".")[2]
            moved = mark == "first_found"
            releases = {keyword.arg: string(keyword.value) for keyword in node.keywords}
            for argument in node.args:
                for name in in_braces(string(argument).replace(":", ".") if moved else string(argument)):
                    if is_vllm(name):
                        self.use(name, "moved" if moved else "touch", argument, certain=not moved)
                        if releases:
                            self.project.of_releases[name] = releases
                    else:
                        self.report(self.project.unclear, argument, f"{mark}() of something else than a vLLM name")
            return
        owner = self.full_name(first) if first else None
        if function == "starling.vllm_compat.patching.wrap":
            self.report(self.project.private, node, "wraps a function of vLLM")
            if is_vllm(owner) and string(second):
                self.use(f"{owner}.{string(second)}", "wrap", node)
            else:
                self.report(self.project.unclear, node, "wrap() of a name that is not known from the source")
        elif dotted(node.func) in ("setattr", "delattr") and is_vllm(owner):
            self.report(self.project.private, node, f"changes an attribute of {owner}")
        if dotted(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            self.check_attribute(node, first, string(second))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.full_name(node.value)
        if is_vllm(owner):
            if not is_dunder(node.attr):
                self.use(f"{owner}.{node.attr}", "touch", node, certain=False)
            if not isinstance(node.ctx, ast.Load):
                self.report(self.project.private, node, f"changes the attribute {node.attr} of {owner}")
        self.check_attribute(node, node.value, node.attr)
        self.generic_visit(node)

    def check_attribute(self, node: Node, value: ast.AST | None, attribute: str) -> None:
        """Report an access to a private name of another object, and to one of INTERNAL."""
        text = ast.unparse(value) if value else ""
        if attribute in INTERNAL:
            self.report(self.project.internal, node, f"reads or writes {text}.{attribute}")
        owner = (value and self.full_name(value)) or ""
        is_own = is_self(value) or owner in self.project.modules or owner.startswith(f"{self.module}.")
        is_other_library = bool(owner) and owner.partition(".")[0] not in ("vllm", "starling")
        if is_private(attribute) and not is_own and not is_other_library:
            self.report(self.project.private, node, f"reads or writes the private name {text}.{attribute}")


def in_braces(names: str) -> list[str]:
    """`vllm.a.B.{c, d}` -> `vllm.a.B.c`, `vllm.a.B.d`."""
    owner, brace, attributes = names.partition("{")
    return [owner + attribute.strip() for attribute in attributes.rstrip("}").split(",")] if brace else [names]


def string(node: ast.AST | None) -> str:
    """Return the value of a string literal; "" for other expressions."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_self(node: ast.AST | None) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    return (
        dotted(node.func) == "super" if isinstance(node, ast.Call) else bool(node and dotted(node) in ("self", "cls"))
    )


def module_name(file: str) -> str:
    """`scheduler/planning/plan.py` -> `starling.scheduler.planning.plan`."""
    return f"starling.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"


def read_project(root: Path) -> Project:
    """Read the .py files of Starling's packages, which are folders of ``root``."""
    files = sorted(path.relative_to(root).as_posix() for room in ROOMS for path in (root / room).rglob("*.py"))
    names = [module_name(file) for file in files]
    project = Project(modules=set(names))
    for file in files:
        Reader(project, file).visit(ast.parse((root / file).read_text(encoding="utf-8"), file))
    return project


def vllm_bases(classes: dict[str, ProjectClass], cls: ProjectClass) -> list[str]:
    """Return the vLLM classes that a class extends, itself or by bases of Starling, by Starling's names of them."""
    found: dict[str, None] = {}
    for base in cls.bases:
        own = classes.get(base)
        found |= dict.fromkeys([base] if is_vllm(base) else vllm_bases(classes, own) if own else [])
    return list(found)


def inherited_uses(project: Project, tree: SourceTree) -> list[Use]:
    """Return what classes of Starling override, declare and access of their vLLM bases."""
    uses = []
    classes = {cls.name: cls for cls in project.classes}
    for cls in project.classes:
        named = [(name, line, "touch" if declared else "override") for name, (line, declared) in cls.members.items()]
        named += [(name, line, "touch") for name, line in cls.accesses]
        for base in vllm_bases(classes, cls):
            symbol = tree.find(base)
            for name, line, kind in named:
                if symbol and not is_dunder(name) and tree.member(symbol, name):
                    uses.append(Use(f"{base}.{name}", kind, cls.file, line))
    return uses


def make_table(project: Project, tree: SourceTree) -> dict[str, Any]:
    """Return the content of a table: vLLM's version, and the names with their signatures (None: not found)."""
    uses: dict[str, list[Use]] = {}
    for use in [*project.uses, *inherited_uses(project, tree)]:
        if (use.certain and use.name not in project.of_releases) or tree.find(use.name):
            uses.setdefault(use.name, []).append(use)
    names = [
        {
            "name": name,
            "kinds": sorted({use.kind for use in uses[name]}),
            "where": sorted({use.file for use in uses[name]}),
            "signature": signature(tree, name),
        }
        for name in sorted(uses)
    ]
    return {"vllm": tree.version(), "names": names}


def signature(tree: SourceTree, name: str) -> str | None:
    symbol = tree.find(name)
    return tree.signature(symbol) if symbol else None


def private_names(project: Project, tree: SourceTree) -> list[str]:
    """Find uses of private names outside of vllm_compat/, as "file:line: what"."""
    inherited = [
        f"{use.file}:{use.line}: {'overrides' if use.kind == 'override' else 'uses'} the private name {use.name}"
        for use in inherited_uses(project, tree)
        if is_private(use.name.rpartition(".")[2])
    ]
    return outside_compat([*project.private, *inherited])


def scheduler_internals(project: Project) -> list[str]:
    """Find accesses to names of INTERNAL outside of vllm_compat/, as "file:line: what"."""
    return outside_compat(project.internal)


def outside_compat(reports: Iterable[str]) -> list[str]:
    return sorted({report for report in reports if not report.startswith(COMPAT)})


def table_file(version: str) -> Path:
    return TABLES / f"names-{'.'.join(map(str, release_of(version)))}.json"


def nearest_table(version: str) -> dict[str, Any]:
    """Return the table of a version's release; else that of the last release before it, else the first one."""
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in TABLES.glob("names-*.json")]
    tables.sort(key=lambda table: release_of(table["vllm"]))
    return next((table for table in reversed(tables) if release_of(table["vllm"]) <= release_of(version)), tables[0])


def excerpt(text: str, other: str) -> str:
    """At most 240 characters of a signature, from a little before where it differs from the other one."""
    pairs = enumerate(zip(text, other, strict=False))
    start = next((index for index, (here, there) in pairs if here != there), min(len(text), len(other)))
    first = max(0, start - 60) if len(text) > 240 else 0
    return "..." * (first > 0) + text[first : first + 240] + "..." * (first + 240 < len(text))


def compare(table: dict[str, Any], tree: SourceTree) -> tuple[list[str], list[str]]:
    """Messages on the table's names that are missing in a vLLM, and on those whose signature is another one there."""
    missing, changed = [], []
    for entry in table["names"]:
        name, was, now = entry["name"], entry["signature"], signature(tree, entry["name"])
        if now is None:
            missing.append(f"missing  {name}  (used in {', '.join(entry['where'])})")
        elif now != was:
            changed.append(f"changed  {name}\n  was {excerpt(was or '', now)}\n  is  {excerpt(now, was or '')}")
    return missing, changed


def as_json(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=2) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 1 where a name is missing or has changed, 2 where there is no such vLLM."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_names.names",
        description="Compare the vLLM names that Starling depends on with a vLLM.",
    )
    parser.add_argument("path", nargs="?", type=Path, help="vLLM package folder, a folder that contains it, or a wheel")
    parser.add_argument("--write", action="store_true", help="make the table of that vLLM anew")
    arguments = parser.parse_args(argv)
    try:
        tree = SourceTree(arguments.path) if arguments.path else SourceTree.installed()
        if arguments.write:
            table = make_table(read_project(ROOT), tree)
            table_file(tree.version()).write_text(as_json(table), encoding="utf-8")
        else:
            table = nearest_table(tree.version())
        missing, changed = compare(table, tree)
    except (TreeError, SyntaxError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*missing, *changed, sep="\n", end="\n" * bool(missing or changed))
    counts = f"{len(table['names'])} names: {len(missing)} missing, {len(changed)} changed"
    print(f"{counts}; the table is from vLLM {table['vllm']}, compared with vLLM {tree.version()}")
    return 1 if missing or changed else 0


if __name__ == "__main__":
    sys.exit(main())
