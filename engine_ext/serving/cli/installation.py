"""Report on the installation and its printing, for `starling doctor` and for the end of `starling setup-cpu`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from typing import Any, TextIO

from starling.vllm_compat import versions
from starling.vllm_compat.versions import VLLM_RANGE, vllm_version

NO_COMPILER = (
    "no C++ compiler: torch.compile can't run on CPU, serve with --enforce-eager; Triton, on GPUs, needs one too"
)
PACKAGES = ("vllm-starling", "torch", "triton", "transformers", "xformers", "grpcio")


def installation() -> dict[str, Any]:
    """Return the versions of packages, and the machine's state as far as Starling depends on it."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    notes = [] if compiler else [NO_COMPILER]
    if version("xformers") is None:
        notes.append("xformers is not installed; only `starling selftest` uses it (extra `xformers`)")
    return {
        "python": sys.version.split()[0],
        "vllm": vllm_version(),
        "vllm_supported": VLLM_RANGE,
        **{name: version(name) for name in PACKAGES},
        "compiler": compiler,
        "problem": versions.problem(),
        "notes": notes,
    }


def print_report(report: dict[str, Any], output: TextIO) -> None:
    """Print a report as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=output)
    for section, content in report.items():
        table = Table(show_header=False, title=section.replace("_", " "), title_justify="left", min_width=60)
        for key, value in (content if isinstance(content, dict) else {"": content}).items():
            table.add_row(escape(key.replace("_", " ")), escape(format_value(value)))
        console.print(table)


def format_value(value: Any) -> str:
    """Return a value of a report as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "\n".join(f"{key.replace('_', ' ')}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "nothing"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
