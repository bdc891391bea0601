"""A worker's side of the connector between replicas: reads their pages, and exchanges attention over shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from starling.attention_backends.kernels.contract import CPU_ISAS
from starling.attention_backends.star.cpu_impl import CpuImpl, unsupported_reason
from starling.attention_backends.star.remote_queries import RemoteQuery
from starling.config.entry import StarlingConfig, config_of
from starling.features.replicas.connector_metadata import PageLoad, PageLoads, WorkerAddress, WorkerReport
from starling.features.replicas.network import DEVICES_ENV, use_devices
from starling.features.replicas.notifications import MessageLimits
from starling.features.replicas.page_transfer import PageReader, Transfer, TransferError, replica_metrics
from starling.features.replicas.remote_attention_client import RemoteAttentionClient, StepRemoteAttention
from starling.features.replicas.remote_attention_server import RemoteAttentionServer, Rotations
from starling.features.replicas.remote_query import message_limits
from starling.scheduler.planning.request_metadata import ONE_HOST
from starling.vllm_compat.config import attention_layer, page_layout

logger = init_logger("vllm.starling")


class WorkerConnector:
    """The page reader of one worker, and the two ends of its remote attention, each made at its first use.

    Args:
        page_size: tokens of a KV page.
        num_pages: pages of the KV cache, vLLM's null page included.
    """

    def __init__(self, vllm_config: Any, page_size: int, num_pages: int) -> None:
        self.vllm_config, self.page_size, self.num_pages = vllm_config, page_size, num_pages
        self.rank = get_tensor_model_parallel_rank()
        self.name = f"{vllm_config.kv_transfer_config.engine_id}-{self.rank}"
        self.timeout = (config_of(vllm_config) or StarlingConfig()).replicas.timeout
        one_host = vllm_config.kv_transfer_config.kv_connector_extra_config.get(ONE_HOST, False)
        devices = use_devices(one_host, os.environ)
        logger.info("KV pages are exchanged over the network devices %s (%s)", devices, DEVICES_ENV)
        self.metrics = replica_metrics()
        self.kv_caches: dict[str, Any] = {}
        self.reader: PageReader | None = None
        self.server: RemoteAttentionServer | None = None
        self.client: RemoteAttentionClient | None = None
        self._transfers: dict[str, tuple[PageLoad, Transfer]] = {}  # by request id
        self._finished: set[str] = set()
        self._failed_page_ids: set[int] = set()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Let other replicas read the pages of these layers.

        Raises:
            TransferError: as PageReader raises it.
        """
        parallel, cache = self.vllm_config.parallel_config, self.vllm_config.cache_config
        layout = {
            "page_tokens": self.page_size,
            "dtype": str(next(iter(kv_caches.values())).dtype).removeprefix("torch."),
            "tensor_parallel": parallel.tensor_parallel_size,
            "layout": page_layout(self.vllm_config, next(iter(kv_caches)), cache.cache_dtype),
        }
        self.reader = PageReader(self.name, kv_caches, self.num_pages, layout, self.timeout)
        self.kv_caches = kv_caches

    def get_handshake_metadata(self) -> WorkerAddress | None:
        return None if self.reader is None else WorkerAddress(self.reader.address())

    def shutdown(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None
        if self.server is not None:
            self.server.stop()
            self.server = None

    # Pages of other replicas.

    def note_released(self, loads: PageLoads) -> None:
        """Let readers learn of the released pages, before the step is launched that may write to them."""
        assert self.reader is not None
        self.reader.holds.note_released(loads.released)

    def start_loads(self, loads: PageLoads) -> None:
        """Begin to read the pages of these loads."""
        assert self.reader is not None
        for load in loads.loads:
            transfer = Transfer()
            self._transfers[load.request_id] = load, transfer
            try:
                for read in load.reads:
                    address = read.address_of(self.rank)
                    self.reader.begin(transfer, address, read.hold, read.remote_page_ids, read.local_page_ids)
            except TransferError as error:
                self._fail(load, transfer, error)

    def take_finished(self) -> set[str] | None:
        """Ids of the requests whose loads have ended or failed since the last call; None where there are none."""
        if self.reader is not None:
            self.reader.retry_releases()
        for request_id, (load, transfer) in list(self._transfers.items()):
            assert self.reader is not None
            try:
                if self.reader.is_done(transfer):
                    self.metrics.pages_moved(transfer.num_bytes, transfer.seconds)
                    self._end(request_id)
            except TransferError as error:
                self._fail(load, transfer, error)
        finished, self._finished = self._finished, set()
        return finished or None

    def take_failed_page_ids(self) -> set[int]:
        """Pages of this replica whose loads have failed since the last call; vLLM computes them."""
        failed, self._failed_page_ids = self._failed_page_ids, set()
        return failed

    def _end(self, request_id: str) -> None:
        del self._transfers[request_id]
        self._finished.add(request_id)

    def _fail(self, load: PageLoad, transfer: Transfer, error: TransferError) -> None:
        """End a load, with all of its pages as failed."""
        logger.error("%s: its pages are computed here: %s", load.request_id, error)
        assert self.reader is not None
        self.reader.cancel(transfer)
        self.metrics.moves_failed.inc()
        self._failed_page_ids |= load.local_page_ids()
        self._end(load.request_id)

    # Remote attention.

    def open_shard(self, name: str, page_ids: list[int], rotations: Rotations) -> dict[str, Any]:
        """Let other replicas attend to these pages; returns the address that takes their queries.

        Args:
            rotations: returns how the queries of each layer are re-rotated.

        Raises:
            RuntimeError: a layer's KV can't be attended to for other replicas.
        """
        if self.server is None:
            self._check_layers()
            self.server = RemoteAttentionServer(
                f"{self.name}-server", self.kv_caches, rotations, self._message_limits()
            )
        return self.server.open(name, page_ids)

    def _check_layers(self) -> None:
        """Check of the layers what features/ checks of the configuration."""
        for name in self.kv_caches:
            layer = attention_layer(self.vllm_config, name)
            if not isinstance(layer.impl, CpuImpl) or layer.isa not in CPU_ISAS or unsupported_reason(layer.impl):
                raise RuntimeError(f"other replicas can't attend to the KV of layer {name}")

    def _message_limits(self) -> MessageLimits:
        """Return the most that the queries of one step take: all its tokens, in the layer with the largest ones."""
        impls = [attention_layer(self.vllm_config, name).impl for name in self.kv_caches]
        heads = max(impl.num_heads for impl in impls)
        row_bytes = (
            max(impl.num_heads * impl.head_size for impl in impls) * self.vllm_config.model_config.dtype.itemsize
        )
        scheduling = self.vllm_config.scheduler_config
        blocks_of_prompt = -(-self.vllm_config.model_config.max_model_len // self.page_size)
        return message_limits(
            scheduling.max_num_batched_tokens,
            row_bytes,
            heads,
            num_ranges=scheduling.max_num_seqs * blocks_of_prompt,
            num_senders=self.vllm_config.parallel_config.data_parallel_size,
        )

    def close_shards(self, names: list[str]) -> None:
        """No page of these shards is read any more when this returns."""
        if self.server is not None:
            self.server.close(names)

    def remote_attention(self, queries: Sequence[RemoteQuery]) -> StepRemoteAttention:
        """Return the object by which a step's layers send these queries to other replicas."""
        if self.client is None:
            self.client = RemoteAttentionClient(
                f"{self.name}-client", self.rank, self.metrics.shard_bytes.inc, self._message_limits()
            )
        return self.client.step(queries)

    def take_report(self) -> WorkerReport | None:
        """Return the report of the steps since the last call, or None if there is nothing to report."""
        report = (self.client.take_lost() if self.client is not None else None) or WorkerReport()
        if self.reader is not None:
            report.stuck_pages, report.freed_pages = self.reader.take_stuck_pages()
        return report if report != WorkerReport() else None
