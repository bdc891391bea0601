"""What vLLM's GPU worker calls of torch.cuda and torch.accelerator, for the GPU of device.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.gpu_shim.device import CPU, CUDA, GPU, pinned

MEMORY = 80 << 30


class Stream:
    """All streams are one. Its work is done when it is launched, but for copies from and to pinned memory."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        GPU.finish(GPU.number)

    wait_stream = wait_event = lambda self, *_: None

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        self.synchronize()
        return True


class Event:
    """The launches up to ``record``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = 0

    def record(self, *_: Any) -> None:
        self.number = GPU.number

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        GPU.finish(self.number)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Graph:
    """Holds the kernels that were launched while it was captured, with their operands, and launches them again.

    No code of the host runs in a replay: what it decided in the capture stays as it was, and a tensor that it made then
    is read with what is in it now.
    """

    replayed = 0
    """Kernels that replays of all graphs have launched."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tape: list[Callable[[], None]] = []
        self.calls: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        before, GPU.calls, GPU.tape = GPU.calls, defaultdict(list), self.tape
        try:
            yield
        finally:
            self.calls, GPU.calls, GPU.tape = GPU.calls, before, None

    def replay(self) -> None:
        Graph.replayed += len(self.tape)
        GPU.number += len(self.tape)
        for name, launches in self.calls.items():
            GPU.calls[name] += launches
        with _disable_current_modes():
            for launch in self.tape:
                launch()

    def reset(self) -> None:
        self.tape.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


STREAM = Stream()


def _set_sync_debug_mode(mode: int | str) -> None:
    GPU.warns = mode not in (0, "default")


OF_CUDA = {
    "_lazy_init": lambda: None,  # torch calls it before it makes a tensor on a GPU
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": lambda graph, *_, **__: graph.capture(),
    "graph_pool_handle": lambda: (0, 0),
    "stream": lambda stream: contextlib.nullcontext(),
    "set_stream": lambda stream: None,
    "current_stream": lambda device=None: STREAM,
    "default_stream": lambda device=None: STREAM,
    "is_current_stream_capturing": lambda: GPU.tape is not None,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "manual_seed_all": lambda seed: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: types.SimpleNamespace(
        name="a fake GPU", multi_processor_count=2, total_memory=MEMORY, major=9, minor=0, is_integrated=False
    ),
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: 0,
    "set_sync_debug_mode": _set_sync_debug_mode,
    "get_sync_debug_mode": lambda: int(GPU.warns),
}
OF_ACCELERATOR = {
    "device_count": lambda: 1,
    "current_device_index": lambda: 0,
    "set_device_index": lambda device: None,
    "synchronize": lambda device=None: STREAM.synchronize(),
    "empty_cache": lambda: None,
    "empty_host_cache": lambda: None,
    "get_memory_info": lambda device=None: (MEMORY, MEMORY),
    "memory_stats": lambda device=None: {},
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
}


make_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    """torch.tensor, which makes its tensor without asking a dispatch mode."""
    made = make_tensor(data, **options)
    if pin_memory:
        pinned(made)
    return made if device is None or torch.device(device) == CPU else made.to(device)


class Generator(torch.Generator):
    """One of the CPU, whatever device it is asked for."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)


def _guard_nothing() -> None:
    """Compile guard.cpp and load it."""
    torch_folder = Path(torch.__file__).parent
    options = ["-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        library, source = f"{folder}/guard.so", str(Path(__file__).with_name("guard.cpp"))
        subprocess.run([os.environ.get("CXX", "c++"), source, *options, "-o", library], check=True)
        ctypes.CDLL(library)


def install() -> None:
    """Replace the functions. To be called before vLLM is imported, which keeps some of them."""
    _guard_nothing()
    torch.tensor, torch.Generator, torch.Event = _tensor, Generator, Event
    # The backend whose settings vLLM leaves alone.
    torch.cuda.memory.get_allocator_backend = lambda: "none"
    for module, functions in ((torch.cuda, OF_CUDA), (torch.accelerator, OF_ACCELERATOR)):
        for name, function in functions.items():
            setattr(module, name, function)
