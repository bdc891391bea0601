"""Starling's schedulers of diffusion models beside vLLM's own: the same steps, with canvases of each request's width.

The worker is simulated: it denoises a request's canvas in DENOISING_STEPS steps, then its tokens are the output.
"""

from __future__ import annotations

from collections import Counter

import pytest
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.outputs import DraftTokenIds

from starling.engine_ext.engine_core import AsyncDiffusionStarScheduler, DiffusionStarScheduler
from tests.unit.scheduler.simulation import answer, make_config, make_request, make_scheduler

CANVAS = 8
WIDTHS = {"narrow": 5, "long": 8, "narrow and long": 3}
PROMPTS = {"narrow": 40, "long": 350, "narrow and long": 250}
DENOISING_STEPS = 3


@pytest.fixture
def make_diffusion_config(tmp_path):
    def made(fairness: str):
        scheduling = {"scheduler": {"fairness": fairness}}
        config = make_config(tmp_path, scheduling, diffusion_config={"canvas_length": CANVAS})
        config.model_config.is_diffusion = True  # vLLM refuses a configuration of such a model on CPU
        return config

    return made


def steps_of(config, scheduler_type) -> list[tuple[dict, dict]]:
    """(tokens, canvas tokens) of each request in each step, until all are done: prompts share steps of 100 tokens."""
    scheduler, denoised, steps = make_scheduler(config, scheduler_type, num_pages=100), Counter(), []
    for name, length in PROMPTS.items():
        request = make_request(name, None, length, max_tokens=2 * WIDTHS[name])
        request.sampling_params.extra_args = {"diffusion_canvas_length": WIDTHS[name]}
        scheduler.add_request(request)
    while scheduler.requests:
        output = scheduler.schedule()
        canvases = {name: len(tokens) for name, tokens in output.scheduled_spec_decode_tokens.items()}
        steps.append((dict(output.num_scheduled_tokens), canvases))
        denoised.update(canvases.keys())
        sampled = {
            name: [7] * canvases[name] if name in canvases and denoised[name] % DENOISING_STEPS == 0 else []
            for name in output.num_scheduled_tokens
        }
        scheduler.update_from_output(output, answer(output, sampled))
        names = [name for name in output.num_scheduled_tokens if name in scheduler.requests]
        scheduler.update_draft_token_ids(DraftTokenIds(names, [[9] * CANVAS for _ in names]))
        assert len(steps) < 100
    return steps


@pytest.mark.parametrize(
    ("vllms", "starlings"),
    [(DiffusionScheduler, DiffusionStarScheduler), (DiffusionAsyncScheduler, AsyncDiffusionStarScheduler)],
)
def test_diffusion_models_get_the_canvases_of_vllms_scheduler(make_diffusion_config, vllms, starlings):
    """Without fairness the steps are vLLM's; with it, prompts are cut, but no canvas is."""
    plain = steps_of(make_diffusion_config("off"), vllms)
    assert steps_of(make_diffusion_config("off"), starlings) == plain
    fair = steps_of(make_diffusion_config("on"), starlings)
    assert fair != plain
    for steps in (plain, fair):
        canvases = Counter(canvas for _, of_step in steps for canvas in of_step.items())
        assert canvases == dict.fromkeys(WIDTHS.items(), 2 * DENOISING_STEPS)
