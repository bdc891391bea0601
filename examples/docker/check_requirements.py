"""Fail where what some installed distributions require is not installed, or in a version that they do not take.

The CUDA image installs its own packages without the requirements of these, which are in vLLM's image.

python3 check_requirements.py vllm-starling nixl
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def problem(requirement: Requirement) -> str | None:
    """Return what is wrong with a requirement here, or None if it is met."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement} is not installed"
    met = requirement.specifier.contains(found, prereleases=True)
    return None if met else f"{requirement} is required, and {found} is installed"


def problems(names: list[str]) -> list[str]:
    """Return what is wrong with these distributions' requirements (raises PackageNotFoundError without one of them)."""
    found = [problem(Requirement(text)) for name in names for text in requires(name) or []]
    return [text for text in found if text is not None]


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1:])) or 0)
