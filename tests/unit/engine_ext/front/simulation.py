"""A server without processes and without a model: vLLM's AsyncLLM with Starling's hooks, over simulated replicas.

Each replica is a real scheduler with the real connector between replicas, and a worker whose pages hold fingerprints
(tests/unit/scheduler/simulation.py). Faked is what carries messages: the client of the engine cores, which hands them
over as msgpack and waits where vLLM's client may wait for its socket, the transfer of pages, and the attention to pages
of another replica. A step takes STEP_SECONDS of virtual time, and a replica takes in messages between two steps only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, core, core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from starling.engine_ext.engine_core import StarScheduler
from starling.features.replicas.connector_metadata import WorkerAddress, WorkerReport
from starling.features.replicas.worker import close_shards, open_shard
from starling.scheduler.planning.request_metadata import metadata_of
from tests.unit.engine_ext.front.virtual_time import now, until
from tests.unit.scheduler.simulation import HASH, PAGE_SIZE, Engine, answer, make_scheduler, random_ids

STEP_SECONDS = 0.05

STAR = {"star": "on", "star_block_size": 64, "star_query_tokens": 20, "star_replicas": 2}
"""Of a prompt of 520 tokens: 8 blocks, the last of 52 tokens: one whole page and a part of one."""

SHARDS = STAR | {"star_shards": "on"}
TOKENS = random_ids(0, 520)
"""A prompt. On two idle replicas: blocks 0 to 4 on the first one, 5 to 7 on the second one."""


def sent(message: Any, kind: type) -> Any:
    """A message as the other process gets it."""
    return MsgpackDecoder(kind).decode(MsgpackEncoder().encode(message))


class Cluster:
    """The memory of all replicas that may read one another's pages.

    Args:
        size: how many replicas there may be.
        num_pages: pages of each.
    """

    def __init__(self, size: int, num_pages: int) -> None:
        self.num_pages = num_pages
        self.memory = np.zeros((size * num_pages, PAGE_SIZE), dtype=np.int64)
        self.replicas: list[Replica] = []


class Replica(Engine):
    """One engine core with its worker.

    Attributes:
        place: its index in the cluster.
        memory: the pages of all replicas; those of this one begin at row ``first_row``.
        work: (first token, last token + 1) of what was computed, by request in the order of their first steps.
        prompts: engine request id -> its prompt.
        running: while it is cleared, the replica makes no step and answers nothing.
        opened: name -> ids of held pages to which other replicas may attend.
        loads_arrive: while it is False, no page of another replica arrives.
        fetched: how many pages each request that fetched some has read from other replicas.
    """

    def __init__(self, rank: int, config: Any, cluster: Cluster, outputs: asyncio.Queue):
        super().__init__(make_scheduler(config, StarScheduler, num_pages=cluster.num_pages))
        self.rank, self.cluster, self.outputs = rank, cluster.replicas, outputs
        self.place = len(cluster.replicas)
        cluster.replicas.append(self)
        self.memory, self.first_row = cluster.memory, self.place * cluster.num_pages
        self.hasher = core.get_request_block_hasher(PAGE_SIZE, HASH)
        self.core = SimpleNamespace(
            scheduler=self.scheduler,
            request_block_hasher=self.hasher,
            model_executor=SimpleNamespace(collective_rpc=self._workers),
            abort_requests=lambda names: self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED),
        )
        self.set_layout({"dtype": "float32"})
        self.work: dict[str, tuple[int, int]] = {}
        self.requests: dict[str, Request] = {}
        self.opened: dict[str, list[int]] = {}
        self.fetched: list[int] = []
        self.inbox: deque[Callable[[], None]] = deque()
        self.woken, self.running = asyncio.Event(), asyncio.Event()
        self.running.set()
        self.loads_arrive = True
        self._arriving: dict[str, Any] = {}  # request id -> its load

    @property
    def held(self) -> dict[str, list[Any]]:
        holds = self.scheduler.connector.connector_scheduler.holds
        return {name: hold.pages for name, hold in holds.items()}

    @property
    def num_free_pages(self) -> int:
        return self.pool.get_num_free_blocks()

    def set_layout(self, layout: dict[str, Any]) -> None:
        name = f"replica {self.place}"
        address = {"name": name, "metadata": b"", "bases": [], "device": self.place, "holds": 0, "layout": layout}
        self.scheduler.connector.set_xfer_handshake_metadata({0: WorkerAddress(address)})

    def send(self, message: Callable[[], None]) -> None:
        """Let the engine core do this before its next step."""
        self.inbox.append(message)
        self.woken.set()

    def take(self, message: EngineCoreRequest) -> None:
        """Take in a request."""
        request = Request.from_engine_core_request(message, self.hasher)
        name = request.request_id
        self.requests[name] = request
        self.plans[name], self.prompts[name] = metadata_of(request).plan, list(request.prompt_token_ids)
        self.computed[name] = 0
        self.scheduler.add_request(request)

    async def loop(self) -> None:
        """The engine core's process."""
        while True:
            await self.running.wait()
            while self.inbox:
                self.inbox.popleft()()
            if not self.scheduler.has_requests():
                self.woken.clear()
                await self.woken.wait()
                continue
            for message in self.run_step().values():
                self.outputs.put_nowait(sent(message, EngineCoreOutputs))
            await asyncio.sleep(STEP_SECONDS)

    def run_step(self) -> dict[int, EngineCoreOutputs]:
        output = self.scheduler.schedule()
        arrived = self._finish_loads()
        lost = self._lost_requests(output)
        result = answer(output, self._run(output))
        self._begin_loads(output.kv_connector_metadata)
        for name, count in output.num_scheduled_tokens.items():
            start = self.work[name][0] if name in self.work else self.positions[name] - count
            self.work[name] = (start, self.positions[name])
        result.kv_connector_output = KVConnectorOutput(
            finished_recving=arrived,
            kv_connector_worker_meta=WorkerReport(lost) if lost else None,
        )
        return self.scheduler.update_from_output(output, result)

    def _begin_loads(self, metadata: KVConnectorMetadata) -> None:
        for load in metadata.loads:
            for read in load.reads:
                source = self.cluster[read.addresses[0]["device"]]
                held = {page.block_id for pages in source.held.values() for page in pages}
                assert held.issuperset(read.remote_page_ids), "pages are read that their replica does not hold"
                rows = source.first_row + np.array(read.remote_page_ids)
                self.memory[self.first_row + np.array(read.local_page_ids)] = self.memory[rows]
            self.fetched.append(len(load.local_page_ids()))
            self._arriving[load.request_id] = load

    def _finish_loads(self) -> set[str]:
        """Return the requests whose pages have arrived, a step after they were asked for."""
        if not self.loads_arrive:
            return set()
        ended = set(self._arriving)
        self._arriving.clear()
        return ended

    def _lost_requests(self, output: Any) -> dict[str, str]:
        """The requests of a step whose shards are on a replica that hangs."""
        return {
            name: f"replica {shard.addresses[0]['device']} does not answer"
            for name in output.num_scheduled_tokens
            for shard in self._shards(name)
            if not self.cluster[shard.addresses[0]["device"]].running.is_set()
        }

    def _shards(self, name: str) -> tuple[Any, ...]:
        remote = metadata_of(self.requests[name]).remote
        return () if remote is None else remote.shards

    def _slots(self, name: str, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the memory, and offsets in them, of a request's first ``end`` tokens."""
        pages, offsets = super()._slots(name, end)
        rows = pages + self.first_row
        for shard in self._shards(name):
            holder = self.cluster[shard.addresses[0]["device"]]
            remote = np.array(holder.opened[shard.name])[np.arange(shard.num_tokens) // PAGE_SIZE]
            rows[shard.start : shard.start + shard.num_tokens] = holder.first_row + remote
        return rows, offsets

    def _workers(
        self, method: str | Callable, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list[Any]:
        if method is open_shard:
            name, page_ids = args
            self.opened[name] = page_ids
            return [{"device": self.place}]
        assert method is close_shards
        for name in args[0]:
            del self.opened[name]
        return [None]


class EngineCoreClient:
    """Carries messages between AsyncLLM and the replicas.

    Attributes:
        calls: (time, rank, name, arguments) of all utilities called.
        refused: rank -> the error that a request to it raises where it is sent.
    """

    def __init__(self, config: Any, cluster: Cluster) -> None:
        number = config.parallel_config.data_parallel_size
        config.cache_config.num_gpu_blocks = number * cluster.num_pages
        config.cache_config.effective_attention_block_size = PAGE_SIZE
        self.outputs: asyncio.Queue = asyncio.Queue()
        self.core_engines = [Replica(rank, config, cluster, self.outputs) for rank in range(number)]
        self.resources = SimpleNamespace(engine_dead=False)
        self.calls: list[tuple[float, int, str, tuple]] = []
        self.refused: dict[int, Exception] = {}

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        output = await self.outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        rank = request.data_parallel_rank or 0
        if rank in self.refused:
            raise self.refused[rank]
        if hasattr(core_client, "_with_packed_prompt"):  # since vLLM 0.34 a front sends the prompt as an array
            request = core_client._with_packed_prompt(request)
        replica, message = self.core_engines[rank], sent(request, EngineCoreRequest)
        replica.send(lambda: replica.take(message))
        await asyncio.sleep(0)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        await asyncio.sleep(0)
        for replica in self.core_engines:
            finish = replica.scheduler.finish_requests
            replica.send(lambda finish=finish: finish(request_ids, RequestStatus.FINISHED_ABORTED))

    async def _call_utility_async(self, name: str, *args: Any, engine: Replica) -> Any:
        await asyncio.sleep(0)
        args = tuple(msgspec.msgpack.decode(msgspec.msgpack.encode(args)))
        self.calls.append((now(), engine.rank, name, args))
        answered = asyncio.get_running_loop().create_future()

        def call() -> None:
            result = getattr(core.EngineCore, name)(engine.core, *args)
            if isinstance(result, Future):  # no thread runs beside virtual time
                result = result.result()
            if not answered.cancelled():
                answered.set_result(msgspec.msgpack.decode(msgspec.msgpack.encode(result)))

        engine.send(call)
        return await answered

    async def call_utility_all_async(self, name: str, *args: Any) -> list[Any]:
        calls = (self._call_utility_async(name, *args, engine=replica) for replica in self.core_engines)
        return await asyncio.gather(*calls)

    def die(self) -> None:
        """End like an engine core that raised an exception."""
        self.resources.engine_dead = True
        self.outputs.put_nowait(EngineDeadError())

    def shutdown(self, timeout: float | None = None) -> None:
        pass


class Server:
    """An AsyncLLM over simulated replicas."""

    def __init__(self, config: Any, cluster: Cluster) -> None:
        self.client = EngineCoreClient(config, cluster)
        self.replicas = self.client.core_engines
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core_client.EngineCoreClient, "make_async_mp_client", lambda **_: self.client)
            self.engine = AsyncLLM(config, executor_class=None, log_stats=False, log_requests=False)

    @property
    def num_free_pages(self) -> list[int]:
        return [replica.num_free_pages for replica in self.replicas]

    def work(self) -> list[list[tuple[int, int]]]:
        """What each replica has computed."""
        return [list(replica.work.values()) for replica in self.replicas]

    def names_held(self) -> set[str]:
        return {name for replica in self.replicas for name in replica.held}

    def calls(self, name: str) -> list[tuple]:
        """(rank, arguments) of the calls of one utility."""
        return [(rank, args) for _, rank, called, args in self.client.calls if called == name]

    def check_all_is_free(self) -> None:
        for replica in self.replicas:
            replica.check_pages()
            assert not replica.scheduler.requests
            assert not replica.held
            assert not replica.opened
            assert replica.num_free_pages == len(replica.pool.blocks) - 1

    async def generate(self, ids: list[int], star: dict | None = None, name: str = "me", **more: Any) -> list[Any]:
        """All outputs of a request; ``more`` are sampling parameters, and keywords of AsyncLLM.generate."""
        return [output async for output in self.stream(ids, star, name, **more)]

    def stream(self, ids: list[int], star: dict | None = None, name: str = "me", **more: Any) -> AsyncIterator[Any]:
        keywords = {key: more.pop(key) for key in ("priority", "data_parallel_rank", "lora_request") if key in more}
        prompt = {"type": "token", "prompt_token_ids": ids}
        if "cache_salt" in more:
            prompt["cache_salt"] = more.pop("cache_salt")
        extra_args = (star or {}) | more.pop("extra_args", {})
        defaults = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(extra_args=extra_args, **defaults | more)
        return self.engine.generate(prompt, params, name, **keywords)


@asynccontextmanager
async def serving(config: Any, num_pages: int = 100, cluster: Cluster | None = None) -> AsyncIterator[Server]:
    """A server whose replicas run; ``num_pages`` of each include the null page.

    Args:
        cluster: in which other servers are too; None: one of its own.
    """
    server = Server(config, cluster or Cluster(config.parallel_config.data_parallel_size, num_pages))
    loops = [asyncio.create_task(replica.loop()) for replica in server.replicas]

    def stop_at_an_error(loop: asyncio.Task) -> None:
        if not loop.cancelled() and loop.exception() is not None:
            server.client.outputs.put_nowait(loop.exception())

    for loop in loops:
        loop.add_done_callback(stop_at_an_error)
    try:
        yield server
        for loop in loops:
            if loop.done():
                loop.result()
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        server.engine.shutdown()


def whole_requests(server: Server, replica: int = 0) -> list:
    """The requests of a replica that are no parts of prompts."""
    return [request for request in server.replicas[replica].requests.values() if metadata_of(request).part is None]


async def both_parts_run(server: Server) -> None:
    """Wait until two replicas compute their parts of TOKENS."""
    await until(lambda: server.replicas[0].work and (320, 420) in server.replicas[1].work.values())
