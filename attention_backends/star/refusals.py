"""A rule of what an engine can't run: what it looks at, and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from starling.attention_backends.kernels.contract import AMX, CPU_ISAS
from starling.attention_backends.kernels.cpu.paged_op import VECTOR_SIZE
from starling.attention_backends.paged import CLASSES, NAME
from starling.attention_backends.star.backend import WRAPPED
from starling.attention_backends.star.model_heads import scores_of
from starling.config.entry import StarlingConfig, config_of
from starling.scheduler.planning.facts import FULL_ATTENTION, HYBRID, dependence
from starling.scheduler.planning.request_metadata import LIBRARY_CONNECTORS, OWN_CONNECTORS
from starling.vllm_compat.config import cpu_attention_isa
from starling.vllm_compat.core_process import engine_reports


class Rule(NamedTuple):
    """Condition on vLLM's configuration under which Starling refuses a feature.

    Attributes:
        applies: vLLM's configuration -> whether it is refused, or a text that the reason shows.
        reason: reason of the refusal.
    """

    applies: Callable[[Any], Any]
    reason: str


def reasons(rules: Iterable[Rule], vllm_config: Any) -> Iterator[str]:
    """Yield the reason of each rule that matches."""
    for rule in rules:
        found = rule.applies(vllm_config)
        if found:
            yield f"{rule.reason} ({found})" if isinstance(found, str) else rule.reason


def options_of(config: Any) -> StarlingConfig:
    """Starling's options of a server; the defaults where it has none."""
    return config_of(config) or StarlingConfig()


def reported(field: str) -> Callable[[Any], str | None]:
    """Return a function that reads a report of the started engine cores; see engine_core.py."""

    def found(config: Any) -> str | None:
        reported = {reason for report in engine_reports(config) if (reason := report.get(field))}
        return "; ".join(sorted(reported)) or None

    return found


STAR, SPLIT, BLOCK_POSITIONS, HEADS, HEADS_ORDER = "star", "split", "block_positions", "heads", "heads_order"
"""Why no prompt can run star, be split over replicas, have documents, or heads that see
everything, or None if it can. The last one is the order of the heads' scores that the workers have."""


def has_library(config: Any) -> bool:
    """Return whether pages go to host memory or beyond it, so that other engines may find them (--star-library)."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector in LIBRARY_CONNECTORS


def has_documents(config: Any) -> bool:
    """Return whether the server's options say where documents start, so that its engine is made for them."""
    return options_of(config).star.says_where_documents_start


def has_dense_heads(config: Any) -> bool:
    """Return whether the server's options make some heads dense, so that its engine is made for them.

    A file of scores alone does so, unless the server's share is 0.
    """
    options = options_of(config)
    share = options.star.dense_heads
    return options.star_heads is not None if share is None else share > 0


# Connectors whose keys are request.block_hashes, and so tell star pages from dense ones.
CONNECTORS = (*OWN_CONNECTORS, "OffloadingConnector")

SPECULATION = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")
"""The methods of speculative decoding whose drafts come from tokens, or from layers with full attention."""


def _full_attention_layers(model: Any) -> bool:
    """Return whether the text model has a full-attention layer according to its configuration."""
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
    """Return the reasons why Star Attention can't run on this engine; empty if it can."""
    return list(reasons(RULES, vllm_config))


def is_attamba(vllm_config: Any) -> bool:
    """Return whether the model is an Attamba, whose layers attend by themselves."""
    return getattr(vllm_config.model_config.hf_text_config, "model_type", None) == "attamba"


def unread_isa(config: Any) -> str | None:
    """Return the instruction set for which vLLM lays out keys, or None if Starling's CPU attention reads them."""
    isa = cpu_attention_isa(config)
    if isa in CPU_ISAS or (isa == AMX and options_of(config).reads_all_caches):
        return None
    return isa


