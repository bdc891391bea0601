"""Check that a server's processes have Starling's hooks: vLLM only logs a plugin that fails, and serves without it."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from starling.config.entry import ENTRY
from starling.vllm_compat.front import is_hooked, num_engine_cores
from starling.vllm_compat.report_to_fronts import engine_reports

GROUP, PLUGIN = "vllm.general_plugins", "starling.engine_ext.start.plugin"


class NotHooked(RuntimeError):
    """Error of a server that would run without Starling: without salts, page keys and star."""


def install_hooks() -> None:
    """Install the hooks in this process, and check that vLLM's other processes can do the same (raises NotHooked)."""
    if ENTRY not in {plugin.name for plugin in entry_points(group=GROUP)}:
        raise NotHooked(f"no installed package has the entry point `{ENTRY}` of {GROUP}: install vllm-starling again")
    try:
        importlib.import_module(PLUGIN).register()
    except Exception as error:
        raise NotHooked(f"the plugin does not load: {type(error).__name__}: {error}") from error


def check_hooks(engine: Any) -> None:
    """Check that the front of a started AsyncLLM has Starling's hooks, and that each engine core has its scheduler.

    Raises:
        NotHooked: one of them does not.
    """
    if not is_hooked():
        raise NotHooked("this process runs vLLM's own front")
    cores, reports = num_engine_cores(engine), len(engine_reports(engine.vllm_config))
    if reports < cores:
        raise NotHooked(f"{cores - reports} of {cores} engine cores run vLLM's own scheduler")
