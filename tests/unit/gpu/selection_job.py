"""Selects an attention backend as vLLM does on CUDA; prints what it finds as JSON. Run as a process of its own."""

from __future__ import annotations

import json
import pickle
from itertools import product

from tests.unit.gpu.cuda_process import become_cuda

CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CUSTOM", None)


def main() -> None:
    platform = become_cuda()
    import torch
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from starling.attention_backends.paged import CLASSES, register_paged_backend
    from starling.attention_backends.star.backend import register_star_backends

    register_paged_backend("triton")
    register_star_backends("triton")
    config = selector.AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
    )
    found = []
    for capability, name in product(CAPABILITIES, BACKENDS):
        platform.capability = DeviceCapability(*capability)
        selector._cached_get_attn_backend.cache_clear()
        entry = {"capability": capability, "backend": name}
        found.append(entry)
        try:
            backend = selector._cached_get_attn_backend(name and AttentionBackendEnum[name], config, 8)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
            continue
        base = resolve_obj_by_qualname(AttentionBackendEnum[backend.get_name()].value or CLASSES["triton"])
        entry |= {
            "name": backend.get_name(),
            "class": backend.__name__,
            "extends": issubclass(backend, base) and backend is not base,
            "same": backend is AttentionBackendEnum[backend.get_name()].get_class(),
            "pickled": pickle.loads(pickle.dumps(backend)) is backend,
            "impl": backend.get_impl_cls() is base.get_impl_cls(),
            "splits_rows": issubclass(backend.get_builder_cls(), base.get_builder_cls())
            and backend.get_builder_cls() is not base.get_builder_cls(),
            "valid": [one.backend.name for one in platform.get_valid_backends(platform.capability, config, 8)[0]],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
