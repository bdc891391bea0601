"""What Star Attention does not run with."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import KVCacheSpecKind

from starling.attention_backends.paged.names import CLASSES, NAME
from starling.attention_backends.star.backend import WRAPPED
from starling.features.report_fields import STAR
from starling.features.rule import Rule, options_of, reasons, reported
from starling.scheduler.star.independence import FULL_ATTENTION, HYBRID
from starling.scheduler.star.request_metadata import OWN_CONNECTORS

# Connectors whose keys are request.block_hashes, and so tell star pages from dense ones.
CONNECTORS = (*OWN_CONNECTORS, "OffloadingConnector")

SPECULATION = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")
"""The methods of speculative decoding whose drafts come from tokens, or from layers with full attention."""


def _full_attention_layers(model: Any) -> bool:
    """Whether the text model has a full-attention layer, as far as its configuration says."""
    if model.is_attention_free:
        return False
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    if layer_types:
        return any(kind in (*FULL_ATTENTION, HYBRID) for kind in layer_types)
    return model.get_sliding_window() is None


def _connector(config: Any) -> str | None:
    transfer = config.kv_transfer_config
    return None if transfer is None or transfer.kv_connector in CONNECTORS else transfer.kv_connector


def _other_speculation(config: Any) -> str | None:
    speculative = config.speculative_config
    return None if speculative is None or speculative.method in SPECULATION else speculative.method


def _backend(config: Any) -> str | None:
    given = config.attention_config
    backend = given.backend_per_kind.get(KVCacheSpecKind.FULL_ATTENTION.value, given.backend)
    on_cpu = config.device_config.device_type == "cpu"  # the CPU platform always takes CPU_ATTN
    if backend is None or on_cpu or backend.name in WRAPPED:
        return None
    is_own = backend.name == NAME and options_of(config).gpu_attention in CLASSES
    return None if is_own else backend.name


RULES: tuple[Rule, ...] = (
    Rule(
        lambda c: c.model_config.runner_type != "generate", "the model does not generate, so there is no prefill to cut"
    ),
    Rule(lambda c: c.model_config.is_encoder_decoder, "encoder-decoder models: the prompt is not one causal sequence"),
    Rule(lambda c: c.model_config.use_mla, "MLA models: their latent cache has backends of its own, not wrapped yet"),
    Rule(lambda c: not _full_attention_layers(c.model_config), "the model has no full-attention layer"),
    Rule(lambda c: c.model_config.uses_alibi, "ALiBi: a key's distance is lost when its page moves in the block table"),
    Rule(lambda c: c.model_config.is_mm_prefix_lm, "prefix-LM multi-modal models attend both ways over image tokens"),
    Rule(lambda c: c.model_config.rswa_window is not None, "R-SWA models keep a prefix length per batch row"),
    Rule(lambda c: c.model_config.is_diffusion, "diffusion models decode whole canvases, not token by token"),
    Rule(_other_speculation, f"speculative decoding by another method than {', '.join(SPECULATION)}"),
    Rule(
        lambda c: c.speculative_config and c.speculative_config.enable_adaptive_verification,
        "adaptive verification takes drafts out of a step, so that batch rows are not those of the scheduler",
    ),
    Rule(
        lambda c: c.speculative_config and c.model_config.is_hybrid,
        "speculative decoding: a hybrid model keeps a recurrent state for each draft token",
    ),
    Rule(lambda c: c.parallel_config.decode_context_parallel_size > 1, "decode context parallelism shards the pages"),
    Rule(
        lambda c: c.parallel_config.prefill_context_parallel_size > 1, "prefill context parallelism splits the prompt"
    ),
    Rule(
        lambda c: c.parallel_config.use_ubatching,
        "dual-batch overlap and --ubatch-size slice batches by row before rows are split",
    ),
    Rule(
        lambda c: c.cache_config.use_replayssm,
        "--use-replayssm: its positions in the Mamba state are per batch row, and have no split into star rows",
    ),
    Rule(lambda c: c.cache_config.kv_sharing_fast_prefill, "KV-sharing fast prefill skips tokens by batch row"),
    Rule(
        lambda c: (
            c.compilation_config.cudagraph_mode.has_full_cudagraphs()
            and c.scheduler_config.long_prefill_token_threshold == 1
        ),
        "long_prefill_token_threshold=1 with full decode graphs leaves star prompts no chunk to run in",
    ),
    Rule(_connector, "the KV connector is not known to key pages by request.block_hashes, so star and dense would mix"),
    Rule(_backend, f"the attention backend is not one of those wrapped: {', '.join(WRAPPED)}"),
    Rule(reported(STAR), "the engine can't run it, as it found when it started"),
)


def star_refusals(vllm_config: Any) -> list[str]:
    """The reasons why Star Attention can't run on this engine; empty where it can."""
    return list(reasons(RULES, vllm_config))


def is_attamba(vllm_config: Any) -> bool:
    """Whether the model is an Attamba, whose layers attend by themselves."""
    return getattr(vllm_config.model_config.hf_text_config, "model_type", None) == "attamba"
