"""Run in a process of its own: the fake GPU does what a GPU does, as far as the tests of engines rely on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.gpu_shim import cuda
from tests.gpu_shim.device import GPU, SYNC_WARNING, GpuTensor


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values).to("cuda")


def check_tensors() -> None:
    x = torch.zeros(2, 3, device="cuda")
    assert isinstance(x, GpuTensor) and x.is_cuda and x.device == torch.device("cuda:0")
    x[1] = 2
    x.view(-1)[0] = 5
    assert x.cpu().tolist() == [[5, 0, 0], [2, 2, 2]] and not isinstance(x.cpu(), GpuTensor)
    host = x.cpu()
    x.fill_(1)
    assert host[0, 0] == 5, "a copy on the host is its own"
    for on_two_devices in (lambda: x + torch.ones(3), lambda: torch.cat((x, torch.ones(1, 3)))):
        with pytest.raises(RuntimeError, match="same device"):
            on_two_devices()
    assert (x + torch.tensor(1.0)).cpu().tolist() == [[2] * 3] * 2
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@contextmanager
def waits() -> Iterator[list[str]]:
    """The operations that wait for the GPU while this holds."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    torch.cuda.set_sync_debug_mode("default")
    found += [str(one.message) for one in caught if str(one.message).startswith(SYNC_WARNING)]


def check_waits() -> None:
    x, at, mask = numbers(1, 2, 3), numbers(2).long(), numbers(1, 0, 1) > 0
    host, pinned = torch.ones(3), torch.ones(3).pin_memory()
    assert pinned[1:].is_pinned() and torch.zeros(2, pin_memory=True).is_pinned() and not host.is_pinned()
    waiting: list[Callable[[], object]] = [
        lambda: x[0].item(),
        lambda: float(x[1]),
        lambda: bool(mask[0]),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.masked_select(mask),
        lambda: x.cpu(),
        lambda: host.to("cuda"),
        lambda: x.copy_(host),
        lambda: host.copy_(x),
        lambda: torch.equal(x, x),
        lambda: x[torch.tensor([0, 2])],
        lambda: x.__setitem__(mask, numbers(1, 2)),
        lambda: torch.where(mask),
        lambda: torch.repeat_interleave(x, at.repeat(3)),
    ]
    for number, run in enumerate(waiting):
        with waits() as found:
            run()
        assert found, f"operation {number} was not found to wait"
    with waits() as found:
        x.copy_(pinned, non_blocking=True)
        pinned.to("cuda", non_blocking=True)
        x.to("cpu", non_blocking=True)
        assert x[at].shape == (1,) and x[1:].shape == (2,)
        x[mask] = 0
        torch.where(mask, x, x + 1).masked_fill(mask, 1)
        assert host.tolist() and host[0].item() and len(host.nonzero())
    assert not found


def check_copies() -> None:
    """The host sees what a copy brings once it has waited, and may write to what it reads then."""
    x, host, event = numbers(1.0, 2.0), torch.zeros(2, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    read = x.to("cpu", non_blocking=True)
    event.record()
    later = x.to("cpu", non_blocking=True)
    x.fill_(7)
    assert host.isnan().all() and read.isnan().all()
    event.synchronize()
    assert host.tolist() == read.tolist() == [1, 2] and later.isnan().all()
    torch.accelerator.synchronize()
    assert later.tolist() == [1, 2]
    x.copy_(host, non_blocking=True)
    event.record()
    event.synchronize()
    host.fill_(3)
    x.copy_(host, non_blocking=True)
    host[1] = 4
    with pytest.raises(RuntimeError, match=r"the host wrote to memory of a copy .*checks.py"):
        x.cpu()
    assert not GPU.copies


def check_graphs() -> None:
    """A replay runs what was launched, on the memory of the capture, and no code of the host."""
    x, made_by_host, calls = numbers(1, 2), numbers(10.0, 10.0), []
    out = torch.zeros(2, device="cuda")

    def forward() -> None:
        calls.append(1)
        scaled = x * (2 if len(calls) == 1 else 3)
        part = (scaled + made_by_host)[1:]
        out.copy_(scaled)
        out[1:] += part

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, None):
        forward()
    x.copy_(numbers(5, 6))
    kept, made_by_host = made_by_host[:1], numbers(0, 0)
    cuda.Graph.replayed = 0
    graph.replay()
    assert out.cpu().tolist() == [10, 12 + 22] and calls == [1] and cuda.Graph.replayed == len(graph.tape) > 0
    del kept
    graph.replay()
    assert out.cpu()[1].isnan(), "it reads memory that is another tensor's by now"
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph(), None):
        x[0].item()


def main() -> int:
    cuda.install()
    with GPU.mode:
        check_tensors()
        check_waits()
        check_copies()
        check_graphs()
    with GPU.mode, torch.inference_mode():
        check_tensors()
        check_waits()
        check_copies()
        check_graphs()
    return 0
