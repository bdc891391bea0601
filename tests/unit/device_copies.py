"""A step on torch's "meta" device, in place of a GPU: its tensors have no values, so reading one on the host fails."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.utils.torch_utils import async_tensor_h2d


class AsyncCopies(TorchDispatchMode):
    """Fails where an op takes tensors of the host and of the device, but for vLLM's copy by pinned memory.

    Any other copy from the host waits for the device. vLLM has the same rule (vllm/utils/gpu_sync_debug.py).

    Args:
        modules: that copy by ``async_tensor_h2d``.
        allowed: whether this copy may be made.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType, allowed: bool = True) -> None:
        super().__init__()
        self.is_copying, self.copies, self.allowed = False, 0, allowed
        self.operations: Counter[str] = Counter()  # beside copies and views
        for module in modules:
            monkeypatch.setattr(module, "async_tensor_h2d", self._copy)

    def _copy(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.is_copying = True
        self.copies += 1
        try:
            return async_tensor_h2d(*args, **kwargs)
        finally:
            self.is_copying = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.is_copying and not function.is_view:
            self.operations[function.overloadpacket._qualified_op_name] += 1
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)}
        assert len(devices) < 2 or (self.is_copying and self.allowed), function
        return result
