"""The KV connector between replicas that prefill one star prompt together.

A replica that has prefilled its part holds the pages (they stay in its prefix cache, and in use) and says where they
are; the one that runs the query reads them between two of its steps, and then has the whole context in its own
prefix cache. What arrives is exactly what would have been computed, so it is kept under the ordinary keys; what is
left out of a part (scheduler/star_scheduler.py) has vLLM's null page and no key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from attention_backends.kernels.contract import CPU_ISAS
from attention_backends.kernels.cpu_impl import CpuImpl, reason_against
from attention_backends.star.shards import Ask
from engine_ext import compat
from engine_ext.metrics import worker_metrics
from engine_ext.shard_client import LostRequests, ShardClient, StepShards
from engine_ext.shard_holder import ShardHolder
from scheduler.page_mover import Move, MoveError, PageMover
from scheduler.share import Source, attend_of, part_of, pull_of

logger = init_logger("vllm.starling")

ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class Address(KVConnectorHandshakeMetadata):
    """A worker's memory, on its way to the scheduler."""

    address: dict[str, Any]


@dataclass
class Load:
    """Pages that one request reads: (source, their pages, our pages)."""

    request_id: str
    reads: list[tuple[Source, list[int], list[int]]]

    def pages(self) -> set[int]:
        return {page for _, _, ours in self.reads for page in ours}


@dataclass
class Loads(KVConnectorMetadata):
    loads: list[Load] = field(default_factory=list)


