"""vLLM's entry point into Starling (`vllm.general_plugins`): runs in every vLLM process, maybe twice.

Import-light, and it never raises: vLLM builds its parser with plugins loaded, so an exception here would
break every `vllm` command.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from engine_ext import compat
from engine_ext.models.registry import register_models
from scheduler.share import default_shards

logger = logging.getLogger("vllm.starling")


def problem() -> str | None:
    """Why Starling can't extend this vLLM; None where it can."""
    return compat.version_problem(compat.vllm_version()) or compat.intruder()


@functools.cache
def register() -> None:
    """Hook into vLLM, or warn once and let any Starling option fail with the reason."""
    reason = problem()
    if reason is not None:
        logger.warning("Starling is installed but does nothing: %s", reason)
        _refuse_options(reason)
        return
    _hook_in()
    register_models()


def _hook_in() -> None:
    # Imported at the first call and not before: each pulls in a part of vLLM that not every process needs.
    def before(engine_args: object) -> None:
        from engine_ext.activation import before_engine_config

        before_engine_config(engine_args)

    def after(engine_args: object, vllm_config: object) -> None:
        from engine_ext.activation import after_engine_config
        from engine_ext.requests import check_early, refuse_beam_search, resolve_request
        from engine_ext.spreading import spread

        after_engine_config(vllm_config)
        compat.on_processed_request(resolve_request)
        if compat.before_async_engine(engine_args):  # each of several API servers passes here, in its own process
            compat.on_generate(check_early, spread)
            compat.on_beam_search(refuse_beam_search)

    def server_args(args: object) -> None:
        if not hasattr(args, "middleware"):  # `vllm bench`, `vllm run-batch`: no HTTP server
            return
        from engine_ext.activation import add_middleware

        add_middleware(args)

    async def bench_request(*args: Any, **kwargs: Any) -> Any:
        from engine_ext.serving.grpc_bench import request_starling

        return await request_starling(*args, **kwargs)

    compat.on_engine_config(before, after)
    if "vllm.v1.engine.core" in sys.modules:  # an engine core that was not forked from a front, or a front
        compat.divide_kv_memory_check(default_shards)
    compat.on_server_args(server_args)
    if compat.is_bench(sys.argv):
        compat.add_bench_backend("starling-grpc", bench_request)


def _refuse_options(reason: str) -> None:
    """An engine that asks for Starling fails with the reason, where vLLM can be hooked at all."""

    def before(engine_args: object) -> None:
        if "starling" in (getattr(engine_args, "additional_config", None) or {}):
            raise ValueError(f"additional_config asks for Starling, but: {reason}")

    try:
        compat.on_engine_config(before, lambda *_: None)
    except (ImportError, AttributeError):
        logger.warning("this vLLM has no engine configuration that Starling knows; its options are not read")
