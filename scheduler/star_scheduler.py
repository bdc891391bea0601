"""vLLM's scheduler, with prefix-cache keys that tell star pages from dense ones."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from engine_ext import compat
from scheduler.cache_keys import star_page_key
from scheduler.options import OptionError, parse_options
from scheduler.plan import check_sizes, plan_of


def _page_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    params = request.sampling_params
    plan = plan_of(params.extra_args) if params is not None and params.extra_args else None
    return None if plan is None else star_page_key(plan, start, end)


class StarKeys:
    """Mixed into a vLLM scheduler: from its start on, pages are keyed by their star plan too.

    The keys go in where vLLM makes its own, so that hashing, KV events and partial hits agree.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compat.add_page_key(_page_key)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._check_defaults(vllm_config.additional_config["starling"].get("star", {}))

    def _check_defaults(self, star: dict[str, Any]) -> None:
        """Server defaults against the page that the engine really has (raises ValueError: it does not start)."""
        options = parse_options(star, flat=False)
        page = compat.scheduler_page(self)
        if options.mode == "off":
            return
        if page is None:
            raise OptionError("star", options.mode, "the full-attention layers have no one KV page size", "off")
        check_sizes(options, page)


class StarScheduler(StarKeys, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(StarKeys, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""
