"""The replicas over which a front may split one prompt now."""

from __future__ import annotations

import asyncio
from typing import Any

from starling.engine_ext.front.engine_replica import EngineReplica, SplitPrompt
from starling.engine_ext.front.peer_replica import PeerReplica
from starling.engine_ext.front.replica import Replica
from starling.engine_ext.front.state import front_state
from starling.vllm_compat.front import num_engine_cores


def replicas_for(engine: Any, prompt: SplitPrompt, under_way: set[asyncio.Future]) -> dict[int, Replica]:
    """By number: this server's engines, whose numbers are their ranks, and then the peers that can be used.

    Args:
        under_way: has the parts that run on engines of this server, each of which ends with its task.
    """
    state = front_state(engine)
    usable = state.peers.usable if state.peers is not None else []
    engines = [EngineReplica(engine, rank, prompt, under_way, bool(usable)) for rank in range(num_engine_cores(engine))]
    peers = [PeerReplica(peer, prompt, state.replica_rpc.timeout) for peer in usable]
    return dict(enumerate([*engines, *peers]))
