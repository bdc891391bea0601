"""vLLM's schedulers with the features' parts. vLLM imports them from engine_ext/engine_core.py."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from starling.features import parts_of_core
from starling.scheduler.star_scheduler import StarMixin


class FeatureMixin(StarMixin):
    """Mixed into a vLLM scheduler class, before it."""

    feature_parts = parts_of_core()


class StarScheduler(FeatureMixin, Scheduler):
    """For engines without async scheduling (CPU)."""


class AsyncStarScheduler(FeatureMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""


class DiffusionStarScheduler(FeatureMixin, DiffusionScheduler):
    """For diffusion models, whose canvases of tokens vLLM's scheduler cuts to each request's width."""


class AsyncDiffusionStarScheduler(FeatureMixin, DiffusionAsyncScheduler):
    """For diffusion models in engines with async scheduling."""
