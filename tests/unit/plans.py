"""Plans of prompts for tests, by the pure function that all fronts use."""

from __future__ import annotations

from starling.config.star import StarOptions, parse_options
from starling.scheduler.planning.decide import decide
from starling.scheduler.planning.facts import ONE_REPLICA, EngineFacts, PromptFacts, ReplicaSet
from starling.scheduler.planning.plan import StarPlan


def make_plan(
    prompt: int | list[int],
    defaults: StarOptions | dict,
    request: StarOptions | dict | None,
    page_size: int,
    replicas: ReplicaSet = ONE_REPLICA,
    **engine,
) -> StarPlan | None:
    """The plan of a prompt, given by its length or its tokens; options as models, or as dicts of flat names.

    Args:
        engine: more fields of EngineFacts.
    """
    server = parse_options(defaults) if isinstance(defaults, dict) else defaults
    own = parse_options(request) if isinstance(request, dict) else request
    facts = PromptFacts(prompt) if isinstance(prompt, int) else PromptFacts(len(prompt), prompt)
    return decide(server, own, facts, EngineFacts(page_size, replicas=replicas, **engine)).plan
