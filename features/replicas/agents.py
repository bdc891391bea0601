"""NIXL's agents, of which each worker has one to move KV pages: how they are made, and how they are named."""

from __future__ import annotations

import sys
from typing import Any

PROGRESS_MICROSECONDS = 1000


def server_of(agent: str) -> str:
    """The server of a worker's agent, whose name ends with the worker's rank; each start of a server has another."""
    return agent.rpartition("-")[0]


def make_agent(name: str) -> Any:
    """A NIXL agent whose progress thread looks for work every millisecond.

    With NIXL's Python defaults the thread never sleeps, so that an idle replica takes a core from one that computes.
    The constructor sets the delay to 0 and passes it to the binding, where this function changes it. Goes when
    nixl_agent_config takes the delay.
    """
    from nixl._api import nixl_agent, nixl_agent_config

    binding = sys.modules[nixl_agent.__module__].nixlBind
    original = binding.nixlAgent

    def with_delay(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_MICROSECONDS
        return original(name, config)

    binding.nixlAgent = with_delay
    try:
        return nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    finally:
        binding.nixlAgent = original