CPU_ATTENTION_RULES: tuple[Rule, ...] = (
    Rule(
        lambda c: options_of(c).cpu_attention == "vllm", "cpu_attention=vllm: vLLM's CPU attention gives no log-sum-exp"
    ),
    Rule(
        lambda c: c.model_config.get_head_size() % VECTOR_SIZE,
        f"Starling's CPU attention takes head sizes that are multiples of {VECTOR_SIZE}",
    ),
    Rule(
        unread_isa,
        "on this processor vLLM stores keys in an order that Starling's CPU attention does not read, unless the server "
        "is started with --star-segments or --star-shards on, or with --dtype float32",
    ),
)


def _has_breakable_graphs(config: Any) -> bool:
    has_graphs = config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    return has_graphs and config.device_config.device_type != "cpu" and envs.VLLM_USE_BREAKABLE_CUDAGRAPH


def _on_cpu(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda config: config.device_config.device_type == "cpu" and rule(config)


DOCUMENT_RULES: tuple[Rule, ...] = (
    Rule(
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "the kernels run on CPUs and on CUDA devices",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and not has_documents(c),
        "on a GPU the server has to be started with --star-segments, so that its layers and graphs are made for them",
    ),
    Rule(
        _has_breakable_graphs,
        "breakable CUDA graphs are on (VLLM_USE_BREAKABLE_CUDAGRAPH, VLLM_BATCH_INVARIANT), and documents have not "
        "been tested with them",
    ),
    Rule(lambda c: dependence(c.model_config), "the model's star blocks depend on one another"),
    Rule(lambda c: c.speculative_config, "speculative decoding: drafters take the positions of the prompt"),
    Rule(lambda c: c.model_config.uses_mrope, "M-RoPE: an image's positions depend on the images before it"),
    Rule(
        lambda c: any(not rotary for rotary in getattr(c.model_config.hf_text_config, "no_rope_layers", None) or ()),
        "some layers have no rotary embedding, so that rotating a query would change their scores",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and c.cache_config.cache_dtype.startswith("fp8"),
        "on a GPU the KV cache is fp8, and so may be its queries",
    ),
    *(Rule(_on_cpu(rule), reason) for rule, reason in CPU_ATTENTION_RULES),
    Rule(reported(BLOCK_POSITIONS), "the engine can't run it, as it found when it started"),
)


def document_refusals(vllm_config: Any) -> list[str]:
    """Return the reasons why this engine can't have documents; empty if it can."""
    return list(reasons(DOCUMENT_RULES, vllm_config))


def is_made_for_documents(config: Any) -> bool:
    """Return whether the engine is made for documents: options say where they start, and no rule refuses them."""
    return has_documents(config) and not document_refusals(config)


def _workers_have_other_scores(config: Any) -> bool:
    """Return whether the file of scores has changed between the starts of the workers and of this front."""
    reported = {report.get(HEADS_ORDER) for report in engine_reports(config)} - {None}
    scores = scores_of(config) if reported else None
    return scores is not None and reported != {scores.order_digest}


HEAD_RULES: tuple[Rule, ...] = (
    Rule(lambda c: is_attamba(c), "an Attamba model's layers attend by themselves"),
    Rule(
        lambda c: c.device_config.device_type not in ("cpu", "cuda") and c.device_config.device_type,
        "heads of one layer that see different keys run on CPUs and on CUDA devices",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and not has_dense_heads(c),
        "on a GPU the server has to be started with --star-heads or --star-dense-heads, since its layers are then made "
        "to attend in several calls",
    ),
    Rule(
        lambda c: c.device_config.device_type != "cpu" and has_documents(c),
        "on a GPU the server is started with --star-segments, and its layers are made for documents",
    ),
    Rule(reported(HEADS), "the engine can't run it, as it found when it started"),
    Rule(
        _workers_have_other_scores,
        "the engine has other scores of the heads than this process, as their file changed between their starts: start "
        "the server anew",
    ),
)


def heads_refusals(vllm_config: Any) -> list[str]:
    """Return the reasons why this engine can't have dense heads beside heads that see star blocks; empty if it can."""
    return list(reasons(HEAD_RULES, vllm_config))
