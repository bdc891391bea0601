"""Finds out whether xformers' paged attention is usable: the extra `xformers`, on an NVIDIA card."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import torch
from packaging.version import Version

# pyproject.toml pins 0.0.35. Its paged kernels use `tl.make_block_ptr`, which triton 3.9 removed. Both limits go with a
# release of xformers that does not use it.
XFORMERS = Version("0.0.35")
TRITON_END = Version("3.9")
CAPABILITY = (8, 0)
HEAD_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
PAGED_OP = "xformers/ops/fmha/triton_splitk.py"


@dataclass(frozen=True)
class Facts:
    """The facts that decide whether xformers is usable.

    Attributes:
        xformers, triton: versions of the distributions, or None if one is not installed.
        capability: compute capability of the CUDA device, or None without a device.
        paged_op: whether xformers has the file ``PAGED_OP``.
    """

    xformers: str | None
    triton: str | None
    capability: tuple[int, int] | None
    paged_op: bool


def unavailable_reason(facts: Facts) -> str | None:
    """Return the reason why xformers is not usable, for a log, or None if it is usable."""
    if facts.xformers is None:
        return "xformers is not installed: vllm-starling's extra `xformers` installs it"
    if Version(facts.xformers) != XFORMERS:
        return f"xformers {facts.xformers} is installed, {XFORMERS} is the release whose paged attention is known"
    if facts.triton is None:
        return "Triton is not installed, and xformers' paged attention is written in it"
    if Version(facts.triton) >= TRITON_END:
        return f"Triton {facts.triton} has no make_block_ptr, which xformers {XFORMERS} uses: it needs < {TRITON_END}"
    if facts.capability is None:
        return "there is no CUDA device, and xformers' paged attention runs on nothing else"
    if facts.capability < CAPABILITY:
        return f"compute capability {facts.capability} is below {CAPABILITY}, which xformers' paged attention needs"
    if not facts.paged_op:
        return f"xformers {facts.xformers} has no {PAGED_OP}"
    return None


def gather_facts() -> Facts:
    """Gather the facts of this process without importing xformers, as its import takes seconds and may warn."""
    try:
        files = importlib.metadata.files("xformers") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return Facts(
        xformers=_version("xformers"),
        triton=_version("triton"),
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        paged_op=any(file.as_posix() == PAGED_OP for file in files),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
