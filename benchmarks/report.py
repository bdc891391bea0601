"""What every benchmark writes: JSON with the machine it ran on, and statistics over interleaved runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine_ext import compat

OUT = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The processor, and the versions that matter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "vllm": compat.vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }


def median_ratio(baseline: Sequence[float], other: Sequence[float]) -> float:
    """Median of baseline / other over pairs that ran next to one another."""
    return statistics.median(first / second for first, second in zip(baseline, other, strict=True))


def ratio_interval(
    baseline: Sequence[float], other: Sequence[float], *, draws: int = 10_000
) -> tuple[float, float, float]:
    """(median, lower, upper) of other / baseline over interleaved pairs: a 95 % bootstrap interval, fixed seed."""
    ratios = np.asarray(other) / np.asarray(baseline)
    drawn = np.random.default_rng(0).choice(ratios, (draws, len(ratios)))
    lower, upper = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(lower), float(upper)


def read_json(name: str) -> dict[str, Any]:
    """What was measured before, without the machine; nothing where nothing was."""
    path = OUT / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result.pop("machine", None)
    return result


def put_row(rows: Sequence[dict[str, Any]], row: dict[str, Any], place: Callable[[dict[str, Any]], tuple]) -> list:
    """The rows in order of their place, with this one in the place of the one measured before."""
    return sorted([row, *(other for other in rows if place(other) != place(row))], key=place)


def write_json(name: str, result: dict[str, Any]) -> Path:
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")
    return path
