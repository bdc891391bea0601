"""The KV connector of an engine with a library and replicas: vLLM's MultiConnector over those of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from starling.features.library.connector import LibraryConnector
from starling.features.library.core import PageLoads
from starling.features.replicas.connector import StarConnector
from starling.scheduler.planning.request_metadata import CONNECTOR, LIBRARY_CONNECTOR
from starling.vllm_compat.kv_pages import CacheGroup
from starling.vllm_compat.scheduler_view import SchedulerView

# MultiConnector finds the classes of statistics by name.
KVConnectorFactory.register_connector(CONNECTOR, StarConnector.__module__, CONNECTOR)
KVConnectorFactory.register_connector(LIBRARY_CONNECTOR, LibraryConnector.__module__, LIBRARY_CONNECTOR)


@dataclass
class Handshakes(KVConnectorHandshakeMetadata):
    """The handshakes of one worker, one for each connector."""

    metadata: tuple[KVConnectorHandshakeMetadata | None, ...]


class LibraryAndReplicasConnector(MultiConnector):
    """A MultiConnector that asks the connector between replicas first, then the library's.

    vLLM's MultiConnector passes one connector's handshake on. Here both have one. The methods that Starling's
    scheduler, workers and features/replicas/replica_calls.py call beside vLLM's are those of the connector between
    replicas.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.replicas, self.library = self.sub_connectors

    def get_handshake_metadata(self) -> Handshakes:
        return Handshakes(tuple(connector.get_handshake_metadata() for connector in self.sub_connectors))

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        for index, connector in enumerate(self.sub_connectors):
            own = {ranks: handshakes.metadata[index] for ranks, handshakes in metadata.items()}
            connector.set_xfer_handshake_metadata_pp_aware(own)

    def make_page_loads(self, view: SchedulerView, group: CacheGroup) -> PageLoads:
        """Return the object that loads single pages from now on, for a scheduler that reuses blocks."""
        assert isinstance(self.library, LibraryConnector)
        return self.library.make_page_loads(view, group)

    def close_files(self, reason: str) -> None:
        """Stop using files, since their content may be wrong from now on."""
        assert isinstance(self.library, LibraryConnector)
        self.library.close_files(reason)

    def __getattr__(self, name: str) -> Any:
        if "replicas" not in vars(self):  # not made yet
            raise AttributeError(name)
        return getattr(self.replicas, name)
