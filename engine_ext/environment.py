"""Starling's environment variables, and those with which requests or processes would bypass Starling. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping

from starling.config.entry import ENTRY
from starling.config.parsing import OptionError

ADMIN_KEY_ENV = "STARLING_ADMIN_KEY"
"""The environment variable with the key of who controls the server."""

PLUGINS = "VLLM_PLUGINS"
RUST_FRONT = "VLLM_USE_RUST_FRONTEND"


def refuse_missing_plugin(environ: Mapping[str, str]) -> None:
    """Refuse an environment that keeps Starling out of vLLM's processes (raises OptionError)."""
    plugins = environ.get(PLUGINS)
    if plugins is not None and ENTRY not in plugins.split(","):
        reason = "it keeps Starling out of vLLM's processes"
        raise OptionError(PLUGINS, plugins, reason, f"a list with `{ENTRY}`, or unset")


def refuse_rust_front(environ: Mapping[str, str]) -> None:
    """Refuse the front that would not call Starling (raises OptionError)."""
    if (value := environ.get(RUST_FRONT, "0")) not in ("", "0"):
        raise OptionError(RUST_FRONT, value, "the Rust front reads no star options", "0, or unset")


LIVE_PATH, LIVE_DATA = "/starling/live", "/starling/live.json"
