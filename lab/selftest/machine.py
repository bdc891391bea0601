"""The machine and the installed versions, as the first lines of the output show them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from starling.vllm_compat.versions import vllm_version

PACKAGES = {"Starling": "vllm-starling", "torch": "torch", "triton": "triton", "xformers": "xformers"}


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that torch can use."""
    return torch.cuda.is_available() and torch.version.cuda is not None


def describe_machine() -> dict[str, Any]:
    """Cards, driver, processor and versions; None for a package that is not installed."""
    return {
        "cards": [_card(index) for index in range(torch.cuda.device_count())] if has_gpu() else [],
        "driver": _driver(),
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "vLLM": vllm_version(),
        **{name: _version(distribution) for name, distribution in PACKAGES.items()},
    }


def _card(index: int) -> str:
    card = torch.cuda.get_device_properties(index)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"


def _driver() -> str | None:
    """NVIDIA's driver, from the first line of its file in /proc; None where there is none."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return None
    return line.removeprefix("NVRM version:").strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
