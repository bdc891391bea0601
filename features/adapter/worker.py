"""Worker side of the server's adapter."""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest

from starling.config.entry import STAR_ADAPTER
from starling.features.adapter.lora import own_adapter


class Adapter:
    """Worker side of the server's adapter, which stays loaded.

    Otherwise the first prompt would wait for it, and an error in it would end the engine.
    """

    def __init__(self, adapter: LoRARequest) -> None:
        self.adapter = adapter

    def load(self, worker: Any) -> None:
        """Load the adapter, after the warm-up (raises RuntimeError: vLLM can't)."""
        adapter = self.adapter
        try:
            worker.add_lora(adapter)
            worker.pin_lora(adapter.lora_int_id)
        except Exception as error:  # whatever vLLM makes of the files
            raise RuntimeError(f"{STAR_ADAPTER}={adapter.lora_path}: vLLM can't load it: {error}") from error


def make(vllm_config: Any) -> Adapter | None:
    """Return the adapter of an engine, or None if it has none (raises OptionError)."""
    adapter = own_adapter(vllm_config)
    return None if adapter is None else Adapter(adapter)
