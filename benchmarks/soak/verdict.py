"""Conditions under which a soak fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.soak.trend import GROWING


def failures(run: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each failure of a run, a row of results/soak.json."""
    requests = run["requests"]
    found = []
    if requests["lost"]:
        found.append(f"{requests['lost']} of {requests['sent']} requests are lost: {'; '.join(requests['details'])}")
    if requests["answers_different"]:
        number, checked = requests["answers_different"], requests["answers_checked"]
        found.append(f"{number} of {checked} answers differ: {'; '.join(requests['differences'])}")
    found += [
        f"{name} was {value:g} while no request was open" for name, value in run["left_after_a_rest"].items() if value
    ]
    found += [
        f"the event loop of {name} stood still {stalls['stalls']:g} times, for up to {stalls['longest_ms']:g} ms"
        for name, stalls in run.get("event_loops", {}).items()
        if stalls and stalls["stalls"]
    ]
    found += [f"{name} split no prompt" for name, blocks in run.get("split_blocks", {}).items() if not blocks]
    for name, series in run["series"].items():
        if series["verdict"] == GROWING:
            lower, upper = series["interval"]
            growth = f"{series['per_hour']:g} an hour ({lower:g} to {upper:g}), the bound is {series['bound']:g}"
            found.append(f"{name} grows by {growth}")
    if run["processes_ended"]:
        found.append(f"{run['processes_ended']} processes of the server ended")
    if run["exit_code"]:
        found.append(f"the server ended with exit code {run['exit_code']}")
    if run["files_left"]:
        found.append(f"files stayed behind: {', '.join(run['files_left'])}")
    return found
