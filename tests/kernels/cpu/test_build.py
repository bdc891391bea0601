"""Building and loading the op: one build for concurrent loads, and a clear message where the op can't be used."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from starling.attention_backends.kernels.cpu import build, fallback
from starling.attention_backends.kernels.cpu import paged_op as cpu
from starling.attention_backends.kernels.cpu.build import seal
from tests.kernels.cases import one_row


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.built_op.cache_clear()
    yield tmp_path / "starling" / "extensions"
    cpu.built_op.cache_clear()


def test_the_name_of_a_built_op_depends_on_all_of_its_sources():
    folder = Path(build.__file__).parent
    assert sorted(build.SOURCES) == sorted(path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def test_without_a_compiler_the_fallback_runs(empty_cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = one_row(3, 20)
    with caplog.at_level(logging.WARNING):
        out, lse = case.run(cpu.paged_attention)
        case.run(cpu.paged_attention)
    assert [record.message for record in caplog.records] == [
        "the CPU attention op is compiled on first use, and there is no C++ compiler 'no-such-compiler': install g++ "
        "12 or newer, or name one in CXX. Attention runs in plain torch, which is slower."
    ]
    plain, plain_lse = case.run(fallback.paged_attention)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


def test_failing_compiler_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="does not compile with 'false'"):
        build.load_op()
    assert not list(empty_cache.glob("*.so"))


def test_no_directory_to_build_in(empty_cache, monkeypatch):
    empty_cache.parent.mkdir(parents=True)
    empty_cache.write_text("a file where the directory should be")
    with pytest.raises(build.BuildError, match=r"needs a directory to build in.*set XDG_CACHE_HOME"):
        build.load_op()


def test_concurrent_loads_build_once(empty_cache, monkeypatch):
    """The lock is on a file that each thread opens for itself, as processes do."""
    builds, loads = [], []

    def slow_build(built: Path) -> None:
        builds.append(built)
        time.sleep(0.2)
        write_op(built)

    monkeypatch.setattr(build, "_build", slow_build)
    monkeypatch.setattr(torch.ops, "load_library", loads.append)
    threads = [threading.Thread(target=load_missing_op) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert len(builds) == 1 and len(loads) == 4


def load_missing_op() -> None:
    """Load an op that was not really built, so it may not be registered with torch."""
    with contextlib.suppress(build.BuildError):
        build.load_op()


def write_op(built: Path, content: bytes = b"an op") -> None:
    """Write what a build leaves."""
    built.write_bytes(content)
    seal(built)


@pytest.mark.parametrize("damage", [lambda op: op[: len(op) // 2], lambda op: b"", lambda op: b"x" + op[1:]])
def test_a_damaged_op_is_built_again(empty_cache, monkeypatch, damage):
    builds, loads = [], []

    def rebuild(built: Path) -> None:
        builds.append(built)
        write_op(built)

    empty_cache.mkdir(parents=True)
    built = build.built_op_path(empty_cache)
    write_op(built)
    monkeypatch.setattr(build, "_build", rebuild)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loads.append(path.read_bytes()))
    load_missing_op()
    assert not builds
    built.write_bytes(damage(built.read_bytes()))
    load_missing_op()
    assert builds == [built]
    assert loads[0] == loads[1]


def test_an_op_that_is_there_needs_no_writable_directory_and_no_compiler(empty_cache, monkeypatch):
    loads = []
    empty_cache.mkdir(parents=True)
    built = build.built_op_path(empty_cache)
    write_op(built)
    monkeypatch.setattr(torch.ops, "load_library", loads.append)
    monkeypatch.setattr(build.fcntl, "flock", lambda *_: pytest.fail("a lock is a file that is written"))
    load_missing_op()
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_missing_op()
    assert loads == [built, built]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
def test_where_the_op_cant_be_loaded_the_fallback_runs(tmp_path):
    """In a mount namespace of its own; each case in a process of its own, since a library that is cut off is fatal."""
    job = [sys.executable, "-m", "tests.kernels.cpu.load_job", tmp_path]
    done = subprocess.run(["unshare", "--mount", *job], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout.splitlines()[-1])
    assert warnings.keys() == {"noexec", "cut_off", "no_home", "read_only"}
    assert "can't be loaded" in warnings["noexec"] and "XDG_CACHE_HOME" in warnings["noexec"]
    assert "no C++ compiler 'no-such-compiler'" in warnings["cut_off"]
    assert "Set XDG_CACHE_HOME" in warnings["no_home"]
    assert "needs a directory to build in" in warnings["read_only"]
    assert all(text.endswith("Attention runs in plain torch, which is slower.") for text in warnings.values())


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (build, "cpu_flags", lambda: "flags: none"),
        (build, "c_library", lambda: "glibc 2.0"),
        (build, "compiler_version", lambda: "/usr/bin/c++ 1.0"),
        (torch, "__version__", "0.0"),
    ],
    ids=["processor", "C library", "compiler", "torch"],
)
def test_another_op_is_built_where_what_it_depends_on_has_changed(tmp_path, monkeypatch, owner, name, value):
    path = build.built_op_path(tmp_path)
    assert path == build.built_op_path(tmp_path)
    monkeypatch.setattr(owner, name, value)
    assert build.built_op_path(tmp_path) != path


def test_the_compiler_and_the_c_library_are_known_by_their_versions():
    assert re.search(r"\d+\.\d+", build.compiler_version())
    assert re.search(r"\d+\.\d+", build.c_library())
