"""The table of vLLM names, its check against other vLLMs, and the rules on private names."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest

from starling.vllm_compat.versions import release_of, version_problem
from vllm_names import names
from vllm_names.source_tree import SourceTree

VLLM = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.core import Engine\n",
    "_version.py": "version: str\n__version__ = version = '1.0'\n",
    "core.py": """
from dataclasses import dataclass
import other
from vllm.parts import *
from .parts.base import Base as Parent, helper

@dataclass
class Config:
    size: int
    name: str = "x"

class Engine(Parent):
    limit: int = 1

    def __init__(self, config: Config) -> None:
        self.queue: list[int] = []
        self.config = config

    @property
    def depth(self) -> int: return 0

    @depth.setter
    def depth(self, value): ...

    def _step(self, n: int = 1) -> None: ...
""",
    "parts/__init__.py": "from .base import shared\n",
    "parts/base.py": """
class Base:
    async def run(self, *, fast: bool) -> str: ...
    @classmethod
    def make(cls, a, /, b): ...

class Platform:
    def is_cpu(self) -> bool: ...

platform: Platform
try:
    from missing import helper
except ImportError:
    def helper(): ...
def shared(x): ...
""",
}

PROJECT = {
    "vllm_compat/hooks.py": """
from starling.vllm_compat.patching import extends, touches, wrap

def install():
    from vllm import core
    wrap(core, "helper", lambda original: original)

@touches("vllm.core.Engine.{queue, depth}")
def queue(engine): return engine.queue, engine.depth

def mixin():
    from vllm.core import Engine
    @extends(Engine)
    class Hooks:
        limit: int
        def _step(self, n=1): return super()._step(n)
        def other(self): return self.depth
    return Hooks
""",
    "scheduler/mine.py": """
from vllm.core import Engine
from vllm.parts.base import platform, shared
PATH = "vllm.core.Config"
LOGGER = "vllm.starling"

class Mine(Engine):
    def run(self): return platform.is_cpu()
""",
    "scheduler/others.py": """
from starling.scheduler.mine import Mine

class Derived(Mine):
    def make(self): return self.config
""",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def vllm(tmp_path):
    return write(tmp_path / "site" / "vllm", VLLM).parent


@pytest.fixture
def table(vllm, tmp_path, monkeypatch):
    """The table of PROJECT, put in the place of the committed ones."""
    project = names.read_project(write(tmp_path / "project", PROJECT))
    assert not project.unclear
    table = names.make_table(project, SourceTree(vllm))
    monkeypatch.setattr(names, "TABLES", tmp_path)
    (tmp_path / "names-1.0.json").write_text(names.as_json(table))
    return table


def edit(vllm, file, old, new):
    text = (vllm / "vllm" / file).read_text()
    assert old in text
    (vllm / "vllm" / file).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def installed():
    return SourceTree.installed()


@pytest.fixture(scope="module")
def starling():
    return names.read_project(names.ROOT)


def test_the_committed_table_is_that_of_the_sources(installed, starling):
    generated = names.as_json(names.make_table(starling, installed))
    file = names.table_file(installed.version())
    assert file.read_text() == generated, f"{file.name} is out of date: run `make names`"


@pytest.mark.parametrize("file", sorted(names.TABLES.glob("names-*.json")), ids=lambda file: file.stem)
def test_a_supported_vllm_has_every_name(file):
    table = json.loads(file.read_text())
    assert names.table_file(table["vllm"]) == file and version_problem(table["vllm"]) is None
    assert [entry["name"] for entry in table["names"] if entry["signature"] is None] == []
    assert len(table["names"]) > 200


@pytest.mark.parametrize("file", sorted(names.TABLES.glob("names-*.json")), ids=lambda file: file.stem)
def test_a_table_has_the_names_of_its_release(file, starling):
    """As far as the sources say them: what is inherited from vLLM's classes is read where that vLLM is installed."""
    table = json.loads(file.read_text())
    listed, release = {entry["name"] for entry in table["names"]}, release_of(table["vllm"])
    for use in starling.uses:
        bounds = starling.of_releases.get(use.name)
        if bounds is not None:
            since, before = (release_of(bounds.get(key, "")) for key in ("since", "before"))
            assert (use.name in listed) == ((not since or release >= since) and (not before or release < before))
        elif use.certain:
            assert use.name in listed, f"{file.name} is out of date: run `make names`"


