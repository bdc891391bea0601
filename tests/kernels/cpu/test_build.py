"""Building the op: one build for concurrent loads, and a clear message where no build is possible."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from attention_backends.kernels.cpu import attention as cpu
from attention_backends.kernels.cpu import build, fallback
from tests.kernels.cases import one_row


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.built_op.cache_clear()
    yield tmp_path / "starling" / "extensions"
    cpu.built_op.cache_clear()


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

    def slow_build(name: str, built: Path) -> None:
        builds.append(name)
        time.sleep(0.2)
        built.write_bytes(b"")

    monkeypatch.setattr(build, "_build", slow_build)
    monkeypatch.setattr(torch.ops, "load_library", loads.append)
    threads = [threading.Thread(target=load_missing_op) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(builds) == 1 and len(loads) == 4


def load_missing_op() -> None:
    """Load an op that was not really built, so it may not be registered with torch."""
    with contextlib.suppress(AttributeError):
        build.load_op()


def test_key_changes_with_what_the_build_depends_on(monkeypatch):
    key = build.key()
    assert key == build.key()
    monkeypatch.setattr(build, "cpu_flags", lambda: "flags: none")
    assert build.key() != key
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert build.key() != key
