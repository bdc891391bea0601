"""Environment variables of Starling, and those that would make requests or processes bypass it. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping

from starling.config.entry import ENTRY
from starling.config.parsing import OptionError

ADMIN_KEY_ENV = "STARLING_ADMIN_KEY"
"""Name of the environment variable that holds the operator's key."""

PLUGINS = "VLLM_PLUGINS"
RUST_FRONT = "VLLM_USE_RUST_FRONTEND"


def refuse_missing_plugin(environ: Mapping[str, str]) -> None:
    """Refuse an environment that keeps Starling out of vLLM's processes (raises OptionError)."""
    plugins = environ.get(PLUGINS)
    if plugins is not None and ENTRY not in plugins.split(","):
        reason = "it keeps Starling out of vLLM's processes"
        raise OptionError(PLUGINS, plugins, reason, f"a list with `{ENTRY}`, or unset")


def refuse_rust_front(environ: Mapping[str, str]) -> None:
    """Refuse vLLM's Rust front, which would not call Starling (raises OptionError)."""
    if (value := environ.get(RUST_FRONT, "0")) not in ("", "0"):
        raise OptionError(RUST_FRONT, value, "the Rust front reads no star options", "0, or unset")


LIVE_PATH, LIVE_DATA = "/starling/live", "/starling/live.json"
