"""The adapter with which an engine runs prompts that have a star plan (``--star-adapter``).

It is vLLM's own LoRA: the engine is started with LoRA on, and the requests of these prompts name an adapter that no
list of models shows. Its name contains a digest of its files, and vLLM's page keys contain the name. So pages of
another adapter, or of the base model, are never taken for its own.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from starling.attention_backends.star.model_heads import checkpoint_digest, checkpoint_folder
from starling.config.adapter import AdapterError, StarAdapter, read_adapter
from starling.config.entry import ENTRY, STAR_ADAPTER, StarlingConfig, config_of
from starling.config.parsing import OptionError
from starling.scheduler.planning.facts import EngineFacts

logger = init_logger("vllm.starling")

NAME = f"{ENTRY}.{STAR_ADAPTER}"
MADE = "a folder that `starling distil` made of this model"
NUMBER = 2**30
"""The adapter's number in vLLM, which counts the user's adapters from 1."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of vLLM's --max-lora-rank (vllm/config/lora.py)."""


def adapter_of(config: StarlingConfig | None) -> StarAdapter | None:
    """Return the adapter that a server's options name, or None if they name none.

    Raises:
        OptionError: the folder has no usable adapter.
    """
    if config is None or config.star_adapter is None:
        return None
    try:
        return read_adapter(config.star_adapter)
    except AdapterError as error:
        raise OptionError(NAME, config.star_adapter, str(error), MADE) from None


def lora_request(adapter: StarAdapter) -> LoRARequest:
    """Return the adapter in vLLM's form for a request."""
    return LoRARequest(f"starling-{adapter.digest}", NUMBER, adapter.folder)


def adapter_fields(lora: LoRARequest | None) -> list[Any] | None:
    """Return an adapter in the form that a call to an engine core takes, or None for the base model."""
    return None if lora is None else [lora.lora_name, lora.lora_int_id, lora.lora_path]


def turn_lora_on(config: StarlingConfig, engine_args: Any) -> None:
    """Turn vLLM's LoRA on for the adapter, before vLLM makes its configuration.

    A server with LoRA of its own keeps as many adapters beside one another as it has been given. One without it has
    LoRA in the layers that the adapter changes, and in no others.

    Raises:
        OptionError: the folder has no adapter, or one of a higher rank than --max-lora-rank.
    """
    adapter = adapter_of(config)
    if adapter is None:
        return
    if adapter.rank > engine_args.max_lora_rank:
        reason = f"its rank of {adapter.rank} is above --max-lora-rank {engine_args.max_lora_rank}"
        enough = next((rank for rank in RANKS if rank >= adapter.rank), None)
        allowed = f"--max-lora-rank {enough}" if enough else f"a rank up to {RANKS[-1]}"
        raise OptionError(NAME, config.star_adapter, reason, allowed)
    if engine_args.enable_lora:
        engine_args.max_loras += 1
        if engine_args.max_cpu_loras is not None:
            engine_args.max_cpu_loras += 1
        missing = set(adapter.target_modules) - set(engine_args.lora_target_modules or adapter.target_modules)
        if missing:
            reason = f"it changes {', '.join(sorted(missing))}, which --lora-target-modules leaves out"
            raise OptionError(NAME, config.star_adapter, reason, f"{' '.join(sorted(missing))} in them too")
        return
    engine_args.enable_lora = True
    engine_args.max_lora_rank = next(rank for rank in RANKS if rank >= adapter.rank)
    engine_args.lora_target_modules = list(adapter.target_modules)


def check_adapter(config: StarlingConfig, vllm_config: Any, facts: EngineFacts) -> None:
    """Refuse an adapter of another model, or for plans that this engine can't have.

    Raises:
        OptionError: as above.
    """
    adapter, model = adapter_of(config), vllm_config.model_config
    if adapter is None:
        return
    made = adapter.distilled
    folder = checkpoint_folder(model.model, model.revision)
    own = None if folder is None else checkpoint_digest(folder)
    if own is None or made.checkpoint is None:
        logger.warning("%s=%s: no weights are found on this machine to compare its base with", NAME, adapter.folder)
    elif own != made.checkpoint:
        reason = f"it is an adapter of {made.model}, with other weights than {model.model}"
        raise OptionError(NAME, config.star_adapter, reason, MADE)
    refusals = {"star": facts.refusals, "documents": (*facts.refusals, *facts.document_refusals)}
    if all(refusals[purpose] for purpose in made.purposes):
        reason = f"it is for {' and '.join(made.purposes)}: {'; '.join(refusals[made.purposes[0]])}"
        raise OptionError(NAME, config.star_adapter, reason, "a server without it")
    logger.info("Prompts with %s run with the adapter %s", " or ".join(made.purposes), adapter.folder)


def own_adapter(vllm_config: Any) -> LoRARequest | None:
    """Return the engine's adapter in vLLM's form for a request, or None if it has none (raises OptionError)."""
    adapter = adapter_of(config_of(vllm_config))
    return None if adapter is None else lora_request(adapter)
