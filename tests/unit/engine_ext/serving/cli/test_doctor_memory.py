"""What `starling doctor` says of memory, against what is allocated."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from benchmarks.random_llama import make_random_llama
from starling.attention_backends.kernels import turned as kernels_turned
from starling.attention_backends.kernels.contract import Layout
from starling.attention_backends.kernels.cpu import attention as cpu
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.star import turned
from starling.attention_backends.star.rows import TurnedKeys
from starling.engine_ext import plugin
from starling.engine_ext.serving.cli import doctor_memory as memory
from starling.selftest.model import alternating_scores
from tests.parity.harness import TINY

HEADS, SIZE, PAGE = 8, 64, 16


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are made while this holds, and how many there are at a time at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {value.untyped_storage()._cdata for value in args if isinstance(value, torch.Tensor)}
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in self.known | inputs:
                self._note(made.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def paged_attention(operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What Triton's kernel makes."""
    return operands.make_out(), operands.make_lse()


def test_turned_queries_take_as_much_as_the_report_says(monkeypatch):
    """The calls of a step with two questions behind 15 documents, with the tensors of a GPU, counted on a CPU.

    A call has 16 tokens, without its first row. Here the largest has the last row of 15 tokens and 15 rows of one.
    """
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(turned.MAX_TOKENS, device, 16)
    monkeypatch.setattr(cpu, "has_op_for", lambda operands: False)
    for module in (turned, kernels_turned):
        monkeypatch.setattr(module, "paged_attention", paged_attention)
    monkeypatch.setattr(kernels_turned, "merge_rows", lambda *_: None)  # Triton merges in place
    row, document, lens = np.repeat([0, 1], 15), np.tile(np.arange(15), 2), np.array([15, 1])
    keys = TurnedKeys(row, row, document * 2, document * 0 + 2 * PAGE, document * 100)
    table, starts = torch.zeros(2, 32, dtype=torch.int32), torch.tensor([0, 15, 16], dtype=torch.int32)
    calls = list(turned.make_turned_rows(keys, starts[:2].numpy(), lens, table, PAGE))
    assert max(len(call.tokens) for call in calls) == 30
    own = turned.OwnRows(16, False, PAGE, lens, table, starts, torch.tensor(lens, dtype=torch.int32))
    step = turned.StepTokens(starts[:2].numpy(), lens, 17, torch.device("cpu"))
    rotation = Rotation(torch.ones(2000, SIZE // 2), torch.zeros(2000, SIZE // 2), True)
    attention = turned.TurnedAttention(own, calls, {"layer": rotation}, step)
    query, out = torch.zeros(2, 17, HEADS, SIZE, dtype=torch.bfloat16)
    caches = (torch.zeros(32, PAGE, 2, SIZE, dtype=torch.bfloat16),) * 2
    with Allocated() as allocated:
        attention.attend("layer", query, out, caches, Layout.PAGES, scale=1.0)
    said = memory.turned_bytes(16, HEADS, SIZE, itemsize=2)
    assert 0.8 * said < allocated.peak <= said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugin.register()
    return str(make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY))


@pytest.mark.parametrize(
    ("options", "backend", "says"),
    [
        ({}, "FLASH_ATTN", "star rows take no more"),
        ({}, "FLASHINFER", "the page lists"),
        ({}, None, "the page lists"),
        ({"star_segments": "auto", "star": "on"}, "FLASH_ATTN", "the turned queries"),
        ({"star_dense_heads": 0.5}, "FLASHINFER", "a copy of a layer's attention"),
        ({"star_dense_heads": 0.5}, "FLASH_ATTN", "star rows take no more"),
    ],
    ids=["star", "FlashInfer", "vLLM's choice", "documents", "dense heads, FlashInfer", "dense heads"],
)
def test_what_takes_memory_that_vllm_has_not_seen(model, tmp_path, options, backend, says):
    """The configuration of an engine, for another device."""
    if "star_dense_heads" in options:
        scores = tmp_path / "scores.json"
        scores.write_text(alternating_scores(model).model_dump_json())
        options = options | {"star_heads": str(scores)}
    config = EngineArgs(model=model, additional_config={"starling": options}).create_engine_config()
    config.device_config.device_type = "cuda"
    config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
    report = memory.unprofiled_memory(config)
    assert says in report["why"]
    assert (report["bytes"] == 0) == (says == "star rows take no more")
    assert (memory.MADE_WITH_THE_WEIGHTS in report["why"]) == ("star_segments" in options)
