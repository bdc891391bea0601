"""The KV connector between replicas that prefill one star prompt together.

A replica that has prefilled its part of the prompt holds the part's pages: they stay in use, and in its prefix cache.
The replica that runs the query reads them between two of its steps, and then has the whole context in its own prefix
cache. The pages hold exactly what this replica would have computed, so they are cached under the ordinary keys. Where a
part leaves out tokens (core.py), it has vLLM's null page, which has no key.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from starling.features.replicas.connector_metadata import PageLoads, WorkerAddress, WorkerReport
from starling.features.replicas.replica_calls import add_replica_rpc
from starling.features.replicas.scheduler_connector import SchedulerConnector
from starling.features.replicas.worker_connector import WorkerConnector


class StarConnector(KVConnectorBase_V1, SupportsHMA):
    """Forwards the calls of vLLM, the scheduler and the worker to the side that its role makes.

    What Starling's scheduler, worker and replica_calls.py call beside vLLM's methods are methods of that side.

    Attributes:
        connector_scheduler: in the role of the scheduler.
        connector_worker: in the role of a worker.
    """

    connector_scheduler: SchedulerConnector
    connector_worker: WorkerConnector

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        return False  # the pages are registered with NIXL once, at the start

    @classmethod
    def kv_cache_access(cls, kv_transfer_config: Any) -> Any:
        """Return vLLM's flags of its own NIXL connector: the pages are registered, and mapped by peers of the host.

        vLLM asks since 0.34, whose KV cache on a GPU otherwise consists of pieces that NIXL can't register.
        """
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector

        return NixlConnector.kv_cache_access(kv_transfer_config)  # type: ignore[attr-defined]

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        page_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = SchedulerConnector(page_size)
            add_replica_rpc()
        else:
            self.connector_worker = WorkerConnector(vllm_config, page_size, kv_cache_config.num_blocks)

    def __getattr__(self, name: str) -> Any:
        side = vars(self).get("connector_scheduler") or vars(self).get("connector_worker")
        if side is None:  # not made yet
            raise AttributeError(name)
        return getattr(side, name)

    # The scheduler's side: vLLM's methods.

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Return the name under which vLLM's metrics count tokens whose pages came from other replicas."""
        return {CacheHitSource.P2P: num_external_tokens} if num_external_tokens else {}

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self.connector_scheduler.set_addresses(metadata)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.connector_scheduler.bind_gpu_block_pool(gpu_block_pool)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.connector_scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.connector_scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PageLoads:
        return self.connector_scheduler.take_loads()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.connector_scheduler.request_finished(request, block_ids[0])

    # A worker's side: vLLM's methods.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.connector_worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> WorkerAddress | None:
        return self.connector_worker.get_handshake_metadata()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Take a step's loads, and note the released pages: vLLM starts the loads once the forward is launched."""
        super().bind_connector_metadata(connector_metadata)
        self.loads = connector_metadata
        self.connector_worker.note_released(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.connector_worker.start_loads(self.loads)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self.connector_worker.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.connector_worker.take_failed_page_ids()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self.connector_worker.take_report()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self.connector_worker.shutdown()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request runs once all its pages have arrived."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: other replicas read the pages where they are."""

    def wait_for_save(self) -> None:
        """Do nothing, as nothing is saved."""
