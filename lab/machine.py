"""The machine and the installed versions, as `starling selftest`, `starling doctor` and the benchmarks show them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from starling.vllm_compat.versions import vllm_version

PACKAGES = {"Starling": "vllm-starling", "torch": "torch", "triton": "triton", "xformers": "xformers"}
NO_GPU = "no NVIDIA GPU"
QUERY = ("index", "name", "memory.total", "memory.free", "driver_version", "compute_cap")
SECONDS = 20.0
"""Seconds that nvidia-smi may take: it starts the driver where nothing else uses a GPU."""


def has_gpu() -> bool:
    """Return whether there is an NVIDIA GPU that torch can use."""
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None


def describe_machine() -> dict[str, Any]:
    """Return cards, driver, processor and versions, with None for a package that is not installed."""
    import torch

    return {
        "cards": [_card(index) for index in range(torch.cuda.device_count())] if has_gpu() else [],
        "driver": _driver(),
        "processor": f"{cpu_facts().get('model name', platform.machine())}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "vLLM": vllm_version(),
        **{name: _version(distribution) for name, distribution in PACKAGES.items()},
    }


def _card(index: int) -> str:
    import torch

    card = torch.cuda.get_device_properties(index)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"


def _driver() -> str | None:
    """Return NVIDIA's driver, from the first line of its file in /proc, or None where there is none."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return None
    return line.removeprefix("NVRM version:").strip()


def cpu_facts() -> dict[str, str]:
    """Return what /proc/cpuinfo says of the last core; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_gpus() -> dict[str, Any]:
    """Return GPUs, driver, memory and cores, without torch."""
    gpus, driver = nvidia_gpus()
    memory = psutil.virtual_memory()
    return {
        "gpus": gpus or [NO_GPU],
        "driver": driver,
        "memory": f"{gib(memory.total)}, {gib(memory.available)} free",
        "cores": len(os.sched_getaffinity(0)),
    }


def nvidia_gpus() -> tuple[list[str], str | None]:
    """Return (a line for each GPU, the driver's version), by nvidia-smi; ([], None) where there is no GPU."""
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
    """Return a cell of nvidia-smi in GiB; as it is where it is no number, as that of a GPU with shared memory."""
    return gib(int(cell) << 20) if cell.isdecimal() else cell


def gib(num_bytes: int) -> str:
    """Return bytes in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB"
