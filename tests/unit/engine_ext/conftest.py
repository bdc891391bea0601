"""A server without processes for the tests in this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.core.kv_cache_utils import init_none_hash

from benchmarks.random_llama import make_random_llama
from starling.engine_ext.front.front_state import front_state
from starling.engine_ext.start import plugin
from tests.parity.harness import TINY
from tests.unit.engine_ext.front import virtual_time
from tests.unit.engine_ext.front.simulation import HASH, PAGE_SIZE, Server, serving

REPLICAS = 3


@pytest.fixture(scope="session")
def make_server_config(tmp_path_factory):
    """A function that makes a server's configuration, by vLLM with Starling's hooks; it takes more engine arguments."""
    plugin.register()
    init_none_hash(HASH)
    model = make_random_llama(tmp_path_factory.mktemp("models") / "tiny", **TINY | {"max_position_embeddings": 8192})
    return lambda **arguments: AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        block_size=PAGE_SIZE,
        max_num_batched_tokens=100,
        max_num_seqs=4,
        enforce_eager=True,
        **arguments,
    ).create_engine_config()


@pytest.fixture(scope="session")
def server_config(make_server_config):
    """A server's configuration with REPLICAS replicas."""
    return make_server_config(data_parallel_size=REPLICAS, additional_config={"starling": {}})


@pytest.fixture
def simulate(server_config):
    """Run a scenario on a simulated server; at its end every page of a live server has to be free."""

    def run(scenario: Callable[[Server], Awaitable[object]], num_pages: int = 100) -> None:
        async def bounded() -> None:
            async with serving(server_config, num_pages) as server:
                await scenario(server)
                if not server.engine.errored:
                    state = front_state(server.engine).replicas.state
                    await asyncio.gather(*state.releases)
                    await asyncio.sleep(1)
                    server.check_all_is_free()
                    assert not state.reservations.reserved.total()
                    assert not state.split_requests
                    assert not state.internal_ids
                    assert not server.engine.output_processor.request_states

        virtual_time.run(bounded)

    return run