def test_a_name_of_some_releases_is_listed_where_a_vllm_has_it(vllm, tmp_path):
    code = """
from vllm import core
from starling.vllm_compat.patching import touches, wrap
@touches("vllm.core.Engine.{queue, gone}", "vllm.core.absent", before="0.9")
def f(engine): return wrap(core, "absent", f)
"""
    project = names.read_project(write(tmp_path / "project", {"vllm_compat/old.py": code}))
    listed = [entry["name"] for entry in names.make_table(project, SourceTree(vllm))["names"]]
    assert listed == ["vllm.core", "vllm.core.Engine.queue"] and not project.unclear
    assert project.of_releases["vllm.core.absent"] == {"before": "0.9"}


@pytest.mark.parametrize(
    ("version", "used"), [("0.9.0", "1.0"), ("1.0.7", "1.0"), ("1.1.0rc1", "1.0"), ("1.10", "1.2"), ("unknown", "1.0")]
)
def test_a_vllm_is_compared_with_the_last_release_before_it(table, version, used):
    (names.TABLES / "names-1.2.json").write_text(names.as_json(table | {"vllm": "1.2"}))
    assert names.nearest_table(version)["vllm"] == used


def test_of_names_that_moved_a_table_has_those_that_its_vllm_has(vllm, tmp_path):
    code = """
from starling.vllm_compat.patching import first_found
helper = first_found("vllm.new.place:helper", "vllm.core:helper")
"""
    project = names.read_project(write(tmp_path / "project", {"vllm_compat/moved.py": code}))
    found = [(entry["name"], entry["kinds"]) for entry in names.make_table(project, SourceTree(vllm))["names"]]
    assert found == [("vllm.core.helper", ["moved"])] and not project.unclear


def test_the_check_imports_no_vllm():
    code = "import sys; from vllm_names import names; names.main([]); assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=names.ROOT / ".ci", check=True)


def test_only_vllm_compat_uses_private_names_and_the_schedulers_internals_and_every_mark_is_clear(installed, starling):
    violations = [*names.private_names(starling, installed), *names.scheduler_internals(starling), *starling.unclear]
    assert not violations, "\n".join(violations)


def test_each_kind_of_use_is_listed_with_its_signature(table):
    assert table["vllm"] == "1.0"
    engine = "vllm.core.Engine"
    init = "(self, config: Config) -> None"
    hooks, mine, others = "vllm_compat/hooks.py", "scheduler/mine.py", "scheduler/others.py"
    assert [tuple(entry.values()) for entry in table["names"]] == [
        ("vllm.core", ["import"], [hooks], "module"),
        ("vllm.core.Config", ["string"], [mine], "fields (size: int, name: str)"),
        (engine, ["import", "subclass"], [mine, hooks], f"class {init}"),
        (f"{engine}._step", ["override"], [hooks], "(self, n: int=1) -> None"),
        (f"{engine}.config", ["touch"], [others], "attribute"),
        (f"{engine}.depth", ["touch"], [hooks], "property (self) -> int"),
        (f"{engine}.limit", ["touch"], [hooks], "int"),
        (f"{engine}.make", ["override"], [others], "classmethod (cls, a, /, b)"),
        (f"{engine}.queue", ["touch"], [hooks], "list[int]"),
        (f"{engine}.run", ["override"], [mine], "async (self, *, fast: bool) -> str"),
        ("vllm.core.helper", ["wrap"], [hooks], "()"),
        ("vllm.parts.base.platform", ["import"], [mine], "Platform"),
        ("vllm.parts.base.platform.is_cpu", ["touch"], [mine], "(self) -> bool"),
        ("vllm.parts.base.shared", ["import"], [mine], "(x)"),
    ]


def test_an_equal_vllm_passes(table, vllm, capsys):
    assert names.main([str(vllm)]) == names.main([str(vllm / "vllm")]) == 0
    line = "14 names: 0 missing, 0 changed; the table is from vLLM 1.0, compared with vLLM 1.0\n"
    assert capsys.readouterr().out == 2 * line


def test_a_missing_name_is_reported(table, vllm, capsys):
    edit(vllm, "parts/base.py", "async def run", "async def execute")
    edit(vllm, "_version.py", "1.0", "1.1")
    assert names.main([str(vllm)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "missing  vllm.core.Engine.run  (used in scheduler/mine.py)",
        "14 names: 1 missing, 0 changed; the table is from vLLM 1.0, compared with vLLM 1.1",
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "name", "was", "now"),
    [
        ("core.py", "n: int = 1", "n: int, m: int", "Engine._step", "(self, n: int=1)", "(self, n: int, m: int)"),
        ("parts/base.py", "async def run", "def run", "Engine.run", "async (self", "(self"),
        ("core.py", "size: int", "size: str", "Config", "fields (size: int,", "fields (size: str,"),
        ("core.py", "    @property\n", "", "Engine.depth", "property (self)", "(self)"),
    ],
)
def test_a_changed_signature_is_reported(table, vllm, capsys, file, old, new, name, was, now):
    edit(vllm, file, old, new)
    assert names.main([str(vllm)]) == 1
    changed, before, after, counts = capsys.readouterr().out.splitlines()
    assert changed == f"changed  vllm.core.{name}"
    assert before.startswith(f"  was {was}") and after.startswith(f"  is  {now}")
    assert counts.startswith("14 names: 0 missing, 1 changed")


