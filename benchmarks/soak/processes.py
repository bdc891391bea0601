"""Resources of each process of a server: memory, descriptors, threads, sockets, and files in memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

MIB = 2**20
SHARED_MEMORY = re.compile(r" (/dev/shm/\S+)$", re.MULTILINE)


def server_processes(pid: int) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the process and its descendants, each with a name of its own: engines and workers by vLLM's titles."""
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            title, parent = process.name().removeprefix("VLLM::"), names.get(process.ppid(), "")
            name = f"{title} of {parent}" if parent.startswith("EngineCore") else title
            seen[name] = seen.get(name, 0) + 1
            names[process.pid] = name if seen[name] == 1 else f"{name} {seen[name]}"
            yield names[process.pid], process


def sample_process(process: psutil.Process) -> dict[str, float]:
    """Return quantity -> value: memory in MiB, all others as numbers."""
    memory = process.memory_full_info()
    return {
        "RSS": memory.rss / MIB,
        "PSS": memory.pss / MIB,
        "USS": memory.uss / MIB,
        "anonymous memory": (memory.rss - memory.shared) / MIB,  # heap, stacks and KV cache
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "sockets": len(process.net_connections(kind="all")),
    }


def shared_memory(process: psutil.Process) -> set[str]:
    """Return the paths under /dev/shm that a process has mapped."""
    return set(SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text()))


def sample_processes(pid: int) -> tuple[dict[str, float], set[str]]:
    """Return "process: quantity" -> value for each process of a server, and its files of shared memory."""
    values: dict[str, float] = {}
    files: set[str] = set()
    for name, process in server_processes(pid):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            values |= {f"{name}: {quantity}": value for quantity, value in sample_process(process).items()}
            files |= shared_memory(process)
    values["processes"] = sum(key.endswith(": RSS") for key in values)
    values["files in /dev/shm"] = len(files)
    values["/dev/shm, MiB"] = sum(size(Path(path)) for path in files)
    return values, files


def size(path: Path) -> float:
    """Return the MiB of a file; 0 if it has been removed."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size / MIB
    return 0


def sample_folder(folder: Path) -> dict[str, float]:
    """Return number and MiB of the files in a folder."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {"temporary files": len(paths), "temporary files, MiB": sum(map(size, paths))}
