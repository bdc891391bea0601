"""vLLM's schedulers with the features' parts. engine_ext/start/activation.py names them to vLLM."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from starling.features import parts_of
from starling.scheduler.star_scheduler import StarMixin

PARTS = parts_of("core")


class StarScheduler(StarMixin, Scheduler):
    """For engines without async scheduling (CPU)."""

    feature_parts = PARTS


class AsyncStarScheduler(StarMixin, AsyncScheduler):
    """For engines with async scheduling: vLLM turns it off for a class that is not an AsyncScheduler."""

    feature_parts = PARTS


class DiffusionStarScheduler(StarMixin, DiffusionScheduler):
    """For diffusion models, whose canvases of tokens vLLM's scheduler cuts to each request's width."""

    feature_parts = PARTS


class AsyncDiffusionStarScheduler(StarMixin, DiffusionAsyncScheduler):
    """For diffusion models in engines with async scheduling."""

    feature_parts = PARTS
