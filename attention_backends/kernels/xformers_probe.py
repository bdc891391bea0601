"""Whether xformers' paged attention can be used here: the extra `xformers`, on an NVIDIA card."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import torch
from packaging.version import Version

# 0.0.35 is what pyproject.toml pins. Its paged kernels are written with `tl.make_block_ptr`, which triton 3.9 removed;
# both can go with a release of xformers that does without.
XFORMERS = Version("0.0.35")
TRITON_END = Version("3.9")
CAPABILITY = (8, 0)
PAGED_OP = "xformers/ops/fmha/triton_splitk.py"


@dataclass(frozen=True)
class Facts:
    """What the choice hangs on; versions are None where the distribution is not installed."""

    xformers: str | None
    triton: str | None
    capability: tuple[int, int] | None
    paged_op: bool


def why_absent(facts: Facts) -> str | None:
    """Why xformers can't be used, in words for a log; None where it can."""
    if facts.xformers is None:
        return "xformers is not installed: it comes with the extra, vllm-starling[xformers]"
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
    """As they are in this process; xformers is looked at, not imported, which takes seconds and may warn."""
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
