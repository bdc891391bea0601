"""The server's adapter in a worker."""

from __future__ import annotations

from typing import Any

from starling.config.entry import STAR_ADAPTER
from starling.features.adapter.lora import own_adapter
from starling.features.worker_part import WorkerPart


class Adapter(WorkerPart):
    """Loads it for good: else the first prompt waits for it, and an error of it ends the engine."""

    def warmed_up(self, worker: Any) -> None:
        adapter = own_adapter(worker.vllm_config)
        if adapter is None:
            return
        try:
            worker.add_lora(adapter)
            worker.pin_lora(adapter.lora_int_id)
        except Exception as error:  # whatever vLLM makes of the files
            raise RuntimeError(f"{STAR_ADAPTER}={adapter.lora_path}: vLLM can't load it: {error}") from error


PARTS = (Adapter.make,)
