"""Lets an engine on CPU compute Attamba as one on a GPU does: with the Triton kernels, in the layout of their pages."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from starling.attention_backends.attamba import attend_step, mix, scan_kernel
from starling.attention_backends.kernels.contract import Layout
from starling.attention_backends.kernels.triton import paged as triton_attention
from starling.engine_ext.models import attamba
from starling.vllm_compat.worker import metadata_builders
from tests.parity.counted import counted

RAN: Counter[str] = Counter()


def use_kernels(worker: Any) -> None:
    """To be called before the engine has cached anything, with Triton's interpreter."""
    for module in (attend_step, mix):
        module.built_op = lambda: None
    mix.chunk_scan = counted(scan_kernel.chunk_scan, RAN)
    attend_step.paged_attention = counted(triton_attention.paged_attention, RAN)
    attamba.KvPages = functools.partial(attamba.KvPages, layout=Layout.PAGES)
    for layer in worker.get_model().layers:
        layer.attentive_ssm.states.kv_cache = layer.attentive_ssm.states.kv_cache  # forgets the views
        layer.attentive_ssm.window.kv_cache = layer.attentive_ssm.window.kv_cache
        layer.attentive_ssm.mixers.decode = counted(layer.attentive_ssm.mixers.decode, RAN)
    for builder, _ in metadata_builders(worker.model_runner):
        builder.has_kernels = True


def check_kernels(worker: Any) -> None:
    """Assert that the kernels of prefill and those of decode ran."""
    assert RAN.keys() == {"chunk_scan", "paged_attention", "decode"}, RAN
