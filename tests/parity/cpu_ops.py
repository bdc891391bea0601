"""Lets the layers of an engine attend with one of the two CPU ops, whichever is faster, and says that it ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

from starling.attention_backends.kernels.cpu.paged_op import Op
from starling.attention_backends.star import cpu_impl
from tests.parity.counted import counted

RAN: Counter[str] = Counter()


def use_starlings(worker: Any) -> None:
    cpu_impl.select_op = lambda *_, **__: Op.STARLING
    cpu_impl.paged_attention = counted(cpu_impl.paged_attention, RAN)


def use_vllms(worker: Any) -> None:
    """To be called after batches that Starling's op ran."""
    assert RAN.pop("paged_attention")
    cpu_impl.select_op = lambda *_, **__: Op.VLLM


def check_vllms(worker: Any) -> None:
    """To be called after batches that vLLM's op ran."""
    assert not RAN