def test_a_wheel_is_read(table, vllm, tmp_path, capsys):
    (vllm / "vllm" / "_version.py").unlink()
    edit(vllm, "core.py", "self.queue:", "self.other:")
    wheel = tmp_path / "vllm-2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in vllm.rglob("*.py"):
            archive.write(path, path.relative_to(vllm))
        archive.writestr("vllm-2.0.dist-info/METADATA", "Name: vllm")
    assert names.main([str(wheel)]) == 1
    output = capsys.readouterr().out
    assert "missing  vllm.core.Engine.queue" in output and output.endswith("compared with vLLM 2.0\n")


@pytest.mark.parametrize(
    ("code", "violation"),
    [
        ("class A(Engine):\n    def _step(self, n=1): ...", "overrides the private name vllm.core.Engine._step"),
        ("class A(Engine):\n    def f(self): self._step()", "uses the private name vllm.core.Engine._step"),
        ("class A(Mine):\n    def f(self): super()._step()", "uses the private name vllm.core.Engine._step"),
        ("def f(x): return x._hidden", "reads or writes the private name x._hidden"),
        ("def f(x): return getattr(x, '_hidden')", "reads or writes the private name x._hidden"),
        ("from vllm.core import _secret", "imports the private name vllm.core._secret"),
        ("import vllm._core.x", "imports the private name vllm._core.x"),
        ("from starling.vllm_compat.patching import wrap\nwrap(Engine, 'run', id)", "wraps a function of vLLM"),
        ("Engine.limit = 2", "changes the attribute limit of vllm.core.Engine"),
        ("def f():\n    import vllm.core as c\n    c.Engine.limit += 2", "changes the attribute limit of"),
        ("setattr(Engine, 'limit', 2)", "changes an attribute of vllm.core.Engine"),
    ],
)
def test_a_private_use_is_reported_outside_vllm_compat(vllm, tmp_path, code, violation):
    code = f"from vllm.core import Engine\nfrom starling.scheduler.mine import Mine\n{code}\n"
    root = write(tmp_path / "project", PROJECT | {"features/replicas/new.py": code, "vllm_compat/new.py": code})
    (found,) = names.private_names(names.read_project(root), SourceTree(vllm))
    assert found.startswith("features/replicas/new.py:") and violation in found


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def _own(self): return self._own",
        "class A:\n    _made = {}\ndef f(): return A._made",
        "class A(Engine):\n    def _own(self): return self._own() + self.limit",
        "from starling.scheduler import mine\ndef f(): return mine._helper",
        "def f(x): return x.__class__",
        "def f(Engine): Engine.limit = 2",
    ],
)
def test_own_private_names_are_allowed(vllm, tmp_path, code):
    root = write(
        tmp_path / "project", PROJECT | {"features/replicas/new.py": f"from vllm.core import Engine\n{code}\n"}
    )
    assert names.private_names(names.read_project(root), SourceTree(vllm)) == []


def test_internals_of_the_scheduler_are_reported_outside_vllm_compat(tmp_path):
    code = "def f(scheduler):\n    return scheduler.kv_cache_manager.num_pages, getattr(scheduler, 'block_pool')\n"
    root = write(tmp_path, {"scheduler/new.py": code, "vllm_compat/new.py": code})
    assert names.scheduler_internals(names.read_project(root)) == [
        "scheduler/new.py:2: reads or writes scheduler.block_pool",
        "scheduler/new.py:2: reads or writes scheduler.kv_cache_manager",
    ]


@pytest.mark.parametrize(
    "call", ["wrap(owner, 'run', id)", "wrap(Engine, name, id)", "extends(owner)(f)", "touches('x.y')(f)"]
)
def test_a_mark_that_says_too_little_is_reported(tmp_path, call):
    imports = "from vllm.core import Engine\nfrom starling.vllm_compat.patching import extends, touches, wrap\n"
    code = f"@{call[:-3]}\nclass A: ..." if call.startswith("extends") else call
    root = write(tmp_path, {"vllm_compat/new.py": f"{imports}{code}\n"})
    assert len(names.read_project(root).unclear) == 1