class StarConnector(KVConnectorBase_V1, SupportsHMA):
    """Both of vLLM's halves: the scheduler's, and a worker's."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.vllm_config = vllm_config
        self.kv_cache_config = kv_cache_config
        if role == KVConnectorRole.SCHEDULER:
            self.addresses: list[dict[str, Any]] = []
            self.held: dict[str, list[Any]] = {}
            self.opened: set[str] = set()
            self.users: Counter[str] = Counter()
            self.leaving: set[str] = set()
            self.asked: set[str] = set()
            self.waiting: list[Load] = []
        else:
            self.mover: PageMover | None = None
            self.caches: dict[str, Any] = {}
            self.holder: ShardHolder | None = None
            self.client: ShardClient | None = None
            self.moves: dict[str, tuple[Load, Move]] = {}
            self.failed: dict[str, Load] = {}
            self.lost_pages: set[int] = set()

    # The scheduler's half.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self.addresses = [metadata[rank].address for rank in sorted(metadata)]

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.pool = gpu_block_pool

    @property
    def page(self) -> int:
        return self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What other replicas have of the prompt beyond our own part, once.

        Nothing where our own part is no longer cached: what is to come then has no beginning, and the whole prompt
        is computed here. Nor after a preemption: the others have let go by then.
        """
        pull = pull_of(request)
        if pull is None or request.request_id in self.asked:
            return 0, False
        start, stop = pull.span(self.page)
        if not start <= num_computed_tokens < stop:
            logger.warning("%s: pages from %d on were to be fetched, but the cache ends at %d: computed here instead",
                           request.request_id, start, num_computed_tokens)  # fmt: skip
            return 0, False
        return stop - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pull = pull_of(request)
        if pull is None or not num_external_tokens:
            return
        self.asked.add(request.request_id)
        ours = blocks.get_block_ids()[0]
        first = (pull.span(self.page)[1] - num_external_tokens) // self.page
        reads = []
        for source in pull.sources:
            begin = source.start // self.page
            skip = max(first - begin, 0)
            theirs = source.pages[skip:]
            if theirs:
                reads.append((source, theirs, ours[begin + skip : begin + skip + len(theirs)]))
        self.waiting.append(Load(request.request_id, reads))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads, self.waiting = Loads(self.waiting), []
        return loads

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.asked.discard(request.request_id)
        attend = attend_of(request)
        if attend is not None:
            self._end_attend(attend.own)
        part = part_of(request)
        if part is None or request.status not in ENDED:
            return False, None
        first, stop = part.start // self.page, request.num_prompt_tokens // self.page
        pages = block_ids[0][first:stop]
        blocks = [self.pool.blocks[page] for page in pages]
        self.pool.touch(blocks)
        self.held[part.name] = blocks
        return False, {"name": part.name, "start": part.start, "pages": pages, "addresses": self.addresses}

    def begin_attend(self, own: str) -> None:
        """A request has come that begins with the pages held under this name."""
        self.users[own] += 1

    def _end_attend(self, own: str) -> None:
        self.users[own] -= 1
        if not self.users[own]:
            del self.users[own]
            if own in self.leaving:
                self.leaving.discard(own)
                self.let_go([own])

    def begin_shard(self, name: str) -> list[int]:
        """Pages held under a name, which workers are about to be asked for (raises ValueError: there are none)."""
        if name not in self.held:
            raise ValueError(f"no pages are held as {name}")
        self.opened.add(name)
        return [block.block_id for block in self.held[name]]

    def let_go(self, names: Iterable[str]) -> None:
        """Free the pages held under these names; unknown ones hold none. Workers must not read them any more.

        Those that a request here still begins with stay until it has ended: one that is preempted finds them again.
        """
        for name in names:
            self.opened.discard(name)
            if self.users[name]:
                self.leaving.add(name)
                continue
            self.pool.free_blocks(reversed(self.held.pop(name, [])))

    # A worker's half.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        parallel, cache = self.vllm_config.parallel_config, self.vllm_config.cache_config
        layout = {
            "page_tokens": self.page,
            "dtype": str(next(iter(kv_caches.values())).dtype).removeprefix("torch."),
            "tensor_parallel": parallel.tensor_parallel_size,
            "layout": compat.page_layout(self.vllm_config, next(iter(kv_caches)), cache.cache_dtype),
        }
        rank = get_tensor_model_parallel_rank()
        name = f"{self._kv_transfer_config.engine_id}-{rank}"
        self.mover = PageMover(name, kv_caches, self.kv_cache_config.num_blocks, layout)
        self.caches = kv_caches

    def get_handshake_metadata(self) -> Address | None:
        return None if self.mover is None else Address(self.mover.address())

    def open_shard(self, name: str, pages: list[int]) -> dict[str, Any]:
        """Let other replicas attend over these pages; returns where they ask."""
        if self.holder is None:
            self._check_layers()
            self.holder = ShardHolder(self._shard_name("holder"), self.caches)
        return self.holder.open(name, pages)

    def _check_layers(self) -> None:
        """What engine_ext/refusals.py knows from the configuration, of the layers that were made (RuntimeError)."""
        for name in self.caches:
            layer = self.vllm_config.compilation_config.static_forward_context[name]
            if not isinstance(layer.impl, CpuImpl) or layer.isa not in CPU_ISAS or reason_against(layer.impl):
                raise RuntimeError(f"the KV of layer {name} can't be attended to from elsewhere")

    def close_shards(self, names: list[str]) -> None:
        if self.holder is not None:
            self.holder.close(names)

    def ask_shards(self, asks: Sequence[Ask]) -> StepShards:
        """What a step asks other replicas by."""
        if self.client is None:
            rank = get_tensor_model_parallel_rank()
            self.client = ShardClient(self._shard_name("client"), rank, self.page, worker_metrics().shard_bytes.inc)
        return self.client.step(asks)

    def _shard_name(self, end: str) -> str:
        return f"{self._kv_transfer_config.engine_id}-{get_tensor_model_parallel_rank()}-{end}"

    def build_connector_worker_meta(self) -> LostRequests | None:
        return None if self.client is None else self.client.take_lost()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads) and self.mover is not None
        rank = get_tensor_model_parallel_rank()
        for load in loads.loads:
            move = Move()
            self.moves[load.request_id] = load, move
            try:
                for source, theirs, ours in load.reads:
                    self.mover.read(move, source.addresses[rank], theirs, ours)
            except MoveError as error:
                self._fail(load, move, error)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        arrived = set(self.failed)
        self.failed.clear()
        for request_id, (load, move) in list(self.moves.items()):
            assert self.mover is not None
            try:
                if not self.mover.done(move):
                    continue
            except MoveError as error:
                self._fail(load, move, error)
                self.failed.pop(request_id)
            else:
                worker_metrics().pages_moved(move.bytes, move.seconds)
                del self.moves[request_id]
            arrived.add(request_id)
        return None, arrived or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost, self.lost_pages = self.lost_pages, set()
        return lost

    def _fail(self, load: Load, move: Move, error: MoveError) -> None:
        """All of the load's pages count as lost: vLLM then computes them."""
        logger.error("%s: its pages are computed here: %s", load.request_id, error)
        assert self.mover is not None
        self.mover.give_up(move)
        worker_metrics().moves_failed.inc()
        self.moves.pop(load.request_id)
        self.failed[load.request_id] = load
        self.lost_pages |= load.pages()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER and self.mover is not None:
            self.mover.close()
            self.mover = None
            if self.holder is not None:
                self.holder.stop()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs once all its pages are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: pages are read where they are."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""
