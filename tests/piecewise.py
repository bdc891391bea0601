"""vLLM's piecewise CUDA graphs on CPU tensors: vLLM's own split of a graph and its own wrapper of the pieces.

Only `torch.cuda.CUDAGraph` is replaced. As a real one, it computes from the tensors that it was captured with, and puts
its results into the tensors that the capture returned. A tensor at another address is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from vllm.compilation import cuda_graph
from vllm.compilation.backends import split_graph
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, override_forward_context


class Piece:
    """A compiled piece of the graph; the CUDA graph that is captured in its first call replays that call."""

    calls: ClassVar[list[Piece]] = []

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        self.args, self.out = args, self.module(*args)
        Piece.calls.append(self)
        return self.out

    def replay(self) -> None:
        found = self.module(*self.args)
        for old, new in zip(tensors(self.out), tensors(found), strict=True):
            old.copy_(new)


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    piece: Piece

    def replay(self) -> None:
        self.piece.replay()


@contextmanager
def capture(graph: Graph, **options: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    yield
    graph.piece = Piece.calls[-1]


def tensors(out: Any) -> Sequence[torch.Tensor]:
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def in_pieces(module: nn.Module, ops: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``module`` compiled and split at ``ops``, whose other pieces are captured in their first run with `graphs`."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    Piece.calls.clear()
    for name, fake in (
        ("weak_ref_tensors", lambda out: out),
        ("current_stream", lambda: None),
        ("capture_pool", lambda *_: nullcontext()),
    ):
        monkeypatch.setattr(cuda_graph, name, fake)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        split, pieces = split_graph(graph, ops)
        assert any(piece.is_splitting_graph for piece in pieces)
        for piece in pieces:
            if not piece.is_splitting_graph:
                wrapped = cuda_graph.CUDAGraphWrapper.__new__(cuda_graph.CUDAGraphWrapper)
                wrapped.runnable, wrapped.runtime_mode = Piece(piece.graph), CUDAGraphMode.PIECEWISE
                wrapped.vllm_config, wrapped.graph_pool, wrapped.is_debugging_mode = None, None, True
                wrapped.cudagraph_options = cuda_graph.CUDAGraphOptions(False, False, False)
                wrapped.concrete_cudagraph_entries = {}
                delattr(split, piece.submod_name)
                setattr(split, piece.submod_name, Called(wrapped))
        return split

    return torch.compile(module, backend=backend, fullgraph=True)


class Called(nn.Module):
    """A callable as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = [function]

    def forward(self, *args: Any) -> Any:
        return self.function[0](*args)


@contextmanager
def graphs(tokens: int, **context: Any) -> Iterator[None]:
    """A step with piecewise CUDA graphs of that many tokens."""
    context |= {"batch_descriptor": BatchDescriptor(tokens), "cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE}
    with override_forward_context(SimpleNamespace(**context)):
        yield
