"""The memory that an engine on a CPU takes where vLLM's share of all memory is not free."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import psutil
import pytest
from vllm.engine.arg_utils import EngineArgs

from starling.engine_ext.serving.cli.cpu_host import memory_share

DEFAULT = EngineArgs.gpu_memory_utilization


def share(monkeypatch, available: float, environ: dict | None = None, total: int = 100, **given) -> float | None:
    """Of a host with so many GiB of memory."""
    memory = SimpleNamespace(total=total << 30, available=available * (1 << 30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    args = {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    args |= {"kv_cache_memory_bytes": None, "gpu_memory_utilization": DEFAULT, "model_tag": "some/model", "model": ""}
    return memory_share(Namespace(**args | given), environ or {})


def test_an_engine_takes_its_weights_and_half_of_what_is_free_beside_them(monkeypatch, tmp_path):
    assert share(monkeypatch, 60, model_tag=str(tmp_path)) == 0.3
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10 << 30)  # a file without blocks on the disk
    assert share(monkeypatch, 60, model_tag=str(tmp_path)) == 0.4
    assert share(monkeypatch, 60, model_tag=None, model=str(tmp_path)) == 0.4
    assert share(monkeypatch, 10, model_tag=str(tmp_path)) == 0.1, "vLLM says that the weights do not fit"
    for name in ("consolidated.safetensors", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert share(monkeypatch, 60, model_tag=str(tmp_path)) == 0.4, "each weight once"


def test_a_large_host_has_enough_left(monkeypatch, tmp_path):
    assert share(monkeypatch, 900, total=1000, model_tag=str(tmp_path)) == 0.868


def test_an_engine_whose_weights_are_not_known_takes_most_of_what_is_free(monkeypatch):
    assert share(monkeypatch, 60) == 0.51


def test_on_a_free_host_some_memory_is_left_to_the_other_processes(monkeypatch):
    assert share(monkeypatch, 99) is None, "vLLM's share leaves enough"
    assert share(monkeypatch, 23, total=24) == 0.7916


@pytest.mark.parametrize(
    "given", [{"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 1}, {"data_parallel_size": 2}]
)
def test_what_the_user_chose_stays(monkeypatch, given):
    assert share(monkeypatch, 60, **given) is None
    assert share(monkeypatch, 60, {"VLLM_CPU_KVCACHE_SPACE": "1"}) is None
