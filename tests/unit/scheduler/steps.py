"""Schedulers without a model, with steps of 256 tokens, for tests of how steps are divided."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

from starling.engine_ext.engine_core import StarScheduler
from starling.scheduler.planning.plan import StarPlan
from tests.unit.scheduler.simulation import Engine, make_config, make_scheduler, random_ids

STEP, PAGE_SIZE, LONG = 256, 16, 7900
OF_SCHEDULER = ("policy", "long_prefill_token_threshold", "max_num_active_seqs", "prefill_schedule_interval")


def make_step_config(folder: Path) -> Any:
    arguments = {"max_num_batched_tokens": STEP, "max_num_seqs": 32, "block_size": PAGE_SIZE, "max_model_len": 8192}
    return make_config(folder, **arguments)


def make_engine(
    config: Any,
    scheduler_type: Any = StarScheduler,
    num_pages: int = 3000,
    specs=(),
    page_size: int = PAGE_SIZE,
    **scheduling: Any,
) -> Engine:
    """``scheduling``: Starling's scheduler options, and those of vLLM's SchedulerConfig in OF_SCHEDULER."""
    made = copy.copy(config)
    made.scheduler_config = copy.copy(config.scheduler_config)
    for name in OF_SCHEDULER:
        if name in scheduling:
            setattr(made.scheduler_config, name, scheduling.pop(name))
    made.additional_config = {"starling": {"scheduler": scheduling}}
    return Engine(make_scheduler(made, scheduler_type, page_size, num_pages, specs=specs), page_size=page_size)


def add_long(engine: Engine, count: int, plan: StarPlan | None = None, **more: Any) -> list[str]:
    names = [f"long{index}" for index in range(count)]
    for index, name in enumerate(names):
        engine.add(name, plan, random_ids(index, LONG), max_tokens=1, **more)
    return names


def throttle(engine: Engine, interval: int) -> None:
    """Let the engine prefill in each ``interval``-th step only, as with vLLM's --prefill-schedule-interval."""
    schedule, steps = engine.scheduler.schedule, itertools.count(1)
    engine.scheduler.schedule = lambda: schedule(throttle_prefills=next(steps) % interval != 0)
