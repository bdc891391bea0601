"""Library of pages of an engine: vLLM's OffloadingConnector, with Starling's classes in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from vllm.config import KVTransferConfig
from vllm.logger import init_logger

from starling.config.entry import ENTRY, STAR_LIBRARY, StarlingConfig
from starling.config.library import check_place
from starling.config.parsing import OptionError
from starling.engine_ext.models.configs import MODELS
from starling.scheduler.planning.request_metadata import BOTH_CONNECTORS, LIBRARY_CONNECTOR

logger = init_logger("vllm.starling")

OFFLOADING = "OffloadingConnector"
SPEC, TIER = "LibrarySpec", "LibraryTier"
SPEC_NAME, SPEC_MODULE, HOST_BYTES = "spec_name", "spec_module_path", "cpu_bytes_to_use"
GPU_SPECS = (None, "CPUOffloadingSpec", "TieringOffloadingSpec")
"""Specs of vLLM's own whose worker needs a GPU. None stands for vLLM's default."""

Rules = tuple[tuple[Callable[[Any], Any], str], ...]

RULES: Rules = (
    (
        lambda c: not c.cache_config.enable_prefix_caching,
        "prefix caching is off, and the library holds pages of the prefix cache",
    ),
    (
        lambda c: not c.cache_config.prefix_caching_hash_algo.startswith("sha256"),
        "pages are found by their hash alone, and --prefix-caching-hash-algo is not sha256 or sha256_cbor",
    ),
    (
        lambda c: c.kv_transfer_config and c.kv_transfer_config.kv_connector,
        "an engine has one KV connector, and --kv-transfer-config gives it another",
    ),
    (
        lambda c: set(MODELS).intersection(c.model_config.architectures),
        "the states of this model's layers are no pages that vLLM's offloading knows",
    ),
    (lambda c: c.model_config.enable_sleep_mode, "sleep mode may load other weights, which the library would mix"),
)


def refusals(vllm_config: Any) -> Iterator[str]:
    """Return the reasons why an engine can't have a library; empty if it can."""
    return (reason for applies, reason in RULES if applies(vllm_config))


def set_library(config: StarlingConfig, vllm_config: Any) -> None:
    """Set the connector of an engine's library in its configuration, if it is to have one.

    Raises:
        OptionError: the engine is to have a library, and can't.
    """
    if config.library is None:
        take_offloading(vllm_config)
        return
    library, name = config.library, f"{ENTRY}.{STAR_LIBRARY}"
    folder, given = library.folder, vllm_config.additional_config[ENTRY][STAR_LIBRARY]
    reason = next(refusals(vllm_config), None)
    if reason is not None:
        raise OptionError(name, given, reason, f"no {STAR_LIBRARY}")
    check_place(library, given, name)
    logger.info("The library of KV pages: %s", library.described)
    events = vllm_config.kv_events_config
    tier = {
        "type": TIER,
        "module_path": "starling.features.library.tier",
        "root_dir": str(folder),
        "file_bytes": library.file_bytes,
        "enable_kv_events": events is not None and events.enable_kv_cache_events,
    }
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=LIBRARY_CONNECTOR,
        kv_connector_module_path="starling.features.library.connector",
        kv_role="kv_both",
        kv_connector_extra_config={
            SPEC_NAME: SPEC,
            SPEC_MODULE: "starling.features.library.spec",
            HOST_BYTES: library.host_bytes,
            "secondary_tiers": [] if folder is None else [tier],
        },
    )


def beside_library(replicas: KVTransferConfig, library: KVTransferConfig | None) -> KVTransferConfig:
    """Return the connector between replicas, combined with that of the engine's library if it has one."""
    if library is None:
        return replicas
    fields = ("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config")
    connectors = [{field: getattr(one, field) for field in fields} for one in (replicas, library)]
    return dataclasses.replace(
        replicas,
        kv_connector=BOTH_CONNECTORS,
        kv_connector_module_path="starling.features.library.beside_replicas",
        kv_connector_extra_config=replicas.kv_connector_extra_config | {"connectors": connectors},
    )


def take_offloading(vllm_config: Any) -> None:
    """Let star requests reuse pages of vLLM's OffloadingConnector if its chunks are single pages.

    On a CPU, which vLLM's own worker does not serve, the connector gets Starling's classes.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != OFFLOADING:
        return
    extra = transfer.kv_connector_extra_config
    if vllm_config.device_config.device_type == "cpu" and extra.get(SPEC_NAME) in GPU_SPECS:
        extra |= {SPEC_NAME: SPEC, SPEC_MODULE: "starling.features.library.spec"}
    if extra.get("block_size") is not None or extra.get("blocks_per_chunk", 1) != 1:
        logger.info("Star blocks behind an edit are not loaded: chunks of several pages have the hash of the last one")
        return
    transfer.kv_connector = LIBRARY_CONNECTOR
    transfer.kv_connector_module_path = "starling.features.library.connector"
