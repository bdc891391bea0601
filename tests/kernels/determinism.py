"""Refuses operations whose results may differ from call to call on a GPU, while they run on a CPU.

They are those that the documentation of ``torch.use_deterministic_algorithms`` lists for CUDA tensors, without those of
gradients and of layers. On a CPU, torch itself refuses none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _is_sum(arguments: dict[str, Any]) -> bool:
    return arguments["reduce"] in ("sum", "mean", "prod")


def _always(arguments: dict[str, Any]) -> bool:
    return True


NONDETERMINISTIC: dict[Any, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys((aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_), _always),
    **dict.fromkeys((aten.index_put, aten.index_put_, aten._index_put_impl_, aten.put, aten.put_), _always),
    **dict.fromkeys((aten.index_copy, aten.index_copy_, aten.scatter, aten.scatter_), _always),
    **dict.fromkeys((aten.histc, aten.median), _always),
    **dict.fromkeys((aten.scatter_reduce, aten.scatter_reduce_), _is_sum),
    aten.bincount: lambda arguments: arguments.get("weights") is not None,
    **dict.fromkeys((aten.cumsum, aten.cumsum_), lambda arguments: arguments["self"].is_floating_point()),
}
"""Operation -> whether a call with these arguments may have another result the next time."""


class OnlyDeterministic(TorchDispatchMode):
    """While this holds, an operation that is not deterministic on a GPU is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in NONDETERMINISTIC:
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            if NONDETERMINISTIC[func.overloadpacket](arguments):
                raise RuntimeError(f"{func} may have another result in each call on a GPU")
        return func(*args, **kwargs)
