"""What `starling doctor` says of the machine: its GPUs, their driver, and the memory. Needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import psutil

NO_GPU = "no NVIDIA GPU"
QUERY = ("index", "name", "memory.total", "memory.free", "driver_version", "compute_cap")
SECONDS = 20.0
"""How long nvidia-smi may take: it starts the driver where nothing else uses a GPU."""


def machine() -> dict[str, Any]:
    """GPUs, driver, memory and cores."""
    gpus, driver = nvidia_gpus()
    memory = psutil.virtual_memory()
    return {
        "gpus": gpus or [NO_GPU],
        "driver": driver,
        "memory": f"{gib(memory.total)}, {gib(memory.available)} free",
        "cores": len(os.sched_getaffinity(0)),
    }


def nvidia_gpus() -> tuple[list[str], str | None]:
    """(a line for each GPU, the driver's version), by nvidia-smi; ([], None) where there is no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not work: {error}"], None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    gpus = [
        f"{index}: {name}, {mebibytes(total)}, {mebibytes(free)} free, compute capability {capability}"
        for index, name, total, free, _, capability in rows
    ]
    return gpus, rows[0][4] if rows else None


def mebibytes(cell: str) -> str:
    """A cell of nvidia-smi in GiB; as it is where it is no number, as that of a GPU with shared memory."""
    return gib(int(cell) << 20) if cell.isdecimal() else cell


def gib(num_bytes: int) -> str:
    """Bytes in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB"
