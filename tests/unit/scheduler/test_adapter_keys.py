"""The keys of pages of LoRA adapters: equal for equal files, and for nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from starling.engine_ext.engine_core import StarScheduler
from starling.scheduler.cache_keys import AdapterKeys
from starling.vllm_compat import prefix_cache
from tests.unit.scheduler.library_engine import PAGE_SIZE, LibraryEngine, library_config
from tests.unit.scheduler.simulation import make_config, make_request, make_scheduler, random_ids


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", b"weights")


def make_adapter(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_another_engine_has_the_same_key_for_the_same_files(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "copy")
    other = make_adapter(tmp_path / "other", b"wEIGHTS")
    key = AdapterKeys().key_of(adapter)
    assert AdapterKeys().key_of(copy) == AdapterKeys().key_of(adapter) == key
    assert AdapterKeys().key_of(other) != key


def test_files_that_change_while_an_engine_runs_are_no_other_engines(adapter: Path) -> None:
    """It is not known which ones the engine has loaded."""
    running = AdapterKeys()
    before = running.key_of(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    after = running.key_of(adapter)
    assert after not in (before, AdapterKeys().key_of(adapter), AdapterKeys().key_of(adapter))
    assert running.key_of(adapter) == after


def test_files_that_are_not_known_are_no_other_engines(tmp_path: Path) -> None:
    one = AdapterKeys()
    assert one.key_of(tmp_path / "none") == one.key_of(tmp_path / "none")
    assert one.key_of(tmp_path / "none") != AdapterKeys().key_of(tmp_path / "none")


def test_pages_have_the_key_of_their_adapter_in_an_engine_with_a_library(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "_page_keys", [])
    config = library_config(tmp_path / "models", 2**20)

    def hashes(folder: Path | None) -> list[Any]:
        lora = None if folder is None else LoRARequest("an adapter", 1, str(folder))
        return make_request("one", None, random_ids(1, 100), PAGE_SIZE, lora_request=lora).block_hashes

    plain = make_config(tmp_path / "plain", block_size=PAGE_SIZE)
    make_scheduler(plain, StarScheduler, PAGE_SIZE)
    dense, by_name = hashes(None), hashes(adapter)
    for _ in range(2):
        LibraryEngine(config, StarScheduler, num_pages=40).close()
        assert hashes(None) == dense
        with_library = hashes(adapter)
        assert with_library not in (dense, by_name)
        assert hashes(adapter) == with_library
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    assert hashes(adapter) != with_library
