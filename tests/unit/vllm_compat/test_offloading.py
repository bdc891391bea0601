"""What vLLM's offloading of pages does, as far as vllm_compat/offloading.py relies on it or changes it."""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.kv_offload.cpu import shared_offload_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from starling.vllm_compat.offloading import disown
from starling.vllm_compat.versions import vllm_version


@pytest.fixture
def nameless() -> Iterator[SharedOffloadRegion]:
    """Memory that this process has made, and whose name another one has removed."""
    size = mmap.PAGESIZE
    made = SharedOffloadRegion(f"test-{uuid.uuid4()}", 1, None, kv_bytes_per_chunk=size, cpu_page_size=size)
    os.unlink(made.mmap_path)
    yield made
    made.cleanup()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(shared_offload_region.logger, "warning", lambda *args, **options: found.append(options))
    return found


def test_vllm_0_32_still_logs_a_traceback_where_the_name_of_memory_is_gone(
    nameless: SharedOffloadRegion, logged: list[Any]
) -> None:
    """If not, nothing has to be disowned."""
    nameless.cleanup()
    assert logged == ([{"exc_info": True}] if (vllm_version() or "").startswith("0.32.") else [])


def test_memory_that_is_disowned_ends_silently(nameless: SharedOffloadRegion, logged: list[Any]) -> None:
    disown(nameless)
    nameless.cleanup()
    assert not logged and not os.path.exists(nameless.mmap_path)
