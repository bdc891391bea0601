"""Pages of a CPU engine's cache in chunks of host memory, and back."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)

from starling.features.library.spec import HostWorker


class Region:
    """Host memory of four chunks."""

    def __init__(self) -> None:
        self.views: list[torch.Tensor] = []
        self.is_clean = False

    def create_next_worker_view(self, size: int) -> torch.Tensor:
        self.views.append(torch.zeros(4, size, dtype=torch.int8))
        return self.views[-1]

    def cleanup(self) -> None:
        self.is_clean = True


def pages(ids: list[int], caches: CanonicalKVCaches) -> Any:
    """Pages as vLLM's connector hands them to a worker."""
    spec = GPULoadStoreSpec(ids, group_sizes=[len(ids)], block_indices=[0])
    if find_spec("vllm.v1.kv_offload.pointer_utils") is None:  # before vLLM 0.34
        return spec
    from vllm.v1.kv_offload.pointer_utils import resolve_device_pointers

    return resolve_device_pointers(spec, caches)


def chunks(ids: list[int]) -> Any:
    return SimpleNamespace(block_ids=np.array(ids, dtype=np.int32))


def test_pages_of_all_layers_go_to_chunks_and_come_back() -> None:
    layers = [torch.arange(6 * size, dtype=torch.int8).reshape(6, size) for size in (8, 16)]
    before = [layer.clone() for layer in layers]
    region = Region()
    tensors = [CanonicalKVCacheTensor(layer, layer.shape[1]) for layer in layers]
    refs = [CanonicalKVCacheRef(index, layer.shape[1]) for index, layer in enumerate(layers)]
    caches = CanonicalKVCaches(tensors, [refs])
    worker = HostWorker(caches, region)  # type: ignore[arg-type]
    assert worker.submit_store(1, pages([5, 2], caches), chunks([0, 3]))
    worker.wait({1, 99})
    (stored,) = worker.get_finished()
    assert (stored.job_id, stored.success, stored.transfer_size) == (1, True, 2 * (8 + 16))
    for layer in layers:
        layer.zero_()
    assert worker.submit_load(2, chunks([3, 0]), pages([1, 4], caches), expedited=True)
    worker.wait({2})
    assert [result.job_id for result in worker.get_finished()] == [2]
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(layer[[1, 4]], was[[2, 5]])
        assert not layer[[0, 2, 3, 5]].any()
    worker.shutdown()
    assert region.is_clean
